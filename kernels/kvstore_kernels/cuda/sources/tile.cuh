// What a block of threads works on: a tile of one plane, where its tokens are, and where its regions are.

// D channels and T tokens a plane, PAGE tokens a page, ALIGN (16 or 2): what sections' addresses are multiples of.
template <int D_, int T_, int PAGE_, int ALIGN_, int THREADS_> struct Shape {
    static constexpr int D = D_, T = T_, PAGE = PAGE_, ALIGN = ALIGN_, THREADS = THREADS_;
    static constexpr int SEGMENTS = T * D / 64;  // runs of 64 channels of a plane, token after token
};

// The planes of one section, as a kernel's arguments give them. Offsets and strides are in bytes.
struct Section {
    const u64* bases;  // of each layer
    i32 page_stride, token_stride, head_stride;
    i64 offset;  // of the section in a payload
    i64 layer_offset, head_offset, token_offset;  // in the section, of planes that are stored as they are
    u32 heads;
};

struct Tile {
    const u8* pages;  // of the block, i32
    u8* plane;        // token 0 of page 0
    u8* section;
    u32* void_groups;
    u32 layer, head, layers, heads;
    u32 index;  // of the tile in its plane

    // A region's part of this plane, after `before` bytes a plane of other regions.
    KV_INLINE u8* region(u32 before, u32 bytes) const {
        return section + (i64)(layers * heads) * before + (i64)(layer * heads + head) * bytes;
    }
};

template <int PAGE> KV_INLINE u8* token_address(const Section& s, const Tile& tile, u32 token) {
    const i32 page = (i32)load4(tile.pages + 4 * (token / PAGE));
    u8* const p = stepped(tile.plane, page, s.page_stride);
    return PAGE == 1 ? p : stepped(p, token % PAGE, s.token_stride);
}

// ------------------------------------------------------------------ global memory

template <class Element> KV_INLINE Chunk<Element> load_chunk(const u8* p) {
    Chunk<Element> c;
    c.put(0, load16(p));
    if constexpr (Element::BYTES == 4) c.put(1, load16(p + 16));
    return c;
}
template <class Element> KV_INLINE void store_chunk(u8* p, const Chunk<Element>& c) {
    store16(p, c.get_vector(0));
    if constexpr (Element::BYTES == 4) store16(p + 16, c.get_vector(1));
}

// Words of a section.
template <int ALIGN, int N> KV_INLINE void store_words(u8* p, const u32 (&words)[N]) {
    if constexpr (ALIGN == 16 && N == 4) {
        store16(p, vec16{{words[0], words[1], words[2], words[3]}});
    } else if constexpr (ALIGN == 16 && N == 2) {
        store8(p, vec8{{words[0], words[1]}});
    } else if constexpr (ALIGN == 16 && N == 1) {
        store4(p, words[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            store2(p + 4 * i, words[i]);
            store2(p + 4 * i + 2, words[i] >> 16);
        }
    }
}
template <int ALIGN, int N> KV_INLINE void load_words(const u8* p, u32 (&words)[N]) {
    if constexpr (ALIGN == 16 && N == 4) {
        const vec16 v = load16_again(p);
        for (int i = 0; i < 4; i++) words[i] = v.w[i];
    } else if constexpr (ALIGN == 16 && N == 2) {
        const vec8 v = load8(p);
        words[0] = v.w[0];
        words[1] = v.w[1];
    } else if constexpr (ALIGN == 16 && N == 1) {
        words[0] = load4(p);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) words[i] = load2(p + 4 * i) | load2(p + 4 * i + 2) << 16;
    }
}

// ------------------------------------------------------------------ segments
//
// A warp takes 32 segments of 64 channels. In memory order lane l has chunk l % 8 of segments 4i + l / 8, i = 0..7: each
// access is 512 bytes in a row. In halves lane l has the four chunks 2k + l % 2 of two segments: all that a word of codes
// in lane order, or a step of a butterfly, needs. Shared memory lies between the two.

constexpr int CHUNKS = 8;  // of a thread, in either order

