// The host's side of primitives.cuh, which this file stands in for: the same functions, to the bit, after the PTX manual.
// Fused operations are checked to be what they are used for: the same as two roundings.
#pragma once
#include "fibers.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int32_t i32;
typedef long long i64;

struct alignas(16) vec16 { u32 w[4]; };
struct alignas(8) vec8 { u32 w[2]; };

#define KV_INLINE inline
#define KV_TABLE static const
#define KV_KERNEL(threads, blocks) static void
#define KV_SHARED(name) u8* const name = emulator::S.shared.data()

// ------------------------------------------------------------------ bits and rounding

KV_INLINE u32 bits_of(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
KV_INLINE float float_of(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
KV_INLINE bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

// A GPU has one NaN for results.
KV_INLINE float result(float x) { return is_nan(x) ? float_of(0x7fffffffu) : x; }

KV_INLINE float add(float a, float b) { return result(a + b); }
KV_INLINE float subtract(float a, float b) { return result(a - b); }
KV_INLINE float multiply(float a, float b) { return result(a * b); }
KV_INLINE float divide(float a, float b) { return result(a / b); }
KV_INLINE float reciprocal(float x) { return result(1.0f / x); }
KV_INLINE float square_root(float x) { return result(__builtin_sqrtf(x)); }
KV_INLINE float int_to_float(i32 x) { return (float)x; }
KV_INLINE float minimum(float a, float b) { return is_nan(a) ? b : is_nan(b) ? a : b < a ? b : a; }
KV_INLINE float maximum(float a, float b) { return is_nan(a) ? b : is_nan(b) ? a : b > a ? b : a; }

// a * b in full, which float32 must hold: else fusing would change the result. Below 2^-100 it may not, and that is known
// not to reach any code or scale.
KV_INLINE double exact_product(float a, float b) {
    const double product = (double)a * b;
    if (__builtin_fabs(product) >= 0x1p-100 && __builtin_fabs(product) < 0x1p127 && (double)(float)product != product)
        emulator::fail("the product of %a and %a is not exact", a, b);
    return product;
}
KV_INLINE float fused(float a, float b, float c) {
    exact_product(a, b);
    return result(__builtin_fmaf(a, b, c));
}
KV_INLINE float fused_unit(float a, float b, float c) {
    const float r = fused(a, b, c);
    return r > 0.0f ? r < 1.0f ? r : 1.0f : 0.0f;
}
KV_INLINE float fused_down(float a, float b, float c) {
    const double sum = exact_product(a, b) + c;
    const float r = (float)sum;
    return result((double)r > sum ? __builtin_nextafterf(r, -__builtin_inff()) : r);
}

KV_INLINE u16 float_to_half(float x) {
    const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x47800000u) return (u16)(sign | 0x7c00u);
    if (magnitude >= 0x38800000u) {
        const u32 rebased = magnitude - 0x38000000u;
        return (u16)(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
    }
    if (magnitude < 0x33000000u) return (u16)sign;
    const u32 significand = (magnitude & 0x7fffffu) | 0x800000u, shift = 126u - (magnitude >> 23);
    const u32 kept = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    return (u16)(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
}
KV_INLINE float half_to_float(u16 h) {
    const u32 sign = (u32)(h & 0x8000u) << 16, exponent = h >> 10 & 31u, fraction = h & 0x3ffu;
    if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112u) << 23 | fraction << 13);
    return float_of(bits_of((float)fraction * 0x1p-24f) | sign);
}
KV_INLINE u32 float_to_bfloat(float x) {
    const u32 bits = bits_of(x);
    return is_nan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
KV_INLINE u32 floats_to_halves(float low, float high) { return float_to_half(low) | (u32)float_to_half(high) << 16; }
KV_INLINE u32 floats_to_bfloats(float low, float high) { return float_to_bfloat(low) | float_to_bfloat(high) << 16; }

#ifdef EMULATOR_HARDWARE_E4M3
#define KV_HARDWARE_E4M3
// By search: the nearest of the numbers there are, the even one of two as near.
KV_INLINE u32 float_to_e4m3(float x) {
    const double magnitude = __builtin_fabs((double)x);
    u32 best = 0;
    double distance = magnitude;
    for (u32 code = 1; code < 0x7f; code++) {
        const u32 exponent = code >> 3, fraction = code & 7u;
        const double value = exponent ? __builtin_ldexp(8 + fraction, (int)exponent - 10) : __builtin_ldexp(fraction, -9);
        const double other = __builtin_fabs(magnitude - value);
        if (other < distance || (other == distance && code % 2 == 0)) best = code, distance = other;
    }
    return (bits_of(x) >> 24 & 0x80u) | best;
}
KV_INLINE u32 floats_to_e4m3(float low, float high) { return float_to_e4m3(low) | float_to_e4m3(high) << 8; }
#endif

// -0 is less than +0.
template <int EXPONENT_MASK> KV_INLINE u32 least_of_16(u32 a, u32 b, bool greatest) {
    if ((a & 0x7fffu) > EXPONENT_MASK || (b & 0x7fffu) > EXPONENT_MASK) return 0x7fffu;
    const i32 key_a = a & 0x8000u ? ~(i32)a & 0xffff : (i32)a | 0x8000, key_b = b & 0x8000u ? ~(i32)b & 0xffff : (i32)b | 0x8000;
    return (key_a < key_b) != greatest ? a : b;
}
template <int EXPONENT_MASK> KV_INLINE u32 least_of_pairs(u32 a, u32 b, bool greatest) {
    return least_of_16<EXPONENT_MASK>(a & 0xffffu, b & 0xffffu, greatest) | least_of_16<EXPONENT_MASK>(a >> 16, b >> 16, greatest) << 16;
}
KV_INLINE u32 least_bfloats(u32 a, u32 b) { return least_of_pairs<0x7f80>(a, b, false); }
KV_INLINE u32 greatest_bfloats(u32 a, u32 b) { return least_of_pairs<0x7f80>(a, b, true); }
KV_INLINE u32 least_halves(u32 a, u32 b) { return least_of_pairs<0x7c00>(a, b, false); }
KV_INLINE u32 greatest_halves(u32 a, u32 b) { return least_of_pairs<0x7c00>(a, b, true); }
KV_INLINE float least(float a, float b) { return is_nan(a) || is_nan(b) ? float_of(0x7fffffffu) : b < a ? b : a; }
KV_INLINE float greatest(float a, float b) { return is_nan(a) || is_nan(b) ? float_of(0x7fffffffu) : b > a ? b : a; }
KV_INLINE u32 masked_or(u32 word, u32 mask, u32 more) { return (word & mask) | more; }
KV_INLINE u32 pick_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = a | (u64)b << 32;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= (u32)(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
    return r;
}

KV_INLINE u8* stepped(u8* p, i32 count, i32 stride) { return p + (i64)count * stride; }

// ------------------------------------------------------------------ memory

template <class Value> KV_INLINE Value from_global(const void* p) {
    emulator::check_global(p, sizeof(Value), false, false);
    Value v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class Value> KV_INLINE void to_global(void* p, Value v) {
    emulator::check_global(p, sizeof v, true, false);
    memcpy(p, &v, sizeof v);
}
KV_INLINE vec16 load16(const u8* p) { return from_global<vec16>(p); }
KV_INLINE vec16 load16_again(const u8* p) { return from_global<vec16>(p); }
KV_INLINE vec8 load8(const u8* p) { return from_global<vec8>(p); }
KV_INLINE u64 load_address(const u64* p) { return from_global<u64>(p); }
KV_INLINE u32 load4(const u8* p) { return from_global<u32>(p); }
KV_INLINE u32 load2(const u8* p) { return from_global<u16>(p); }
KV_INLINE u32 load1(const u8* p) { return from_global<u8>(p); }
KV_INLINE vec16 vector_of_table(const vec16* table, u32 index) { return table[index]; }
KV_INLINE u32 word_of_table(const u32* table, u32 index) { return table[index]; }
KV_INLINE void store16(u8* p, vec16 v) { to_global(p, v); }
KV_INLINE void store8(u8* p, vec8 v) { to_global(p, v); }
KV_INLINE void store4(u8* p, u32 v) { to_global(p, v); }
KV_INLINE void store2(u8* p, u32 v) { to_global(p, (u16)v); }
KV_INLINE void store1(u8* p, u32 v) { to_global(p, (u8)v); }
KV_INLINE void count(u32* counter, u32 amount) {
    emulator::check_global(counter, 4, true, true);
    *counter += amount;
}
template <class Value> KV_INLINE Value from_shared(const u8* p) {
    emulator::check_shared(p, sizeof(Value), false);
    Value v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class Value> KV_INLINE void to_shared(u8* p, Value v) {
    emulator::check_shared(p, sizeof v, true);
    memcpy(p, &v, sizeof v);
}

// ------------------------------------------------------------------ threads of a block

KV_INLINE u32 thread_index() { return emulator::S.current->index; }
KV_INLINE u32 block_x() { return emulator::S.block_index.x; }
KV_INLINE u32 block_y() { return emulator::S.block_index.y; }
KV_INLINE u32 block_z() { return emulator::S.block_index.z; }
KV_INLINE u32 grid_y() { return emulator::S.grid.y; }

#define block_barrier() emulator::block_barrier(__LINE__)
#define block_barrier_any(condition) emulator::block_barrier_any(condition, __LINE__)
#define warp_barrier() emulator::warp_barrier(__LINE__)
#define warp_any(condition) emulator::warp_any(condition, __LINE__)
#define from_lane_across(word, bits) emulator::word_of_lane(word, emulator::lane() ^ (bits), __LINE__)
#define from_lane(word, lane) emulator::word_of_lane(word, lane, __LINE__)
