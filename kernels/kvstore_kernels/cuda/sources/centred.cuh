// The keys of centred4, centred3, centred2: vectors less the mean of their group of tokens, channels scaled, as turbo's.
// Turbo's regions; then mean scales [L, H, N] f16, mean codes and exponents [L, H, N, D] i8, of N groups of G tokens.
//
// Encoding goes over a group three times: for its means; for which vectors are centred, and its channels' strengths; for
// the codes. A group of one strip stays in registers between them, one of more is loaded for each.

// fl(2^(k/2)) as bits.
KV_INLINE u32 half_octaves(i32 k) { return (k & 1 ? 0x3FB504F3u : 0x3F800000u) + ((u32)(k >> 1) << 23); }
KV_INLINE i32 bounded(i32 k) { return k < -20 ? -20 : k > 20 ? 20 : k; }
KV_INLINE i32 signed_byte(u32 word) { return (i32)(word << 24) >> 24; }

template <class Element, class S, int BITS> struct CentredKeys : Columns<Element, S> {
    using Group = Columns<Element, S>;
    using Data = Segments<Element, S>;
    using Codes = Turbo<Element, S, BITS>;
    using Group::COLUMNS, Group::STRIPS, Group::WARPS, Group::OWNED, Group::PARAMETERS, Group::SQUARES;
    using Group::column_of, Group::get_parameters, Group::parameter, Group::place_of_pair, Group::put_squares, Group::strip_of;
    static constexpr u32 VECTORS = Codes::VECTORS, STEPS = 8 / VECTORS;  // of a row; chunks of a vector
    static constexpr u32 SCALES = 2 * Group::GROUPS, CHANNELS = Group::GROUPS * S::D;  // bytes a plane: scales; codes or exponents

    // Where this lane's two channels of a column are in a region with a byte a channel.
    static KV_INLINE u8* bytes_of_pair(const Tile& tile, u32 before, u32 column) {
        return tile.region(Codes::SECTION + SCALES + before, CHANNELS) + tile.index * S::D + column * 64 + (thread_index() & 31u) * 2;
    }

    // Means of a group from sums of its channels: their codes and scale are stored, what they decode to is put in `means`.
    // Greatest numbers of columns need four bytes each behind `means`.
    static KV_INLINE void store_means(const Tile& tile, float (&sums)[OWNED][2], u8* means, u8* greatest) {
        float most = 0.0f;
#pragma unroll
        for (u32 i = 0; i < OWNED; i++)
            for (int n = 0; n < 2; n++) {
                sums[i][n] = multiply(sums[i][n], 1.0f / Group::G);
                most = maximum(most, float_of(bits_of(sums[i][n]) & 0x7fffffffu));
            }
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) most = maximum(most, float_of(from_lane_across(bits_of(most), bit)));
        if constexpr (COLUMNS > 1) {
            constexpr u32 USED = COLUMNS < WARPS ? COLUMNS : WARPS;
            if (thread_index() % 32 == 0 && thread_index() / 32 < USED) to_shared<float>(greatest + thread_index() / 32 * 4, most);
            block_barrier();
#pragma unroll
            for (u32 warp = 0; warp < USED; warp++) most = maximum(most, from_shared<float>(greatest + warp * 4));
        }
        const Symmetric g = symmetric<127>(most);
        const float scale = half_to_float((u16)g.scale_bits);
        if (thread_index() == 0) store2(tile.region(Codes::SECTION, SCALES) + 2 * tile.index, g.scale_bits);
#pragma unroll
        for (u32 i = 0; i < OWNED; i++) {
            if (column_of(i) >= COLUMNS) continue;
            float codes[2];
            for (int n = 0; n < 2; n++) codes[n] = add(multiply(sums[i][n], g.inverse), MAGIC);
            store2(bytes_of_pair(tile, 0, column_of(i)), pick_bytes(bits_of(codes[0]), bits_of(codes[1]), 0x0040));
            vec8 v;
            for (int n = 0; n < 2; n++) v.w[n] = bits_of(multiply(subtract(codes[n], MAGIC), scale));
            to_shared<vec8>(means + place_of_pair(column_of(i)), v);
        }
    }

    // Exponents of a group from its strengths are stored; the factors of its channels, with turbo's signs, put in `factors`.
    static KV_INLINE void store_exponents(const Tile& tile, const float (&sums)[OWNED][2], u8* factors) {
#pragma unroll
        for (u32 i = 0; i < OWNED; i++) {
            if (column_of(i) >= COLUMNS) continue;
            i32 k[2];
            for (int n = 0; n < 2; n++) k[n] = bounded(((i32)(bits_of(sums[i][n]) >> 23) - 127 + 1) >> 1);
            store2(bytes_of_pair(tile, CHANNELS, column_of(i)), pick_bytes((u32)k[0], (u32)k[1], 0x0040));
            put_factors(factors, column_of(i), -k[0], -k[1]);
        }
    }
    static KV_INLINE void put_factors(u8* factors, u32 column, i32 first, i32 second) {
        const u32 flips = word_of_table((const u32*)FLIPS, (column * 32 + (thread_index() & 31u)) % (Codes::B / 2));
        const vec8 v = {{half_octaves(first) ^ (flips << 16 & 0x80000000u), half_octaves(second) ^ (flips & 0x80000000u)}};
        to_shared<vec8>(factors + place_of_pair(column), v);
    }

    // A strip's chunks in halves, and the sums of squares of its vectors.
    static KV_INLINE void load(const Section& s, const Tile& tile, u8* shared, Chunk<Element> (&c)[CHUNKS], float (&sums)[VECTORS]) {
        Data::load(s, tile, c);
        Data::template to_halves<true>(shared, c);
        float x[8][8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            for (int e = 0; e < 8; e++) x[j][e] = c[j].get(e);
        Codes::template sum_squares<Element::BYTES == 2>(x, sums);
    }
    static KV_INLINE void clear(Chunk<Element>& c) {
        for (int i = 0; i < Chunk<Element>::WORDS; i++) c.w[i] = 0;
    }

    // A vector of which bits are set is far, or void.
    static KV_INLINE u32 bit_of(u32 strip, u32 vector) { return 1u << (strip * VECTORS + vector); }

    static KV_INLINE void encode(const Section& s, const Tile& tile, u8* shared) {
        const typename Codes::Tables tables = Codes::tables_of_lane();
        u8 *const means = shared + SQUARES, *const factors = means + PARAMETERS, *const greatest = factors + PARAMETERS;
        Chunk<Element> c[CHUNKS];
        float x[8][8], squares[VECTORS], channels[OWNED][2] = {}, strengths[OWNED][2] = {};
        u32 voids = 0, fars = 0;

#pragma unroll 1
        for (u32 n = 0; n < STRIPS; n++) {
            load(s, strip_of(tile, n), shared, c, squares);
#pragma unroll
            for (u32 v = 0; v < VECTORS; v++) {
                if (squares[v] <= 0x1p26f) continue;
                voids |= bit_of(n, v);
                if (!(thread_index() & 1u)) count(tile.void_groups, 1);
#pragma unroll
                for (int j = 0; j < CHUNKS; j++)
                    if (j / STEPS == v)
                        Data::put(shared + thread_index() / 32 * Data::WARP_BYTES + Data::template place_in_halves<true>(j), {});
            }
            block_barrier();
            Group::template add_columns<false>(shared, channels);
            if (STRIPS > 1) block_barrier();
        }
        store_means(tile, channels, means, greatest);
        block_barrier();

#pragma unroll 1
        for (u32 n = 0; n < STRIPS; n++) {
            if constexpr (STRIPS > 1) {
                load(s, strip_of(tile, n), shared, c, squares);
                block_barrier();
            }
            typename Codes::SquareSums sums;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int j = Codes::SquareSums::order(i);
                float own[8], pairs[4];
                centre(c[j], j, means, x[j]);
                for (int e = 0; e < 8; e++) own[e] = multiply(x[j][e], x[j][e]);
                put_squares(shared, j, own);
                for (int l = 0; l < 4; l++) pairs[l] = add(own[2 * l], own[2 * l + 1]);
                sums.take(i, pairs);
            }
            float centred[VECTORS];
            sums.finish(centred);
#pragma unroll
            for (u32 v = 0; v < VECTORS; v++) {
                if (!(squares[v] < centred[v]) && !(voids & bit_of(n, v))) continue;
                fars |= bit_of(n, v);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (j / STEPS != v) continue;
                    float own[8];
                    Chunk<Element> again = Data::template load_of_halves<true>(s, strip_of(tile, n), j);
                    if (voids & bit_of(n, v)) clear(again);
                    for (int e = 0; e < 8; e++) {
                        x[j][e] = again.get(e);
                        own[e] = multiply(x[j][e], x[j][e]);
                    }
                    put_squares(shared, j, own);
                }
            }
            block_barrier();
            Group::template add_columns<true>(shared, strengths);
            if (STRIPS > 1) block_barrier();
        }
        store_exponents(tile, strengths, factors);
        block_barrier();

