// Runs CUDA kernels on the CPU: a fiber for each thread, one block of threads after another. Barriers and exchanges
// between lanes are where fibers change. Found and reported are: deadlocks, threads of one barrier at different places,
// accesses to shared memory of different threads without a barrier between them, shared memory read before it was written,
// accesses to global memory outside of what the launch was given, misaligned ones, bytes written twice.
//
// Not modelled: weak memory order within a phase, asynchronous copies, exchanges between some lanes of a warp only.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>
#include <xmmintrin.h>

namespace emulator {

struct Dimensions { unsigned x, y, z; };

struct Barrier {
    unsigned generation = 0, arrived = 0, expected = 0;
    const char* kind = nullptr;
    int line = 0;
};

struct Fiber {
    ucontext_t context;
    jmp_buf state;
    unsigned index = 0, generation = 0, parity = 0;
    Barrier* waits_for = nullptr;
    bool started = false, ended = false;
};

// Memory that a launch may touch. Bytes of payloads and pages are to be written at most once.
struct Range {
    uint64_t begin, end;
    uint32_t writable;
    uint32_t once;
};

// Who touched a byte of shared memory last, and in which phase of the block and of its warp.
struct Touch {
    unsigned block_phase, warp_phase;
    int thread = -1;
};
struct SharedByte { Touch write, read; };

struct State {
    std::vector<Fiber> fibers;
    std::vector<unsigned char> shared;
    std::vector<SharedByte> touched;
    std::vector<uint32_t> exchange;  // [warp][2][32]
    std::vector<Barrier> warps;
    std::vector<unsigned> warp_phases;
    Barrier block;
    unsigned conditions[2] = {0, 0};
    char* stacks = nullptr;
    jmp_buf scheduler;
    Fiber* current = nullptr;
    Dimensions block_index, grid;
    std::vector<Range> ranges;
    std::vector<std::vector<unsigned char>> written;
    char report[512];
    bool failed = false;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
};
inline State S;

#ifndef EMULATOR_STACK_BYTES
#define EMULATOR_STACK_BYTES (128 << 10)
#endif

// Keeps the first report and ends the launch.
[[noreturn]] inline __attribute__((noinline)) void fail(const char* format, ...) {
    if (!S.failed) {
        va_list rest;
        va_start(rest, format);
        const int at = snprintf(S.report, sizeof S.report, "block %u,%u,%u thread %u: ", S.block_index.x, S.block_index.y,
                                S.block_index.z, S.current ? S.current->index : 0);
        vsnprintf(S.report + at, sizeof S.report - at, format, rest);
        va_end(rest);
        S.failed = true;
    }
    _longjmp(S.scheduler, 1);
}

inline unsigned lane() { return S.current->index % 32; }
inline unsigned warp() { return S.current->index / 32; }

inline __attribute__((noinline)) void arrive(Barrier& b, const char* kind, int line) {
    if (b.arrived && (b.line != line || b.kind != kind))
        fail("is at %s of line %d while others are at %s of line %d", kind, line, b.kind, b.line);
    b.line = line;
    b.kind = kind;
    if (++b.arrived == b.expected) {
        b.arrived = 0;
        b.generation++;
        return;
    }
    Fiber* const me = S.current;
    me->waits_for = &b;
    me->generation = b.generation;
    if (!_setjmp(me->state)) _longjmp(S.scheduler, 1);
}

inline void block_barrier(int line) {
    arrive(S.block, "block_barrier", line);
}
inline bool block_barrier_any(bool condition, int line) {
    const unsigned parity = S.block.generation & 1;
    if (S.block.arrived == 0) S.conditions[parity] = 0;
    S.conditions[parity] |= condition;
    arrive(S.block, "block_barrier_any", line);
    return S.conditions[parity];
}
inline void warp_barrier(int line) {
    Barrier& b = S.warps[warp()];
    if (b.arrived + 1 == b.expected) S.warp_phases[warp()]++;
    arrive(b, "warp_barrier", line);
}
// Slots are used in turn, so that one barrier an exchange is enough.
inline uint32_t* exchanged(uint32_t word, const char* kind, int line) {
    uint32_t* const slots = &S.exchange[(warp() * 2 + (S.current->parity ^= 1)) * 32];
    slots[lane()] = word;
    arrive(S.warps[warp()], kind, line);
    return slots;
}
inline uint32_t word_of_lane(uint32_t word, unsigned source, int line) { return exchanged(word, "from_lane", line)[source % 32]; }
inline bool warp_any(bool condition, int line) {
    const uint32_t* const slots = exchanged(condition, "warp_any", line);
    bool any = false;
    for (int i = 0; i < 32; i++) any |= slots[i] != 0;
    return any;
}

// ------------------------------------------------------------------ memory

inline __attribute__((noinline)) void check_global(const void* p, unsigned bytes, bool write, bool counted) {
    const uint64_t at = (uint64_t)p;
    const char* const what = write ? "write" : "read";
    for (size_t i = 0; i < S.ranges.size(); i++) {
        const Range& range = S.ranges[i];
        if (at < range.begin || at >= range.end) continue;
        if (at + bytes > range.end) fail("%s of %u bytes reaches %llu bytes past the end", what, bytes, (unsigned long long)(at + bytes - range.end));
        if (at % bytes) fail("misaligned %s of %u bytes", what, bytes);
        if (!write) return;
        if (!range.writable) fail("write to memory that is only read");
        if (!range.once || counted) return;
        for (unsigned b = 0; b < bytes; b++)
            if (S.written[i][at - range.begin + b]++) fail("byte %llu was written before", (unsigned long long)(at - range.begin + b));
        return;
    }
    fail("%s of %u bytes outside of all memory", what, bytes);
}

inline bool apart(const Touch& touch) {
    if (touch.thread == (int)S.current->index || touch.block_phase != S.block.generation) return true;
    return touch.thread / 32 == (int)warp() && touch.warp_phase != S.warp_phases[warp()];
}
inline __attribute__((noinline)) void check_shared(const unsigned char* p, unsigned bytes, bool write) {
    const size_t at = p - S.shared.data();
    if (p < S.shared.data() || at + bytes > S.shared.size()) fail("access to shared memory outside of its %zu bytes", S.shared.size());
    if (at % bytes) fail("misaligned access to shared memory of %u bytes", bytes);
    const Touch now{S.block.generation, S.warp_phases[warp()], (int)S.current->index};
    for (unsigned i = 0; i < bytes; i++) {
        SharedByte& byte = S.touched[at + i];
        if (byte.write.thread < 0 && !write) fail("shared byte %zu is read and was not written", at + i);
        if (byte.write.thread >= 0 && !apart(byte.write))
            fail("shared byte %zu: no barrier after the write of thread %d", at + i, byte.write.thread);
        if (write) {
            if (byte.read.thread >= 0 && !apart(byte.read))
                fail("shared byte %zu: written without a barrier after the read of thread %d", at + i, byte.read.thread);
            byte.write = now;
            byte.read.thread = -1;
        } else {
            byte.read = now;
        }
    }
}

// ------------------------------------------------------------------ launching

inline void enter() {
    S.body(S.arguments);
    S.current->ended = true;
    _longjmp(S.scheduler, 1);
}
inline __attribute__((noinline)) void resume(Fiber& f) {
    S.current = &f;
    f.waits_for = nullptr;
    if (_setjmp(S.scheduler)) return;
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    setcontext(&f.context);
}

// Order 0 is forward, 1 backward, others are random.
inline bool run_block(unsigned seed) {
    const unsigned count = S.fibers.size();
    std::vector<unsigned> order(count);
    unsigned random = seed * 2654435761u + S.block_index.x;
    for (unsigned i = 0; i < count; i++) order[i] = seed == 1 ? count - 1 - i : i;
    for (unsigned i = count - 1; seed > 1 && i; i--) {
        random = random * 1664525u + 1013904223u;
        std::swap(order[i], order[(random >> 8) % (i + 1)]);
    }
    for (unsigned live = count; live;) {
        bool progress = false;
        for (const unsigned index : order) {
            Fiber& f = S.fibers[index];
            if (f.ended || (f.waits_for && f.waits_for->generation == f.generation)) continue;
            progress = true;
            resume(f);
            if (S.failed) return false;
            if (!f.ended) continue;
            live--;
            for (Barrier* const b : {&S.block, &S.warps[index / 32]}) {
                if (b->arrived) {
                    S.current = &f;
                    if (!_setjmp(S.scheduler)) fail("has ended while others wait at %s of line %d", b->kind, b->line);
                    return false;
                }
                b->expected--;
            }
        }
        if (!progress) {
            for (Fiber& f : S.fibers)
                if (!f.ended && !S.failed) {
                    S.current = &f;
                    if (!_setjmp(S.scheduler)) fail("waits for ever at %s of line %d", f.waits_for->kind, f.waits_for->line);
                }
            return false;
        }
    }
    return true;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}
template <class... A> struct Call {
    void (*kernel)(A...);
    void** arguments;
    static void run(void* p) {
        Call* const me = (Call*)p;
        call(me->kernel, me->arguments, std::index_sequence_for<A...>{});
    }
};

// As cuLaunchKernel; the report of what went wrong, or "".
template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments,
                   const Range* ranges, unsigned range_count, unsigned seed, unsigned flush_denormals) {
    Call<A...> packed{kernel, arguments};
    S.body = Call<A...>::run;
    S.arguments = &packed;
    S.grid = {grid[0], grid[1], grid[2]};
    S.ranges.assign(ranges, ranges + range_count);
    S.written.assign(range_count, {});
    for (unsigned i = 0; i < range_count; i++)
        if (ranges[i].once) S.written[i].assign(ranges[i].end - ranges[i].begin, 0);
    S.fibers.assign(threads, {});
    S.warps.assign((threads + 31) / 32, {});
    S.failed = false;
    S.report[0] = 0;
    std::vector<char> stacks((size_t)threads * EMULATOR_STACK_BYTES);
    S.stacks = stacks.data();
    const unsigned control = _mm_getcsr();
    if (flush_denormals) _mm_setcsr(control | 0x8040);
    for (unsigned n = 0; n < grid[0] * grid[1] * grid[2] && !S.failed; n++) {
        S.block_index = {n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]};
        S.shared.assign(shared_bytes, 0xCD);
        S.touched.assign(shared_bytes, {});
        S.exchange.assign(S.warps.size() * 64, 0xDEADBEEF);
        S.warp_phases.assign(S.warps.size(), 0);
        S.block = {};
        S.block.expected = threads;
        for (unsigned w = 0; w < S.warps.size(); w++) {
            S.warps[w] = {};
            S.warps[w].expected = threads - w * 32 < 32 ? threads - w * 32 : 32;
        }
        for (unsigned i = 0; i < threads; i++) {
            Fiber& f = S.fibers[i];
            f.index = i;
            f.parity = 0;
            f.waits_for = nullptr;
            f.started = f.ended = false;
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = S.stacks + (size_t)i * EMULATOR_STACK_BYTES;
            f.context.uc_stack.ss_size = EMULATOR_STACK_BYTES;
            f.context.uc_link = nullptr;
            makecontext(&f.context, (void (*)())enter, 0);
        }
        run_block(seed);
    }
    _mm_setcsr(control);
    return S.report;
}

}  // namespace emulator
