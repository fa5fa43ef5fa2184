// Planes stored as they are: codec raw, and the rotary planes of every other.
//
// UNIT bytes (16, 8, 4, 2 or 1) are what all addresses and strides are multiples of; ROW those of a token of a plane.

template <class S, int ROW, int UNIT> struct Exact {
    static constexpr u32 UNITS = S::T * (ROW / UNIT);
    static constexpr int EACH = 8;

    template <bool TO_SECTION> static KV_INLINE void copy(const Section& s, const Tile& tile) {
        u8* const stored = tile.section + tile.layer * s.layer_offset + tile.head * s.head_offset;
        const u32 first = tile.index * (S::THREADS * EACH) + thread_index();
        u8 *from[EACH], *to[EACH];
        u32 words[EACH][4];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const u32 unit = first + i * S::THREADS, token = unit / (ROW / UNIT), at = unit % (ROW / UNIT) * UNIT;
            if (unit >= UNITS) continue;
            u8* const paged = token_address<S::PAGE>(s, tile, token) + at;
            u8* const whole = stored + token * s.token_offset + at;
            from[i] = TO_SECTION ? paged : whole;
            to[i] = TO_SECTION ? whole : paged;
            load(from[i], words[i]);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (first + i * S::THREADS < UNITS) store(to[i], words[i]);
    }
    static KV_INLINE void load(const u8* p, u32 (&w)[4]) {
        if constexpr (UNIT == 16) {
            const vec16 v = load16(p);
            for (int i = 0; i < 4; i++) w[i] = v.w[i];
        } else if constexpr (UNIT == 8) {
            const vec8 v = load8(p);
            w[0] = v.w[0];
            w[1] = v.w[1];
        } else {
            w[0] = UNIT == 4 ? load4(p) : UNIT == 2 ? load2(p) : load1(p);
        }
    }
    static KV_INLINE void store(u8* p, const u32 (&w)[4]) {
        if constexpr (UNIT == 16)
            store16(p, vec16{{w[0], w[1], w[2], w[3]}});
        else if constexpr (UNIT == 8)
            store8(p, vec8{{w[0], w[1]}});
        else if constexpr (UNIT == 4)
            store4(p, w[0]);
        else if constexpr (UNIT == 2)
            store2(p, w[0]);
        else
            store1(p, w[0]);
    }

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8*) { copy<true>(s, tile); }
    static KV_INLINE void decode(const Section& s, const Tile& tile, u8*) { copy<false>(s, tile); }
};
