// Arithmetic of the codecs as docs/codecs.md defines it: element types, parameters of groups, codes and values.
//
// Every statement is one IEEE operation in float32 to nearest even, or exact.

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: x + MAGIC rounds |x| < 2^22 to an integer, in the low bits of the sum
constexpr u32 MAGIC_BITS = 0x4B400000u;
constexpr float LIMIT = 61440.0f;
constexpr u32 FLOOR = 0x00A8u;  // 1.0014e-05 as float16

// ------------------------------------------------------------------ element types
//
// A word has one element of four bytes or two of two bytes, the first in the low half.

struct Bfloat16 {
    static constexpr int BYTES = 2;
    static KV_INLINE float low(u32 word) { return float_of(word << 16); }
    static KV_INLINE float high(u32 word) { return float_of(word & 0xffff0000u); }
    static KV_INLINE u32 join(float low, float high) { return floats_to_bfloats(low, high); }
    static KV_INLINE u32 magnitude(u32 word) { return word & 0x7fff7fffu; }
    static KV_INLINE u32 least(u32 a, u32 b) { return least_bfloats(a, b); }
    static KV_INLINE u32 greatest(u32 a, u32 b) { return greatest_bfloats(a, b); }
};

struct Float16 {
    static constexpr int BYTES = 2;
    static KV_INLINE float low(u32 word) { return half_to_float((u16)word); }
    static KV_INLINE float high(u32 word) { return half_to_float((u16)(word >> 16)); }
    static KV_INLINE u32 join(float low, float high) { return floats_to_halves(low, high); }
    static KV_INLINE u32 magnitude(u32 word) { return word & 0x7fff7fffu; }
    static KV_INLINE u32 least(u32 a, u32 b) { return least_halves(a, b); }
    static KV_INLINE u32 greatest(u32 a, u32 b) { return greatest_halves(a, b); }
};

struct Float32 {
    static constexpr int BYTES = 4;
    static KV_INLINE float low(u32 word) { return float_of(word); }
    static KV_INLINE u32 magnitude(u32 word) { return word & 0x7fffffffu; }
    static KV_INLINE u32 least(u32 a, u32 b) { return bits_of(::least(float_of(a), float_of(b))); }
    static KV_INLINE u32 greatest(u32 a, u32 b) { return bits_of(::greatest(float_of(a), float_of(b))); }
};

// Eight neighbouring channels of a token.
template <class Element> struct Chunk {
    static constexpr int WORDS = 2 * Element::BYTES;
    u32 w[WORDS];

    KV_INLINE float get(int i) const {
        if constexpr (Element::BYTES == 4)
            return Element::low(w[i]);
        else
            return i & 1 ? Element::high(w[i / 2]) : Element::low(w[i / 2]);
    }
    KV_INLINE void set_pair(int i, float first, float second) {
        if constexpr (Element::BYTES == 4) {
            w[i] = bits_of(first);
            w[i + 1] = bits_of(second);
        } else {
            w[i / 2] = Element::join(first, second);
        }
    }
    KV_INLINE void put(int at, vec16 v) {
        for (int i = 0; i < 4; i++) w[4 * at + i] = v.w[i];
    }
    KV_INLINE vec16 get_vector(int at) const {
        return vec16{{w[4 * at], w[4 * at + 1], w[4 * at + 2], w[4 * at + 3]}};
    }
};

// Least or greatest of the elements of words, as far as one word.
template <class Element, int N> KV_INLINE u32 least_word(const u32 (&words)[N]) {
    u32 r = words[0];
#pragma unroll
    for (int i = 1; i < N; i++) r = Element::least(r, words[i]);
    return r;
}
template <class Element, int N> KV_INLINE u32 greatest_word(const u32 (&words)[N]) {
    u32 r = words[0];
#pragma unroll
    for (int i = 1; i < N; i++) r = Element::greatest(r, words[i]);
    return r;
}
template <class Element> KV_INLINE float least_of_word(u32 word) {
    return Element::low(Element::BYTES == 4 ? word : Element::least(word, word >> 16));
}
template <class Element> KV_INLINE float greatest_of_word(u32 word) {
    return Element::low(Element::BYTES == 4 ? word : Element::greatest(word, word >> 16));
}

// ------------------------------------------------------------------ groups with scale and minimum

// Float16 bits, a zero made positive.
KV_INLINE u32 half_of(float x) {
    const u32 h = float_to_half(x);
    return h == 0x8000u ? 0u : h;
}
KV_INLINE u32 floored(u32 scale) { return scale < FLOOR ? FLOOR : scale; }

