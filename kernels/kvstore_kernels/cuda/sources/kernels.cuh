// The kernels: one encodes, one decodes, both sections of many blocks, all layers and all heads, in one launch.
//
// First and Second, THREADS, BLOCKS and the numbers of tiles a plane are what precedes this file. Blocks of the grid:
// x tiles of the first section's planes of a layer, then of the second's; y layers; z blocks of tokens.

#define KV_SECTION(n)                                                                                                    \
    const u64 *bases##n, i32 page_stride##n, i32 token_stride##n, i32 head_stride##n, i64 offset##n, i64 layer_offset##n, \
        i64 head_offset##n, i64 token_offset##n, u32 heads##n
#define KV_SECTION_OF(n)                                                                                               \
    Section { bases##n, page_stride##n, token_stride##n, head_stride##n, offset##n, layer_offset##n, head_offset##n,   \
              token_offset##n, heads##n }
#define KV_PARAMETERS \
    const u8 *pages, u32 block_pages, const u64 *payloads, u32 *void_groups, KV_SECTION(1), KV_SECTION(2)

template <u32 TILES> KV_INLINE Tile tile_of(const u8* pages, const u64* payloads, u32* void_groups, const Section& s, u32 x) {
    Tile tile;
    tile.layer = block_y();
    tile.layers = grid_y();
    tile.heads = s.heads;
    tile.head = x / TILES;
    tile.index = x % TILES;
    tile.pages = pages;
    tile.plane = stepped((u8*)load_address(s.bases + tile.layer), tile.head, s.head_stride);
    tile.section = (u8*)load_address(payloads + block_z()) + s.offset;
    tile.void_groups = void_groups + block_z();
    return tile;
}

template <class A, class B> struct Same { static constexpr bool YES = false; };
template <class A> struct Same<A, A> { static constexpr bool YES = true; };

template <bool ENCODE, class Method, u32 TILES>
KV_INLINE void run(const u8* pages, const u64* payloads, u32* void_groups, const Section& s, u32 x, u8* shared) {
    const Tile tile = tile_of<TILES>(pages, payloads, void_groups, s, x);
    ENCODE ? Method::encode(s, tile, shared) : Method::decode(s, tile, shared);
}

template <bool ENCODE> KV_INLINE void work(KV_PARAMETERS, u8* shared) {
    const u32 first_tiles = heads1 * FIRST_TILES, x = block_x();
    const bool is_first = x < first_tiles;
    const u8* const own = pages + 4 * (u64)block_z() * block_pages;
    const Section first = KV_SECTION_OF(1), second = KV_SECTION_OF(2);
    if constexpr (Same<First, Second>::YES) {
        const Section s = is_first ? first : second;  // one copy of the code
        run<ENCODE, First, FIRST_TILES>(own, payloads, void_groups, s, is_first ? x : x - first_tiles, shared);
    } else if (is_first) {
        run<ENCODE, First, FIRST_TILES>(own, payloads, void_groups, first, x, shared);
    } else {
        run<ENCODE, Second, SECOND_TILES>(own, payloads, void_groups, second, x - first_tiles, shared);
    }
}

#define KV_SECTION_NAMES(n)                                                                                         \
    bases##n, page_stride##n, token_stride##n, head_stride##n, offset##n, layer_offset##n, head_offset##n, token_offset##n, \
        heads##n

KV_KERNEL(THREADS, BLOCKS) kv_encode(KV_PARAMETERS) {
    KV_SHARED(shared);
    work<true>(pages, block_pages, payloads, void_groups, KV_SECTION_NAMES(1), KV_SECTION_NAMES(2), shared);
}
KV_KERNEL(THREADS, BLOCKS) kv_decode(KV_PARAMETERS) {
    KV_SHARED(shared);
    work<false>(pages, block_pages, payloads, void_groups, KV_SECTION_NAMES(1), KV_SECTION_NAMES(2), shared);
}
