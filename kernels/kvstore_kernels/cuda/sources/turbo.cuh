// turbo4, turbo3, turbo2: vectors of B channels, rotated, on Lloyd-Max levels.
// Codes [L, H, R, 2, 16] u16 (4 bits) or [L, H, R, 16] u16; at 3 bits signs [L, H, R, 16] u8; scales [L, H, V].
//
// Two lanes have a row of 128 elements: each has, of all j, elements 16j + 8 * half + e. Distances 1, 2, 4 and 16 on are
// between registers of a thread, distance 8 is between the two lanes.

// Signs that flip: word w of entry 2j + half covers elements 16j + 8 * half + 2w and the next, at bits 15 and 31.
KV_TABLE vec16 FLIPS[16] = {
KV_FLIPS
};

// Tables that the lanes of a warp hold, one word each (in Python: tables.py).
// CELLS: for y in [-8192, 8192), cut into 31 cells of which none has two borders: what carries into bit 16 of the sum with
// MAGIC_BITS + y. The upper half is then the number of borders at or below y: the code, counted from the lowest level.
// LEVELS: the level of such a code, with its sign, as an integer. VALUES: a stored code's level / 2048, as float32.
KV_TABLE u32 CELLS[3][32] = {KV_CELLS};
KV_TABLE u32 LEVELS[3][32] = {KV_LEVELS};
KV_TABLE u32 VALUES[3][32] = {KV_VALUES};

