// int4, and the values of kivi4: scale and minimum for each 64 channels of a token.
// Codes [L, H, T, D / 64, 32] u8 in lane order, parameters [L, H, T, D / 64, 2].

template <class Element, class S> struct Int4 {
    using Data = Segments<Element, S>;
    static constexpr u32 CODES = S::SEGMENTS * 32, PARAMETERS = S::SEGMENTS * 4;

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const u32 half = thread_index() & 1u;
        Chunk<Element> c[CHUNKS];
        Data::load(s, tile, c);
        Data::template to_halves<false>(shared, c);
        Asymmetric g[2];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            u32 low = least_word<Element>(c[4 * which].w), high = greatest_word<Element>(c[4 * which].w);
#pragma unroll
            for (int k = 1; k < 4; k++) {
                low = Element::least(low, least_word<Element>(c[4 * which + k].w));
                high = Element::greatest(high, greatest_word<Element>(c[4 * which + k].w));
            }
            low = Element::least(low, from_lane_across(low, 1));
            high = Element::greatest(high, from_lane_across(high, 1));
            g[which] = asymmetric<15>(least_of_word<Element>(low), greatest_of_word<Element>(high));
            const u32 segment = Data::first(tile) + Data::template own<false>(which);
            if (half == which && Data::exists(segment)) {
                const u32 parameters[1] = {g[which].scale_bits | g[which].minimum_bits << 16};
                store_words<S::ALIGN>(tile.region(CODES, PARAMETERS) + 4 * segment, parameters);
                if (g[which].is_void) count(tile.void_groups, 1);
            }
        }
        if (warp_any(g[0].needs_clamp || g[1].needs_clamp))
            store_codes<true>(tile, c, g);
        else
            store_codes<false>(tile, c, g);
    }

    template <bool CLAMP>
    static KV_INLINE void store_codes(const Tile& tile, const Chunk<Element> (&c)[CHUNKS], const Asymmetric (&g)[2]) {
        const u32 half = thread_index() & 1u;
        u8* const at = tile.region(0, CODES) + (Data::first(tile) + Data::template own<false>(0)) * 32 + half * 16;
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const u32 segment = Data::first(tile) + Data::template own<false>(which);
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 codes[8];
#pragma unroll
                for (int e = 0; e < 8; e++)
                    codes[e] = asymmetric_code<15, CLAMP>(c[4 * which + e / 2].get(2 * j + e % 2), g[which].minimum, g[which].inverse);
                words[j] = pack<4>(codes);
            }
            if (Data::exists(segment)) store_words<S::ALIGN>(at + 16 * 32 * which, words);
        }
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8* shared) {
        const u32 half = thread_index() & 1u, first = Data::first(tile) + Data::template own<false>(0);
        const u8* const at = tile.region(0, CODES) + first * 32 + half * 16;
        const u8* const parameters_at = tile.region(CODES, PARAMETERS) + 4 * first;
        u32 words[2][4], parameters[2][1];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const u32 segment = Data::first(tile) + Data::template own<false>(which);
            words[which][0] = words[which][1] = words[which][2] = words[which][3] = parameters[which][0] = 0;
            if (!Data::exists(segment)) continue;
            load_words<S::ALIGN>(at + 16 * 32 * which, words[which]);
            load_words<S::ALIGN>(parameters_at + 16 * 4 * which, parameters[which]);
        }
        Chunk<Element> c[CHUNKS];
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const float scale = half_to_float((u16)parameters[which][0]);
            const float minimum = half_to_float((u16)(parameters[which][0] >> 16));
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    c[4 * which + k].set_pair(2 * j, asymmetric_value(code_at<4>(words[which][j], 8 * k), scale, minimum),
                                              asymmetric_value(code_at<4>(words[which][j], 8 * k + 4), scale, minimum));
        }
        Data::template from_halves<false>(shared, c);
        Data::store(s, tile, c);
    }
};
