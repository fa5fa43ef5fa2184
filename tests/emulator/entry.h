// What the emulator calls of a program.
#define EMULATOR_ENTRY(kernel)                                                                                             \
    extern "C" const char* emulate_##kernel(const unsigned* grid, unsigned threads, unsigned shared_bytes, void** arguments, \
                                            const emulator::Range* ranges, unsigned range_count, unsigned seed,           \
                                            unsigned flush_denormals) {                                                   \
        return emulator::launch(kernel, grid, threads, shared_bytes, arguments, ranges, range_count, seed, flush_denormals); \
    }
EMULATOR_ENTRY(kv_encode)
EMULATOR_ENTRY(kv_decode)
