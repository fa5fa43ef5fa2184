// The keys of kivi4 and kivi2: scale and minimum for each 64 (32) tokens of a channel.
// Codes [L, H, T / G, words, D / 2] u32, of 4 (8) tokens of two channels each; parameters [L, H, T / G, 2, D].

template <class Element, class S, int BITS> struct KiviKeys {
    static constexpr int Q = (1 << BITS) - 1;
    static constexpr u32 GROUP = 16 * BITS;               // tokens
    static constexpr u32 TILE = S::THREADS * 64 / S::D;   // tokens: eight for each thread of a chunk of channels
    static constexpr u32 GROUPS = TILE / GROUP;           // of a channel in a tile
    static constexpr u32 LANES = S::D / 8;                // threads that share tokens
    static constexpr u32 ROWS = 8;                        // tokens of a thread
    static constexpr u32 WORDS = 8 * BITS / 16;           // words of a thread for each pair of channels
    static constexpr u32 PARTS = GROUP / ROWS;            // threads that share a group
    static constexpr u32 OWNED = GROUPS * S::D / S::THREADS;  // groups whose parameters a thread computes
    static constexpr u32 CODES = S::T / GROUP * (S::D * BITS * GROUP / 8), PARAMETERS = S::T / GROUP * (4 * S::D);
    static constexpr u32 PARTIAL = TILE / ROWS * 2 * S::D * Element::BYTES;  // bytes of least and greatest numbers
    static constexpr u32 HALF = S::D / 2 + 16;            // floats: the second four of eight channels lie this far off
    static_assert(S::T % TILE == 0 && TILE % GROUP == 0 && GROUPS * S::D % S::THREADS == 0, "tiles have whole groups");

    // Of a channel's parameter among those of its group in shared memory, in floats.
    static KV_INLINE u32 place(u32 channel) { return channel / 4 % 2 * HALF + channel / 8 * 4 + channel % 4; }

    // Of a thread's chunk of its row i.
    static KV_INLINE u8* address(const Section& s, const Tile& tile, int i) {
        const u32 first = tile.index * TILE + thread_index() / LANES * ROWS, at = thread_index() % LANES * 8 * Element::BYTES;
        if constexpr (S::PAGE % ROWS == 0)
            return stepped(token_address<S::PAGE>(s, tile, first) + at, i, s.token_stride);
        else
            return token_address<S::PAGE>(s, tile, first + i) + at;
    }

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const u32 thread = thread_index(), chunk = thread % LANES, rows = thread / LANES;
        Chunk<Element> c[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            c[i] = load_chunk<Element>(address(s, tile, i));

        Chunk<Element> low = c[0], high = c[0];
#pragma unroll
        for (int i = 1; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < Chunk<Element>::WORDS; j++) {
                low.w[j] = Element::least(low.w[j], c[i].w[j]);
                high.w[j] = Element::greatest(high.w[j], c[i].w[j]);
            }
        u8* const partial = shared + (rows * 2 * S::D + chunk * 8) * Element::BYTES;
#pragma unroll
        for (int v = 0; v < Element::BYTES / 2; v++) {
            to_shared<vec16>(partial + 16 * v, low.get_vector(v));
            to_shared<vec16>(partial + S::D * Element::BYTES + 16 * v, high.get_vector(v));
        }
        block_barrier();

        bool needs_clamp = false;
        float* const minima = (float*)(shared + PARTIAL);
#pragma unroll
        for (int i = 0; i < OWNED; i++) {
            const u32 group = (thread + i * S::THREADS) / S::D, channel = (thread + i * S::THREADS) % S::D;
            u32 least = element(shared, group * PARTS, 0, channel), greatest = element(shared, group * PARTS, 1, channel);
#pragma unroll
            for (int part = 1; part < PARTS; part++) {
                least = Element::least(least, element(shared, group * PARTS + part, 0, channel));
                greatest = Element::greatest(greatest, element(shared, group * PARTS + part, 1, channel));
            }
            const Asymmetric g = asymmetric<Q>(Element::low(least), Element::low(greatest));
            u8* const parameters = tile.region(CODES, PARAMETERS) + (tile.index * GROUPS + group) * (4 * S::D) + 2 * channel;
            store2(parameters, g.scale_bits);
            store2(parameters + 2 * S::D, g.minimum_bits);
            if (g.is_void) count(tile.void_groups, 1);
            to_shared<float>((u8*)(minima + group * 4 * HALF + place(channel)), g.minimum);
            to_shared<float>((u8*)(minima + group * 4 * HALF + 2 * HALF + place(channel)), g.inverse);
            needs_clamp |= g.needs_clamp;
        }
        if (block_barrier_any(needs_clamp))
            store_codes<true>(tile, c, minima);
        else
            store_codes<false>(tile, c, minima);
    }

    // A word whose low element is the least (0) or greatest (1) of some rows.
    static KV_INLINE u32 element(const u8* shared, u32 rows, u32 which, u32 channel) {
        const u8* const p = shared + ((rows * 2 + which) * S::D + channel) * Element::BYTES;
        if constexpr (Element::BYTES == 4)
            return from_shared<u32>(p);
        else
            return from_shared<u16>(p);
    }

    template <bool CLAMP> static KV_INLINE void store_codes(const Tile& tile, const Chunk<Element> (&c)[ROWS], const float* minima) {
        const u32 thread = thread_index(), chunk = thread % LANES, rows = thread / LANES;
        minima += rows / PARTS * 4 * HALF + chunk * 4;
        vec16 minimum[2], inverse[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            minimum[i] = from_shared<vec16>((const u8*)(minima + i * HALF));
            inverse[i] = from_shared<vec16>((const u8*)(minima + (2 + i) * HALF));
        }
        u8* const codes = tile.region(0, CODES) + (tile.index * TILE / ROWS + rows) * WORDS * (2 * S::D) + chunk * 16;
#pragma unroll
        for (int word = 0; word < WORDS; word++) {
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 q[32 / BITS];
#pragma unroll
                for (int n = 0; n < 32 / BITS; n++) {
                    const int channel = 2 * j + n % 2, row = word * (16 / BITS) + n / 2;
                    q[n] = asymmetric_code<Q, CLAMP>(c[row].get(channel), float_of(minimum[channel / 4].w[channel % 4]),
                                                     float_of(inverse[channel / 4].w[channel % 4]));
                }
                words[j] = pack<BITS>(q);
            }
            store_words<S::ALIGN>(codes + word * (2 * S::D), words);
        }
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8*) {
        const u32 thread = thread_index(), chunk = thread % LANES, rows = thread / LANES;
        const u8* const codes = tile.region(0, CODES) + (tile.index * TILE / ROWS + rows) * WORDS * (2 * S::D) + chunk * 16;
        const u8* const parameters = tile.region(CODES, PARAMETERS) + (tile.index * GROUPS + rows / PARTS) * (4 * S::D) + chunk * 16;
        u32 words[WORDS][4], scales[4], minima[4];
#pragma unroll
        for (int word = 0; word < WORDS; word++) load_words<S::ALIGN>(codes + word * (2 * S::D), words[word]);
        load_words<S::ALIGN>(parameters, scales);
        load_words<S::ALIGN>(parameters + 2 * S::D, minima);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            const int at = row % (16 / BITS) * 2 * BITS;
            Chunk<Element> c;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 word = words[row / (16 / BITS)][j];
                c.set_pair(2 * j,
                           asymmetric_value(code_at<BITS>(word, at), half_to_float((u16)scales[j]), half_to_float((u16)minima[j])),
                           asymmetric_value(code_at<BITS>(word, at + BITS), half_to_float((u16)(scales[j] >> 16)), half_to_float((u16)(minima[j] >> 16))));
            }
            store_chunk<Element>(address(s, tile, row), c);
        }
    }
};
