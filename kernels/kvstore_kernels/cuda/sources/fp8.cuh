// fp8 (E4M3): a scale for 64 tokens of a plane. Codes [L, H, T, D], scales [L, H, ceil(T / 64)].

template <class Element, class S> struct Fp8 {
    using Data = Segments<Element, S>;
    static constexpr u32 CODES = S::T * S::D, SCALES = 2 * ((S::T + 63) / 64);
    static constexpr u32 WARPS = S::THREADS / 32;
    static_assert(S::THREADS == S::D || S::THREADS >= S::SEGMENTS, "a tile is a group");

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const u32 thread = thread_index(), lane = thread & 31u;
        Chunk<Element> c[CHUNKS];
        Data::load(s, tile, c);
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            for (int j = 0; j < Chunk<Element>::WORDS; j++) most = Element::greatest(most, Element::magnitude(c[i].w[j]));
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) most = Element::greatest(most, from_lane_across(most, bit));
        if (lane == 0) to_shared<u32>(shared + 4 * (thread / 32), most);
        block_barrier();
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) most = Element::greatest(most, from_shared<u32>(shared + 4 * warp));
        const Symmetric g = symmetric<448>(greatest_of_word<Element>(most));
        if (thread == 0) {
            store2(tile.region(CODES, SCALES) + 2 * tile.index, g.scale_bits);
            if (g.scale_bits == 0) count(tile.void_groups, 1);
        }
        const u32 mask = g.scale_bits == 0 ? 0u : 0xffffffffu;  // a void group's quotients may be NaN
        u8* const codes = tile.region(0, CODES) + Data::mine(tile) * 64 + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (!Data::exists(Data::mine(tile) + 4 * i)) continue;
            u32 words[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float q[4];
                for (int e = 0; e < 4; e++) q[e] = multiply(c[i].get(4 * j + e), g.inverse);
                words[j] = (e4m3_pair(q[0], q[1]) | e4m3_pair(q[2], q[3]) << 16) & mask;
            }
            store_words<S::ALIGN>(codes + 256 * i, words);
        }
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8*) {
        const u32 lane = thread_index() & 31u;
        const u8* const codes = tile.region(0, CODES) + Data::mine(tile) * 64 + lane % 8 * 8;
        // 256 times the scale, exactly: the numbers come as 1/256 of what they are.
        const float scale = multiply(half_to_float((u16)load2(tile.region(CODES, SCALES) + 2 * tile.index)), 256.0f);
        Chunk<Element> c[CHUNKS];
        u32 words[CHUNKS][2];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            words[i][0] = words[i][1] = 0;
            if (Data::exists(Data::mine(tile) + 4 * i)) load_words<S::ALIGN>(codes + 256 * i, words[i]);
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const u32 halves = e4m3_to_halves(pick_bytes(words[i][e / 4], 0, e % 4 ? 0x3424 : 0x1404));
                c[i].set_pair(e, multiply(half_to_float((u16)halves), scale), multiply(half_to_float((u16)(halves >> 16)), scale));
            }
        Data::store(s, tile, c);
    }
};
