// The values of kivi2: scale and minimum for each 32 channels of a token.
// Codes [L, H, T, D / 64, 8] u16 in lane order, parameters [L, H, T, D / 32, 2].

template <class Element, class S> struct Kivi2Values {
    using Data = Segments<Element, S>;
    static constexpr u32 CODES = S::SEGMENTS * 16, PARAMETERS = S::SEGMENTS * 8;

    // Groups of a segment: chunks 0 and 1, and 2 and 3, of both lanes that share it. g[2 * which + group].
    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const u32 half = thread_index() & 1u;
        Chunk<Element> c[CHUNKS];
        Data::load(s, tile, c);
        Data::template to_halves<false>(shared, c);
        Asymmetric g[4];
        bool needs_clamp = false;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            u32 low = Element::least(least_word<Element>(c[2 * n].w), least_word<Element>(c[2 * n + 1].w));
            u32 high = Element::greatest(greatest_word<Element>(c[2 * n].w), greatest_word<Element>(c[2 * n + 1].w));
            low = Element::least(low, from_lane_across(low, 1));
            high = Element::greatest(high, from_lane_across(high, 1));
            g[n] = asymmetric<3>(least_of_word<Element>(low), greatest_of_word<Element>(high));
            needs_clamp |= g[n].needs_clamp;
        }
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const u32 segment = Data::first(tile) + Data::template own<false>(which);
            if (half == which && Data::exists(segment)) {
                const Asymmetric &first = g[2 * which], &second = g[2 * which + 1];
                const u32 parameters[2] = {first.scale_bits | first.minimum_bits << 16, second.scale_bits | second.minimum_bits << 16};
                store_words<S::ALIGN>(tile.region(CODES, PARAMETERS) + 8 * segment, parameters);
                if (first.is_void || second.is_void) count(tile.void_groups, first.is_void + second.is_void);
            }
        }
        if (warp_any(needs_clamp))
            store_codes<true>(tile, c, g);
        else
            store_codes<false>(tile, c, g);
    }

    template <bool CLAMP>
    static KV_INLINE void store_codes(const Tile& tile, const Chunk<Element> (&c)[CHUNKS], const Asymmetric (&g)[4]) {
        const u32 half = thread_index() & 1u;
        u8* const at = tile.region(0, CODES) + (Data::first(tile) + Data::template own<false>(0)) * 16 + half * 8;
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const u32 segment = Data::first(tile) + Data::template own<false>(which);
            u32 words[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 codes[16];
#pragma unroll
                for (int n = 0; n < 16; n++) {
                    const int k = n / 2 % 4, e = 4 * j + n / 8 * 2 + n % 2;
                    const Asymmetric& group = g[2 * which + k / 2];
                    codes[n] = asymmetric_code<3, CLAMP>(c[4 * which + k].get(e), group.minimum, group.inverse);
                }
                words[j] = pack<2>(codes);
            }
            if (Data::exists(segment)) store_words<S::ALIGN>(at + 16 * 16 * which, words);
        }
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8* shared) {
        const u32 half = thread_index() & 1u, first = Data::first(tile) + Data::template own<false>(0);
        const u8* const at = tile.region(0, CODES) + first * 16 + half * 8;
        const u8* const parameters_at = tile.region(CODES, PARAMETERS) + 8 * first;
        u32 words[2][2], parameters[2][2];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const u32 segment = Data::first(tile) + Data::template own<false>(which);
            words[which][0] = words[which][1] = parameters[which][0] = parameters[which][1] = 0;
            if (!Data::exists(segment)) continue;
            load_words<S::ALIGN>(at + 16 * 16 * which, words[which]);
            load_words<S::ALIGN>(parameters_at + 16 * 8 * which, parameters[which]);
        }
        Chunk<Element> c[CHUNKS];
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float scale = half_to_float((u16)parameters[which][k / 2]);
                const float minimum = half_to_float((u16)(parameters[which][k / 2] >> 16));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32 word = words[which][j / 2];
                    const int at = 16 * (j % 2) + 4 * k;
                    c[4 * which + k].set_pair(2 * j, asymmetric_value(code_at<2>(word, at), scale, minimum),
                                              asymmetric_value(code_at<2>(word, at + 2), scale, minimum));
                }
            }
        Data::template from_halves<false>(shared, c);
        Data::store(s, tile, c);
    }
};
