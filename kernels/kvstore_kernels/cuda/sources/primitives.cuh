// What differs between a GPU and the host: every function here has one meaning, to the bit, and a second body for the
// host in the tests' emulator, which stands in for this file. All other sources are the same text on both.
//
// Nothing is included, so that NVRTC needs no headers. Arithmetic is one IEEE operation a function, and none of it can
// be contracted. CuPy compiles with -ftz=true: no result may depend on float32 denormals.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

struct __align__(16) vec16 { u32 w[4]; };
struct __align__(8) vec8 { u32 w[2]; };

#define KV_INLINE __device__ __forceinline__
#define KV_TABLE static __device__ const
#define KV_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// One array of dynamic shared memory for each kernel.
#define KV_SHARED(name) extern __shared__ vec16 kv_shared_memory[]; u8* const name = (u8*)kv_shared_memory

// ------------------------------------------------------------------ bits and rounding

KV_INLINE u32 bits_of(float x) { return __float_as_uint(x); }
KV_INLINE float float_of(u32 bits) { return __uint_as_float(bits); }

KV_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
KV_INLINE float subtract(float a, float b) { return __fsub_rn(a, b); }
KV_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
KV_INLINE float divide(float a, float b) { return __fdiv_rn(a, b); }
KV_INLINE float reciprocal(float x) { return __frcp_rn(x); }
KV_INLINE float square_root(float x) { return __fsqrt_rn(x); }
KV_INLINE float int_to_float(i32 x) { return __int2float_rn(x); }
KV_INLINE float minimum(float a, float b) { return fminf(a, b); }  // the number where one is NaN
KV_INLINE float maximum(float a, float b) { return fmaxf(a, b); }

// a * b + c, rounded once. Only where that is the same as two roundings, because a * b is exact.
KV_INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Likewise, clamped to [0, 1]; NaN gives 0.
KV_INLINE float fused_unit(float a, float b, float c) {
    float r;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    return r;
}
// Likewise, rounded towards minus infinity.
KV_INLINE float fused_down(float a, float b, float c) { return __fmaf_rd(a, b, c); }

KV_INLINE u16 float_to_half(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
KV_INLINE float half_to_float(u16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}
// Two numbers in one word, the first in the low half.
KV_INLINE u32 floats_to_halves(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
KV_INLINE u32 floats_to_bfloats(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Two E4M3 numbers, the first in the low byte, saturated to 448. Where there is no instruction for it, arithmetic.cuh has
// the same in several.
#if __CUDA_ARCH__ >= 890
#define KV_HARDWARE_E4M3
KV_INLINE u32 floats_to_e4m3(float low, float high) {
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
#endif

// Least and greatest; NaN where one is NaN. Either zero may come out of two zeros.
KV_INLINE u32 least_bfloats(u32 a, u32 b) {
    u32 r;
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_INLINE u32 greatest_bfloats(u32 a, u32 b) {
    u32 r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_INLINE u32 least_halves(u32 a, u32 b) {
    u32 r;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_INLINE u32 greatest_halves(u32 a, u32 b) {
    u32 r;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_INLINE float least(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
KV_INLINE float greatest(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
// word & mask | more, in one instruction.
KV_INLINE u32 masked_or(u32 word, u32 mask, u32 more) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "r"(mask), "r"(more));
    return r;
}
// Byte k of the result is byte (selector >> 4k & 7) of the eight bytes of a (0 to 3) and b (4 to 7).
KV_INLINE u32 pick_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// p + count * stride, in one instruction: left to itself the compiler spreads the sum over several.
KV_INLINE u8* stepped(u8* p, i32 count, i32 stride) {
    u8* r;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(r) : "r"(count), "r"(stride), "l"(p));
    return r;
}

// ------------------------------------------------------------------ global memory; addresses are multiples of the size

KV_INLINE vec16 load16(const u8* p) {
    vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
// What several threads of a block read.
KV_INLINE vec16 load16_again(const u8* p) {
    vec16 v;
    // Not volatile, here and below: what is read twice is loaded once.
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
    return v;
}
KV_INLINE vec8 load8(const u8* p) {
    vec8 v;
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p));
    return v;
}
KV_INLINE u64 load_address(const u64* p) {
    u64 v;
    asm("ld.global.nc.u64 %0, [%1];" : "=l"(v) : "l"(p));
    return v;
}
KV_INLINE u32 load4(const u8* p) {
    u32 v;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
KV_INLINE u32 load2(const u8* p) {
    u16 v;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
KV_INLINE u32 load1(const u8* p) {
    u32 v;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
// Tables of this source.
KV_INLINE vec16 vector_of_table(const vec16* table, u32 index) { return load16_again((const u8*)(table + index)); }
KV_INLINE u32 word_of_table(const u32* table, u32 index) { return load4((const u8*)(table + index)); }

KV_INLINE void store16(u8* p, vec16 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
KV_INLINE void store8(u8* p, vec8 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(p), "r"(v.w[0]), "r"(v.w[1]) : "memory");
}
KV_INLINE void store4(u8* p, u32 v) { asm volatile("st.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }
KV_INLINE void store2(u8* p, u32 v) { asm volatile("st.global.u16 [%0], %1;" :: "l"(p), "h"((u16)v) : "memory"); }
KV_INLINE void store1(u8* p, u32 v) { asm volatile("st.global.u8 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }
KV_INLINE void count(u32* counter, u32 amount) { atomicAdd(counter, amount); }

// ------------------------------------------------------------------ shared memory, and threads of a block

template <class Value> KV_INLINE Value from_shared(const u8* p) { return *(const Value*)p; }
template <class Value> KV_INLINE void to_shared(u8* p, Value v) { *(Value*)p = v; }

KV_INLINE u32 thread_index() { return threadIdx.x; }
KV_INLINE u32 block_x() { return blockIdx.x; }
KV_INLINE u32 block_y() { return blockIdx.y; }
KV_INLINE u32 block_z() { return blockIdx.z; }
KV_INLINE u32 grid_y() { return gridDim.y; }

// All threads of a block arrive, or all 32 of a warp; shared memory written before is seen after.
#define block_barrier() __syncthreads()
#define block_barrier_any(condition) __syncthreads_or(condition)
#define warp_barrier() __syncwarp()
#define warp_any(condition) __any_sync(0xffffffffu, condition)
// The word that another lane gives: the one whose number differs in these bits, or the one of the low five bits.
#define from_lane_across(word, bits) __shfl_xor_sync(0xffffffffu, word, bits)
#define from_lane(word, lane) __shfl_sync(0xffffffffu, word, lane)
