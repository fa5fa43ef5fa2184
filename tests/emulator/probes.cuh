// Single functions of primitives.cuh and arithmetic.cuh, numbered as in probes.py, for the host and for a GPU.

KV_INLINE u32 probe(u32 which, u32 a, u32 b) {
    switch (which) {
    case 0: return float_to_half(float_of(a));
    case 1: return bits_of(half_to_float((u16)a));
    case 2: return floats_to_halves(float_of(a), float_of(b));
    case 3: return floats_to_bfloats(float_of(a), float_of(b));
    case 4: return least_bfloats(a, b);
    case 5: return greatest_bfloats(a, b);
    case 6: return least_halves(a, b);
    case 7: return greatest_halves(a, b);
    case 8: return bits_of(least(float_of(a), float_of(b)));
    case 9: return bits_of(greatest(float_of(a), float_of(b)));
    case 10: return bits_of(reciprocal(float_of(a)));
    case 11: return bits_of(square_root(float_of(a)));
    case 12: return bits_of(divide(float_of(a), float_of(b)));
    case 13: return bits_of(add(float_of(a), float_of(b)));
    case 14: return bits_of(multiply(float_of(a), float_of(b)));
    case 15: return pick_bytes(a, a ^ 0x5a5a5a5au, b & 0x7777u);
    case 16: return e4m3_pair(float_of(a), float_of(b));
    case 17: return e4m3_in_steps(float_of(a)) | e4m3_in_steps(float_of(b)) << 8;
    case 18: return bits_of(half_to_float((u16)e4m3_to_halves(a << 8)));
    case 19: return bits_of(fused_unit(float_of(MAGIC_BITS + a), 0x1p-14f, 0.5f - 768.0f));
    case 20: return bits_of(fused_down(float_of(a), 31.0f, MAGIC));
    case 21: return bits_of(int_to_float((i32)a));
    case 22: return bits_of(minimum(float_of(a), float_of(b)));
    case 23: return bits_of(maximum(float_of(a), float_of(b)));
    default: return 0;
    }
}