template <class Element, class S> struct Segments {
    static constexpr int PITCH = 64 * Element::BYTES;
    static constexpr int WARP_BYTES = 32 * PITCH;
    static constexpr bool WHOLE = S::SEGMENTS % S::THREADS == 0;

    static constexpr u32 A_TOKEN = S::D / 64;
    static constexpr u32 A_PAGE = S::PAGE * A_TOKEN;

    // First segment of this warp in the plane; a multiple of 32.
    static KV_INLINE u32 first(const Tile& tile) { return tile.index * S::THREADS + (thread_index() & ~31u); }
    static KV_INLINE bool exists(u32 segment) { return WHOLE || segment < S::SEGMENTS; }
    // This thread's first segment in memory order; the others are 4, 8 ... 28 further on.
    static KV_INLINE u32 mine(const Tile& tile) { return first(tile) + (thread_index() & 31u) / 8; }

    // Address of this thread's chunk of its segment i. Where a page has as many segments as a warp or a part of them, only
    // the first one of each page costs more than a multiplication.
    static KV_INLINE u8* address(const Section& s, const Tile& tile, int i) {
        const u32 lane = thread_index() & 31u, at = lane % 8 * 8 * Element::BYTES;
        if constexpr (32 % A_TOKEN == 0 && (A_PAGE % 32 == 0 || (32 % A_PAGE == 0 && A_PAGE % 4 == 0))) {
            constexpr u32 TOGETHER = A_PAGE % 32 == 0 ? 32 : A_PAGE;  // segments of a warp that are in one page
            const u32 step = 4 * i % TOGETHER, begin = first(tile) + (4 * i - step), apart = lane / 8 % A_TOKEN;
            u8* const p = token_address<S::PAGE>(s, tile, begin / A_TOKEN) + at + apart * PITCH;
            u8* const q = stepped(p, lane / 8 / A_TOKEN, s.token_stride);
            return stepped(q, step / A_TOKEN, s.token_stride) + step % A_TOKEN * PITCH;
        } else {
            const u32 segment = mine(tile) + 4 * i;
            return token_address<S::PAGE>(s, tile, segment / A_TOKEN) + segment % A_TOKEN * PITCH + at;
        }
    }

    static KV_INLINE void load(const Section& s, const Tile& tile, Chunk<Element> (&c)[CHUNKS]) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (exists(mine(tile) + 4 * i))
                c[i] = load_chunk<Element>(address(s, tile, i));
            else
                for (int j = 0; j < Chunk<Element>::WORDS; j++) c[i].w[j] = 0;
        }
    }
    static KV_INLINE void store(const Section& s, const Tile& tile, const Chunk<Element> (&c)[CHUNKS]) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            if (exists(mine(tile) + 4 * i)) store_chunk<Element>(address(s, tile, i), c[i]);
    }

    // A segment of the thread in halves: lanes 2n and 2n + 1 have segments n and n + 16, or, where PAIRED, 2n and 2n + 1.
    template <bool PAIRED> static KV_INLINE u32 own(int which) {
        const u32 pair = (thread_index() & 31u) / 2;
        return PAIRED ? 2 * pair + which : pair + 16 * which;
    }

    // Where this thread's chunk i lies in its warp's shared memory, in memory order and in halves. The vectors of 16 bytes of
    // a segment change places by the segment's number (its half, where PAIRED), so that lanes that access one vector of
    // several segments find it in several banks. Each is a sum or an exclusive or of one number and a constant.
    template <bool PAIRED> static KV_INLINE u32 place_in_order(int i) {
        const u32 lane = thread_index() & 31u, segment = lane / 8, vector = lane % 8 * (Element::BYTES / 2);
        const u32 place = segment * PITCH + (vector ^ (PAIRED ? segment / 2 : segment) * Element::BYTES) * 16;
        return (place ^ (PAIRED ? 2 * i % 4 : 0) * Element::BYTES * 16) + 4 * i * PITCH;
    }
    template <bool PAIRED> static KV_INLINE u32 place_in_halves(int i) {
        const u32 lane = thread_index() & 31u, vector = lane % 2 * (Element::BYTES / 2);
        const u32 place = own<PAIRED>(0) * PITCH + (vector ^ lane / 2 % 4 * Element::BYTES) * 16;
        return (place ^ i % 4 * Element::BYTES * 16) + i / 4 * (PAIRED ? PITCH : 16 * PITCH);
    }
    // This thread's chunk i in halves, straight from memory; for few threads.
    template <bool PAIRED> static KV_INLINE Chunk<Element> load_of_halves(const Section& s, const Tile& tile, int i) {
        const u32 segment = first(tile) + own<PAIRED>(i / 4), chunk = i % 4 * 2 + (thread_index() & 1u);
        return load_chunk<Element>(token_address<S::PAGE>(s, tile, segment / A_TOKEN) + segment % A_TOKEN * PITCH +
                                   chunk * 8 * Element::BYTES);
    }
    // Of a byte of a segment, where in the segment it lies then; the same for all segments that are 8 apart.
    template <bool PAIRED> static KV_INLINE u32 turned(u32 segment, u32 byte) {
        return byte ^ (PAIRED ? segment / 2 : segment) % 4 * Element::BYTES * 16;
    }
    static KV_INLINE void put(u8* shared, const Chunk<Element>& c) {
#pragma unroll
        for (int v = 0; v < Element::BYTES / 2; v++) to_shared<vec16>(shared + 16 * v, c.get_vector(v));
    }
    static KV_INLINE void get(const u8* shared, Chunk<Element>& c) {
#pragma unroll
        for (int v = 0; v < Element::BYTES / 2; v++) c.put(v, from_shared<vec16>(shared + 16 * v));
    }

    // Memory order to halves; c[4 * which + k] has channels 16k + 8 * (lane % 2) and on.
    template <bool PAIRED> static KV_INLINE void to_halves(u8* shared, Chunk<Element> (&c)[CHUNKS]) {
        shared += thread_index() / 32 * WARP_BYTES;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) put(shared + place_in_order<PAIRED>(i), c[i]);
        warp_barrier();
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) get(shared + place_in_halves<PAIRED>(i), c[i]);
    }
    template <bool PAIRED> static KV_INLINE void from_halves(u8* shared, Chunk<Element> (&c)[CHUNKS]) {
        shared += thread_index() / 32 * WARP_BYTES;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) put(shared + place_in_halves<PAIRED>(i), c[i]);
        warp_barrier();
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) get(shared + place_in_order<PAIRED>(i), c[i]);
    }
};