#pragma unroll 1
        for (u32 n = 0; n < STRIPS; n++) {
            if constexpr (STRIPS > 1) {
                load(s, strip_of(tile, n), shared, c, squares);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    if (voids & bit_of(n, j / STEPS)) clear(c[j]);
                    if (fars & bit_of(n, j / STEPS))
                        for (int e = 0; e < 8; e++) x[j][e] = c[j].get(e);
                    else
                        centre(c[j], j, means, x[j]);
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                vec16 factor[2];
                get_parameters(factors, j, factor);
                for (int e = 0; e < 8; e++) x[j][e] = multiply(x[j][e], parameter(factor, e));
            }
            Codes::template sum_squares<false>(x, squares);
            u32 signs[VECTORS];
            for (u32 v = 0; v < VECTORS; v++) signs[v] = fars & bit_of(n, v) ? 0x8000u : 0u;
            Codes::template encode_row<false>(strip_of(tile, n), tables, x, squares, signs);
            if (STRIPS > 1) warp_barrier();
        }
    }
    static KV_INLINE void centre(const Chunk<Element>& c, int j, const u8* means, float (&x)[8]) {
        vec16 mean[2];
        get_parameters(means, j, mean);
        for (int e = 0; e < 8; e++) x[e] = subtract(c.get(e), parameter(mean, e));
    }

    static KV_INLINE void decode(const Section& s, const Tile& tile, u8* shared) {
        u8 *const means = shared + S::THREADS * 64 * Element::BYTES, *const factors = means + PARAMETERS;
        const float scale = half_to_float((u16)load2(tile.region(Codes::SECTION, SCALES) + 2 * tile.index));
#pragma unroll
        for (u32 i = 0; i < OWNED; i++) {
            const u32 column = column_of(i);
            if (column >= COLUMNS) continue;
            const u32 codes = load2(bytes_of_pair(tile, 0, column)), exponents = load2(bytes_of_pair(tile, CHANNELS, column));
            vec8 v;
            for (int n = 0; n < 2; n++) v.w[n] = bits_of(multiply(int_to_float(signed_byte(codes >> 8 * n)), scale));
            to_shared<vec8>(means + place_of_pair(column), v);
            put_factors(factors, column, bounded(signed_byte(exponents)), bounded(signed_byte(exponents >> 8)));
        }
        block_barrier();
#pragma unroll 1
        for (u32 n = 0; n < STRIPS; n++) {
            const Tile strip = strip_of(tile, n);
            u32 scales[VECTORS] = {};
            float x[8][8];
            Codes::decode_row(strip, x, scales);
            Chunk<Element> c[CHUNKS];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 scale_bits = scales[j / STEPS];
                const float own = multiply(half_to_float((u16)(scale_bits & 0x7fffu)), Codes::DECODED);
                vec16 factor[2], mean[2];
                get_parameters(factors, j, factor);
                get_parameters(means, j, mean);
                for (int e = 0; e < 8; e++) {
                    x[j][e] = multiply(multiply(x[j][e], own), parameter(factor, e));
                    if (!(scale_bits & 0x8000u)) x[j][e] = add(x[j][e], parameter(mean, e));
                }
                for (int e = 0; e < 8; e += 2) c[j].set_pair(e, x[j][e], x[j][e + 1]);
            }
            if (STRIPS > 1) warp_barrier();
            Data::template from_halves<true>(shared, c);
            Data::store(s, strip, c);
        }
    }
};