struct Asymmetric {
    float minimum;
    float inverse;
    u32 scale_bits;
    u32 minimum_bits;
    bool is_void;
    bool needs_clamp;  // a code could come out below 0 or above Q, or the group is void
};

template <int Q> KV_INLINE Asymmetric asymmetric(float lowest, float highest) {
    Asymmetric g;
    g.is_void = !(lowest >= -LIMIT && highest <= LIMIT);  // true for NaN
    g.minimum_bits = half_of(lowest);
    g.scale_bits = floored(float_to_half(multiply(subtract(highest, lowest), 1.0f / Q)));
    g.minimum = half_to_float((u16)g.minimum_bits);
    g.inverse = reciprocal(half_to_float((u16)g.scale_bits));
    // Rounding is monotonic: where the least and the greatest number need no clamp, none does.
    const float first = multiply(subtract(lowest, g.minimum), g.inverse);
    const float last = multiply(subtract(highest, g.minimum), g.inverse);
    g.needs_clamp = !(first >= -0.5f && last < Q + 0.5f) || g.is_void;
    if (g.is_void) {
        g.minimum = 0.0f;
        g.inverse = 0.0f;
        g.minimum_bits = 0;
        g.scale_bits = 0;
    }
    return g;
}

// The code in the low bits of MAGIC_BITS + code. In void groups the quotient is NaN or 0, which the clamp makes 0.
template <int Q, bool CLAMP> KV_INLINE u32 asymmetric_code(float x, float minimum, float inverse) {
    float q = multiply(subtract(x, minimum), inverse);
    if (CLAMP) q = ::minimum(maximum(q, 0.0f), (float)Q);
    return bits_of(add(q, MAGIC));
}

// Codes of FIELD bits, the first lowest, without what MAGIC put above them.
template <int FIELD, int N> KV_INLINE u32 pack(const u32 (&codes)[N]) {
    u32 r = codes[N - 1], magic = MAGIC_BITS;
#pragma unroll
    for (int i = N - 2; i >= 0; i--) {
        r = (r << FIELD) + codes[i];  // sums wrap; so does what is taken off
        magic = (magic << FIELD) + MAGIC_BITS;
    }
    return r - magic;
}

// The code of BITS bits at a place of a word, as float32. Its bits become those of a number whose last place is worth as
// much, so that few places need a shift, and few constants are needed.
template <int BITS> KV_INLINE float code_at(u32 word, int at) {
    const int shift = BITS == 4 ? at / 20 * 16 : at / 12 * 12;
    at -= shift;
    const u32 one = (u32)(127 + 23 - at) << 23;
    return subtract(float_of(masked_or(word >> shift, ((1u << BITS) - 1) << at, one)), float_of(one));
}

// code * scale is exact.
KV_INLINE float asymmetric_value(float code, float scale, float minimum) { return fused(code, scale, minimum); }

// ------------------------------------------------------------------ groups with a scale

struct Symmetric {
    float inverse;  // 0 for a void group
    u32 scale_bits;
};

template <int Q> KV_INLINE Symmetric symmetric(float greatest) {
    Symmetric g;
    g.scale_bits = floored(float_to_half(multiply(greatest, 1.0f / Q)));
    g.inverse = reciprocal(half_to_float((u16)g.scale_bits));
    if (!(greatest <= LIMIT)) {
        g.scale_bits = 0;
        g.inverse = 0.0f;
    }
    return g;
}

// E4M3 to nearest even, saturated to 448.
KV_INLINE u32 e4m3_in_steps(float x) {
    const u32 sign = bits_of(x) >> 24 & 0x80u, magnitude = bits_of(x) & 0x7fffffffu;
    const u32 normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    // Below 2^-6 the last place is worth 2^-9, as that of 2^14 is.
    const u32 small = bits_of(add(float_of(magnitude), 16384.0f)) - bits_of(16384.0f);
    u32 code = magnitude < (u32)(127 - 6) << 23 ? small : normal - (120u << 3);
    if (code > 0x7eu) code = 0x7eu;
    return sign | code;
}
KV_INLINE u32 e4m3_pair(float low, float high) {
#ifdef KV_HARDWARE_E4M3
    return floats_to_e4m3(low, high);
#else
    return e4m3_in_steps(low) | e4m3_in_steps(high) << 8;
#endif
}
// E4M3 numbers in bytes 1 and 3, as two float16 numbers of 1/256 of their value.
KV_INLINE u32 e4m3_to_halves(u32 bytes) { return (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u); }
