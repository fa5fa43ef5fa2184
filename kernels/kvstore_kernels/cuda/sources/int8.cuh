// int8: a scale for each token of a plane. Codes [L, H, T, D], scales [L, H, T].

template <class Element, class S> struct Int8 {
    using Data = Segments<Element, S>;
    static constexpr u32 CODES = S::T * S::D, SCALES = 2 * S::T;
    static constexpr u32 A_TOKEN = S::D / 64;               // segments
    static constexpr u32 TOKENS = S::THREADS / A_TOKEN;     // of a tile
    static constexpr u32 SCALED = TOKENS * 8 * A_TOKEN * Element::BYTES;  // bytes of greatest magnitudes in shared memory
    static_assert(S::THREADS % A_TOKEN == 0, "a tile has whole tokens");

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const u32 thread = thread_index(), lane = thread & 31u, local = (thread & ~31u) + lane / 8;
        Chunk<Element> c[CHUNKS];
        Data::load(s, tile, c);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            u32 magnitudes[Chunk<Element>::WORDS];
            for (int j = 0; j < Chunk<Element>::WORDS; j++) magnitudes[j] = Element::magnitude(c[i].w[j]);
            u32 most = greatest_word<Element>(magnitudes);
            if constexpr (Element::BYTES == 2) {
                most = Element::greatest(most, most >> 16);
                to_shared<u16>(shared + ((local + 4 * i) * 8 + lane % 8) * 2, (u16)most);
            } else {
                to_shared<u32>(shared + ((local + 4 * i) * 8 + lane % 8) * 4, most);
            }
        }
        block_barrier();
        const u32 token = tile.index * TOKENS + thread;
        if (thread < TOKENS && token < S::T) {
            u32 most = 0;
#pragma unroll
            for (int v = 0; v < A_TOKEN * Element::BYTES / 2; v++) {
                const vec16 part = from_shared<vec16>(shared + (thread * (A_TOKEN * Element::BYTES / 2) + v) * 16);
                most = Element::greatest(most, greatest_word<Element>(part.w));
            }
            const Symmetric g = symmetric<127>(greatest_of_word<Element>(most));
            store2(tile.region(CODES, SCALES) + 2 * token, g.scale_bits);
            if (g.scale_bits == 0) count(tile.void_groups, 1);
            to_shared<float>(shared + SCALED + 4 * thread, g.inverse);
        }
        block_barrier();
        u8* const codes = tile.region(0, CODES) + Data::mine(tile) * 64 + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (!Data::exists(Data::mine(tile) + 4 * i)) continue;
            const float inverse = from_shared<float>(shared + SCALED + 4 * ((local + 4 * i) / A_TOKEN));
            const u32 mask = inverse == 0.0f ? 0u : 0xffffffffu;  // a void group's quotients may be NaN
            u32 words[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 q[4];
                for (int e = 0; e < 4; e++) q[e] = bits_of(add(multiply(c[i].get(4 * j + e), inverse), MAGIC));
                words[j] = pick_bytes(pick_bytes(q[0], q[1], 0x0040), pick_bytes(q[2], q[3], 0x0040), 0x5410) & mask;
            }
            store_words<S::ALIGN>(codes + 256 * i, words);
        }
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8*) {
        const u32 lane = thread_index() & 31u;
        const u8* const codes = tile.region(0, CODES) + Data::mine(tile) * 64 + lane % 8 * 8;
        const u8* const scales = tile.region(CODES, SCALES) + Data::mine(tile) / A_TOKEN * 2;
        Chunk<Element> c[CHUNKS];
        u32 words[CHUNKS][2], scale_bits[CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            words[i][0] = words[i][1] = scale_bits[i] = 0;
            if (!Data::exists(Data::mine(tile) + 4 * i)) continue;
            load_words<S::ALIGN>(codes + 256 * i, words[i]);
            if constexpr (4 % A_TOKEN == 0)
                scale_bits[i] = load2(scales + 4 * i / A_TOKEN * 2);
            else
                scale_bits[i] = load2(tile.region(CODES, SCALES) + (Data::mine(tile) + 4 * i) / A_TOKEN * 2);
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const float scale = half_to_float((u16)scale_bits[i]);
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const u32 shifted = words[i][e / 4] ^ 0x80808080u;  // code + 128 in each byte
                const float first = float_of(pick_bytes(shifted, 0x4B000000u, 0x7650 | e % 4));
                const float second = float_of(pick_bytes(shifted, 0x4B000000u, 0x7650 | (e % 4 + 1)));
                c[i].set_pair(e, multiply(subtract(first, 8388736.0f), scale), multiply(subtract(second, 8388736.0f), scale));
            }
        }
        Data::store(s, tile, c);
    }
};
