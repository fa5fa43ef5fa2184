// Groups of tokens whose channels are summed up: runs of tokens in shared memory, and numbers for each channel.
//
// A block of threads has a group of G tokens, in STRIPS runs of tokens, one after the other, each held as turbo holds a
// tile: 64 elements a thread, in halves. Sums over tokens are in the order of tokens, so each is one thread's: warps go
// down columns of 64 channels, two channels a lane.

template <class Element, class S> struct Columns {
    using Data = Segments<Element, S>;
    static constexpr u32 G = S::T % 128 == 0 ? 128 : 64, GROUPS = S::T / G;
    static constexpr u32 COLUMNS = S::D / 64;            // segments of a token
    static constexpr u32 TOKENS = S::THREADS / COLUMNS;  // of a strip
    static constexpr u32 STRIPS = G / TOKENS;
    static constexpr u32 WARPS = S::THREADS / 32;
    static constexpr u32 OWNED = (COLUMNS + WARPS - 1) / WARPS;  // columns of a warp, at most
    static_assert(TOKENS * COLUMNS == S::THREADS && G % TOKENS == 0 && TOKENS % 16 == 0, "a group has whole strips");

    // Shared memory has a strip of elements as Data lays it out, then its squares; behind them a number for each channel,
    // twice. Columns of these are 288 bytes apart, so that lanes in several columns find them in several banks.
    static constexpr u32 COLUMN = 288, PARAMETERS = COLUMNS * COLUMN;
    static constexpr u32 SQUARES = S::THREADS * 256;

    static KV_INLINE Tile strip_of(const Tile& tile, u32 strip) {
        Tile r = tile;
        r.index = tile.index * STRIPS + strip;
        return r;
    }
    // Where the parameters of channels 8 * half and on of a thread's segment begin; those of x[4 * which + k] are 64 * k
    // bytes further on.
    static KV_INLINE u32 parameters_of(u32 which) {
        const u32 segment = (thread_index() & ~31u) + Data::template own<true>(which);
        return segment % COLUMNS * COLUMN + (thread_index() & 1u) * 32;
    }
    static KV_INLINE float parameter(const vec16 (&v)[2], int e) { return float_of(v[e / 4].w[e % 4]); }
    static KV_INLINE void get_parameters(const u8* from, int j, vec16 (&v)[2]) {
        const u8* const p = from + parameters_of(j / 4) + 64 * (j % 4);
        v[0] = from_shared<vec16>(p);
        v[1] = from_shared<vec16>(p + 16);
    }

    // Squares of a segment: 16 vectors of 16 bytes, which change places by the row, so that eight lanes that access vectors
    // of their own rows, or of one segment, find them in eight banks.
    static KV_INLINE u32 turned(u32 row) { return (row % 2 * 4 | row / 2 % 2) * 16; }
    static KV_INLINE void put_squares(u8* shared, int j, const float (&squares)[8]) {
        const u32 row = thread_index() / 2;
        const u32 place = row * 512 + ((thread_index() & 1u) * 32 ^ turned(row));
#pragma unroll
        for (int v = 0; v < 2; v++)
            to_shared<vec16>(shared + (place ^ (64 * (j % 4) + 16 * v)) + 256 * (j / 4),
                             vec16{{bits_of(squares[4 * v]), bits_of(squares[4 * v + 1]), bits_of(squares[4 * v + 2]), bits_of(squares[4 * v + 3])}});
    }

    // Adds this lane's two channels of a strip in the order of tokens; of squares, or of elements.
    template <bool OF_SQUARES> static KV_INLINE void add_column(const u8* shared, u32 column, float (&sums)[2]) {
        constexpr u32 BYTES = OF_SQUARES ? 4 : Element::BYTES, AHEAD = 16;
        // Where a lane's channels lie in a segment depends on the row's number, of which a few come again and again.
        constexpr bool EVEN = COLUMNS % 2 == 0;
        constexpr u32 PLACES = EVEN ? 4 : 8;
        if (COLUMNS == 1) column = 0;
        const u8* places[PLACES];
#pragma unroll
        for (u32 k = 0; k < PLACES; k++) {
            const u32 row = EVEN ? k + (COLUMNS == 2 ? 0 : column / 2) : (k * COLUMNS + column) / 2;
            const u32 at = (thread_index() & 31u) * 2 * BYTES;
            places[k] = shared + (OF_SQUARES ? at ^ turned(row) : Data::template turned<true>(2 * row, at));
            places[k] += column * 64 * BYTES;
        }
#pragma unroll 1
        for (u32 first = 0; first < TOKENS; first += AHEAD) {
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                const u8* const p = places[EVEN ? i * COLUMNS / 2 % 4 : i % 8] + i * COLUMNS * 64 * BYTES;
                if constexpr (BYTES == 4) {
                    const vec8 v = from_shared<vec8>(p);
                    for (int n = 0; n < 2; n++) sums[n] = add(sums[n], float_of(v.w[n]));
                } else {
                    const u32 word = from_shared<u32>(p);
                    sums[0] = add(sums[0], Element::low(word));
                    sums[1] = add(sums[1], Element::high(word));
                }
            }
#pragma unroll
            for (u32 k = 0; k < PLACES; k++) places[k] += AHEAD * COLUMNS * 64 * BYTES;
        }
    }
    // The same for all columns of this lane's warp.
    template <bool OF_SQUARES> static KV_INLINE void add_columns(const u8* shared, float (&sums)[OWNED][2]) {
#pragma unroll
        for (u32 i = 0; i < OWNED; i++)
            if (column_of(i) < COLUMNS) add_column<OF_SQUARES>(shared, column_of(i), sums[i]);
    }
    static KV_INLINE u32 column_of(u32 i) { return thread_index() / 32 + i * WARPS; }
    // Where this lane's two channels of a column are among the numbers of channels.
    static KV_INLINE u32 place_of_pair(u32 column) { return column * COLUMN + (thread_index() & 31u) * 8; }
};