template <class Element, class S, int BITS> struct Turbo {
    using Data = Segments<Element, S>;
    static constexpr int B = S::D % 128 == 0 ? 128 : 64;
    static constexpr u32 VECTORS = 128 / B;  // of a row
    static constexpr u32 ROWS = S::SEGMENTS / 2;
    static constexpr u32 CODES = ROWS * (BITS == 4 ? 64 : 32), SIGNS = BITS == 3 ? ROWS * 16 : 0, SCALES = ROWS * VECTORS * 2;
    static constexpr float DECODED = B == 128 ? 0x1.6a09e6p-4f : 0.125f;  // fl(1 / sqrt(B))
    static constexpr float ENCODED = B == 128 ? 0x1.6a09e6p+25f : 0x1p+25f;  // fl(sqrt(B) * 2^22)
    static constexpr u32 SECTION = CODES + SIGNS + SCALES;  // bytes a plane
    static_assert(S::SEGMENTS % 2 == 0, "a plane has whole rows");

    // This thread's row in the plane.
    static KV_INLINE u32 own_row(const Tile& tile) { return (Data::first(tile) + Data::template own<true>(0)) / 2; }

    // The butterfly over x[4 * which + k][e]: element 64 * which + 16k + 8 * half + e of the row.
    static KV_INLINE void butterfly(float (&x)[8][8]) {
#pragma unroll
        for (int distance = 1; distance < 8; distance *= 2)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (!(e & distance)) cross(x[j][e], x[j][e + distance]);
        const float own = thread_index() & 1u ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 8; e++) x[j][e] = fused(x[j][e], own, float_of(from_lane_across(bits_of(x[j][e]), 1)));
#pragma unroll
        for (int distance = 1; distance < B / 16; distance *= 2)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 8; e++)
                    if (!(j & distance)) cross(x[j][e], x[j + distance][e]);
    }
    static KV_INLINE void cross(float& a, float& b) {
        const float sum = add(a, b);
        b = subtract(a, b);
        a = sum;
    }
    static KV_INLINE void flip(Chunk<Element>& c, int j) {
        const vec16 flips = vector_of_table(FLIPS, 2 * j % (B / 8) + (thread_index() & 1u));
#pragma unroll
        for (int i = 0; i < Chunk<Element>::WORDS; i++) {
            if constexpr (Element::BYTES == 4)
                c.w[i] ^= (i % 2 ? flips.w[i / 2] : flips.w[i / 2] << 16) & 0x80000000u;
            else
                c.w[i] ^= flips.w[i];
        }
    }

    // Sums of squares of the row's vectors, in both lanes. Squares of two-byte elements are EXACT.
    template <bool EXACT> static KV_INLINE void sum_squares(const float (&x)[8][8], float (&sums)[VECTORS]) {
        SquareSums r;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int j = SquareSums::order(n);
            float pairs[4];
#pragma unroll
            for (int l = 0; l < 4; l++) {
                const float first = x[j][2 * l], second = x[j][2 * l + 1];
                if constexpr (EXACT)
                    pairs[l] = fused(second, second, multiply(first, first));
                else
                    pairs[l] = add(multiply(first, first), multiply(second, second));
            }
            r.take(n, pairs);
        }
        r.finish(sums);
    }
    // The same from sums of two squares, those of x[j] for j in this order: then few of them wait for others.
    struct SquareSums {
        static constexpr int STEPS = B / 16;
        float waiting[VECTORS][4][4];  // of 1, 2, 4, 8 of a vector's j

        static KV_INLINE constexpr int order(int n) {
            const int at = n % STEPS, reversed = STEPS == 8 ? at % 2 * 4 + at / 2 % 2 * 2 + at / 4 : at % 2 * 2 + at / 2;
            return n - at + reversed;
        }
        KV_INLINE void take(int n, float (&pairs)[4]) {
            float(&w)[4][4] = waiting[n / STEPS];
            int level = 0;
#pragma unroll
            for (; n % STEPS >> level & 1; level++)
#pragma unroll
                for (int l = 0; l < 4; l++) pairs[l] = add(w[level][l], pairs[l]);
#pragma unroll
            for (int l = 0; l < 4; l++) w[level][l] = pairs[l];
        }
        KV_INLINE void finish(float (&sums)[VECTORS]) {
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                float(&w)[4] = waiting[v][STEPS == 8 ? 3 : 2];
#pragma unroll
                for (int l = 0; l < 4; l++) w[l] = add(w[l], float_of(from_lane_across(bits_of(w[l]), 1)));
                sums[v] = add(add(w[0], w[2]), add(w[1], w[3]));
            }
        }
    };

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const Tables tables = tables_of_lane();
        Chunk<Element> c[CHUNKS];
        Data::load(s, tile, c);
        Data::template to_halves<true>(shared, c);
        float x[8][8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            flip(c[j], j);
            for (int e = 0; e < 8; e++) x[j][e] = c[j].get(e);
        }
        float sums[VECTORS];
        sum_squares<Element::BYTES == 2>(x, sums);
        const u32 flags[VECTORS] = {};
        encode_row<true>(tile, tables, x, sums, flags);
    }

    // CELLS and LEVELS of this lane, loaded before they are needed.
    struct Tables { u32 cells, levels; };
    static KV_INLINE Tables tables_of_lane() {
        const u32 lane = thread_index() & 31u;
        return {word_of_table(CELLS[4 - BITS], lane), word_of_table(LEVELS[4 - BITS], lane)};
    }

    // Codes and scales of a row whose signs are flipped, from it and the sums of its squares. Flags are bits to be set in
    // the scales; void vectors are counted if COUNTED.
    template <bool COUNTED>
    static KV_INLINE void encode_row(const Tile& tile, const Tables& tables, float (&x)[8][8], const float (&sums)[VECTORS],
                                     const u32 (&flags)[VECTORS]) {
        const u32 half = thread_index() & 1u, row = own_row(tile), cells = tables.cells, levels = tables.levels;
        float roots[VECTORS];
        butterfly(x);
        u32 codes[4][8], masks[VECTORS];  // codes[i][j]: codes 2i and 2i + 1 of x[j], in the two halves of a word
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const bool is_void = !(sums[v] <= 0x1p26f), empty = is_void || sums[v] < 0x1p-40f;
            roots[v] = square_root(empty ? 1.0f : sums[v]);
            const float factor = divide(2048.0f, roots[v]);
            masks[v] = empty ? 0u : 0xffffffffu;
            u32 dot = 0, all_levels = 0;
#pragma unroll
            for (int j = B / 16 * v; j < B / 16 * (v + 1); j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 first = code(x[j][2 * i], factor, cells), second = code(x[j][2 * i + 1], factor, cells);
                    codes[i][j] = pick_bytes(first, second, 0x7632);
                    const u32 level = from_lane(levels, codes[i][j]), next = from_lane(levels, codes[i][j] >> 16);
                    dot += rounded(x[j][2 * i], factor) * level + rounded(x[j][2 * i + 1], factor) * next;
                    all_levels += level + next;
                }
            dot -= MAGIC_BITS * all_levels;  // sums wrap; the last one is below 2^31
            dot += from_lane_across(dot, 1);
            const u32 scale = float_to_half(divide(multiply(roots[v], ENCODED), int_to_float((i32)dot)));
            if (half == 0 && row < ROWS) {
                store2(tile.region(CODES + SIGNS, SCALES) + 2 * (row * VECTORS + v), (scale & masks[v]) | flags[v]);
                if (COUNTED && is_void) count(tile.void_groups, 1);
            }
        }
        if (row < ROWS) store_codes(tile, row, codes, masks);
    }

    // MAGIC_BITS + y, y the rounded quotient.
    static KV_INLINE u32 rounded(float x, float factor) { return bits_of(add(multiply(x, factor), MAGIC)); }
    // The code of y in the upper half.
    static KV_INLINE u32 code(float x, float factor, u32 cells) {
        const u32 y = rounded(x, factor);
        const float place = fused_unit(float_of(y), 0x1p-14f, 0.5f - 768.0f);  // (y + 8192) / 16384, exact
        const u32 cell = bits_of(fused_down(place, 31.0f, MAGIC));
        return y + from_lane(cells, cell);
    }

    // Codes counted from the lowest level, in FIELD bits of which the highest says that the level is positive, to sign and
    // magnitude: negative ones are counted the other way round.
    template <int FIELD> static KV_INLINE u32 sign_and_magnitude(u32 codes, u32 top) {
        const u32 negative = ~codes & top;
        return codes ^ top ^ (negative - (negative >> (FIELD - 1)));
    }

    static KV_INLINE void store_codes(const Tile& tile, u32 row, const u32 (&codes)[4][8], const u32 (&masks)[VECTORS]) {
        const u32 half = thread_index() & 1u;
        u8* const at = tile.region(0, CODES) + row * (CODES / ROWS) + half * 16;
        u32 words[2][4];  // of elements of either segment, four bits each
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 word = codes[i][4 * which + 3];
#pragma unroll
                for (int k = 2; k >= 0; k--) word = (word << (BITS == 2 ? 2 : 4)) + codes[i][4 * which + k];
                words[which][i] = word;
            }
        if constexpr (BITS == 4) {
#pragma unroll
            for (int which = 0; which < 2; which++) {
                for (int i = 0; i < 4; i++)
                    words[which][i] = sign_and_magnitude<4>(words[which][i], 0x88888888u) & masks[which % VECTORS];
                store_words<S::ALIGN>(at + 32 * which, words[which]);
            }
        } else if constexpr (BITS == 2) {
            u32 joined[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 low = sign_and_magnitude<2>(words[0][i], 0x00aa00aau) & masks[0] & 0x00ff00ffu;
                const u32 high = sign_and_magnitude<2>(words[1][i], 0x00aa00aau) & masks[1 % VECTORS] & 0x00ff00ffu;
                joined[i] = low | high << 8;
            }
            store_words<S::ALIGN>(at, joined);
        } else {
            u32 joined[4], signs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                joined[i] = signs[i] = 0;
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    const u32 word = sign_and_magnitude<3>(words[which][i], 0x44444444u) & masks[which % VECTORS];
                    u32 levels = word & 0x33333333u, negative = word >> 2 & 0x11111111u;
                    levels = (levels | levels >> 2) & 0x0f0f0f0fu;
                    levels = (levels | levels >> 4) & 0x00ff00ffu;
                    negative = (negative | negative >> 3) & 0x03030303u;
                    negative = (negative | negative >> 6) & 0x000f000fu;
                    joined[i] |= levels << 8 * which;
                    signs[i] |= negative << 4 * which;
                }
            }
            store_words<S::ALIGN>(at, joined);
            const u32 bytes[2] = {pick_bytes(signs[0], signs[1], 0x6420), pick_bytes(signs[2], signs[3], 0x6420)};
            store_words<S::ALIGN>(tile.region(CODES, SIGNS) + row * 16 + half * 8, bytes);
        }
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8* shared) {
        u32 scales[VECTORS] = {};
        float x[8][8];
        decode_row(tile, x, scales);
        Chunk<Element> c[CHUNKS];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float factor = multiply(half_to_float((u16)scales[j / (B / 16)]), DECODED);
#pragma unroll
            for (int e = 0; e < 8; e += 2) c[j].set_pair(e, multiply(x[j][e], factor), multiply(x[j][e + 1], factor));
            flip(c[j], j);
        }
        Data::template from_halves<true>(shared, c);
        Data::store(s, tile, c);
    }

    // A row's levels, turned back, whose signs are flipped still; and the scales of its vectors, if it exists.
    static KV_INLINE void decode_row(const Tile& tile, float (&x)[8][8], u32 (&scales)[VECTORS]) {
        const u32 lane = thread_index() & 31u, half = lane & 1u, row = own_row(tile);
        const u32 values = word_of_table(VALUES[4 - BITS], lane);
        u32 words[2][4] = {}, signs[2] = {};
        if (row < ROWS) {
            const u8* const at = tile.region(0, CODES) + row * (CODES / ROWS) + half * 16;
            load_words<S::ALIGN>(at, words[0]);
            if constexpr (BITS == 4) load_words<S::ALIGN>(at + 32, words[1]);
            if constexpr (BITS == 3) load_words<S::ALIGN>(tile.region(CODES, SIGNS) + row * 16 + half * 8, signs);
            for (int v = 0; v < VECTORS; v++) scales[v] = load2(tile.region(CODES + SIGNS, SCALES) + 2 * (row * VECTORS + v));
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 8; e++) x[j][e] = float_of(stored_value(values, words, signs, j, e));
        butterfly(x);
    }

    // Lanes hold the values of the codes; what a word has above a code's bits selects among equal ones.
    static KV_INLINE u32 stored_value(u32 values, const u32 (&words)[2][4], const u32 (&signs)[2], int j, int e) {
        if constexpr (BITS == 4) {
            return from_lane(values, words[j / 4][e / 2] >> (16 * (e % 2) + 4 * (j % 4)));
        } else {
            const u32 value = from_lane(values, words[0][e / 2] >> (16 * (e % 2) + 2 * j));
            if constexpr (BITS == 2) return value;
            return value ^ (signs[e / 4] << (31 - (8 * (e % 4) + j)) & 0x80000000u);
        }
    }
};
