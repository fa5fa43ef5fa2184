"""Faulty twins of the CUDA kernels, each caught by what the emulator reports or by a wrong byte.

They show that the tests of the kernels can fail: for barriers, exchanges between lanes, indices, rounding and limits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_mutants import MEMORY, RACE, UNWRITTEN, WRONG, Mutant, build_twins, check_mutant
from emulator.cases import CASES
from emulator.emulated import EmulatedRunner

pytestmark = pytest.mark.nightly

MUTANTS = (
    # Barriers.
    Mutant(
        "no barrier between writing and reading in halves",
        3,
        "warp_barrier();\n#pragma unroll\n        for (int i = 0; i < CHUNKS; i++) get(shared + place_in_halves",
        "for (int i = 0; i < CHUNKS; i++) get(shared + place_in_halves",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant(
        "no barrier when decoded halves go back to memory order",
        8,
        "warp_barrier();\n#pragma unroll\n        for (int i = 0; i < CHUNKS; i++) get(shared + place_in_order",
        "for (int i = 0; i < CHUNKS; i++) get(shared + place_in_order",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant(
        "int8: no barrier before maxima are read",
        2,
        "        block_barrier();\n        const u32 token",
        "        const u32 token",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant(
        "int8: no barrier before scales are read",
        2,
        "        block_barrier();\n        u8* const codes",
        "        u8* const codes",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant(
        "int8: a warp's barrier where the block's is needed",
        2,
        "block_barrier();",
        "warp_barrier();",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant("fp8: no barrier", 1, "block_barrier();", "", f"{RACE}|{UNWRITTEN}"),
    Mutant(
        "keys: no barrier before partial minima are read",
        4,
        "        block_barrier();\n\n        bool needs_clamp",
        "        bool needs_clamp",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant(
        "keys: no barrier before parameters are read",
        4,
        "block_barrier_any(needs_clamp)",
        "(needs_clamp)",
        f"{RACE}|{UNWRITTEN}",
    ),
    Mutant(
        "int8: a barrier more for some threads",
        2,
        "        block_barrier();\n        u8* const codes",
        "        block_barrier();\n        if (thread < 32) block_barrier();\n        u8* const codes",
        "has ended while others wait|others are at",
    ),
    Mutant(
        "keys: some threads end before the others' barrier",
        4,
        "        block_barrier();\n\n        bool needs_clamp",
        "        if (thread == 5) return;\n        block_barrier();\n\n        bool needs_clamp",
        "while others|has ended while others wait|waits for ever",
    ),
    # Exchanges between lanes.
    Mutant(
        "int4: the other half's minimum is not asked for",
        3,
        "low = Element::least(low, from_lane_across(low, 1));",
        "",
        WRONG,
    ),
    Mutant("fp8: a step of the maximum over lanes is missing", 1, "bit < 32; bit *= 2", "bit < 16; bit *= 2", WRONG),
    Mutant(
        "turbo: the wrong lane's half",
        6,
        "from_lane_across(bits_of(x[j][e]), 1)",
        "from_lane_across(bits_of(x[j][e]), 2)",
        WRONG,
    ),
    Mutant("turbo: the scale of half a vector", 6, "dot += from_lane_across(dot, 1);", "", WRONG),
    Mutant(
        "an exchange that not all lanes take part in",
        3,
        "if (warp_any(g[0].needs_clamp || g[1].needs_clamp))",
        "if (g[half].needs_clamp && warp_any(true))",
        "while others are at|waits for ever|has ended",
        ("holes",),
    ),
    # Indices.
    Mutant(
        "chunks change places",
        3,
        "get(shared + place_in_halves<PAIRED>(i)",
        "get(shared + place_in_halves<PAIRED>(i ^ 1)",
        WRONG,
    ),
    Mutant("places of other segments", 6, "vector ^ lane / 2 % 4 *", "vector ^ lane / 4 % 4 *", WRONG),
    Mutant(
        "keys: parameters of other channels",
        4,
        "minima += rows / PARTS * 4 * HALF + chunk * 4;",
        "minima += rows / PARTS * 4 * HALF + (chunk ^ 1) * 4;",
        WRONG,
    ),
    Mutant(
        "layer and head change places",
        4,
        "(i64)(layer * heads + head) * bytes",
        "(i64)(head * layers + layer) * bytes",
        WRONG,
    ),
    Mutant("every token on the block's first page", 4, "4 * (token / PAGE)", "4 * (token / PAGE * 0)", WRONG),
    Mutant("another block's pages", 4, "4 * (u64)block_z() * block_pages", "4 * (u64)0 * block_pages", WRONG),
    Mutant(
        "the last tile's tail is taken for whole",
        37,
        "WHOLE || segment < S::SEGMENTS",
        "WHOLE || segment < S::SEGMENTS + 1",
        f"{MEMORY}|written before|{WRONG}",
    ),
    Mutant("pages beyond the block's", 37, "WHOLE || segment < S::SEGMENTS", "true", MEMORY + "|written before"),
    Mutant(
        "parameters past the payload's end",
        3,
        "tile.region(CODES, PARAMETERS) + 4 * segment, parameters);",
        "tile.region(CODES, PARAMETERS) + 4 * segment + 256, parameters);",
        f"{MEMORY}|written before|{WRONG}",
    ),
    Mutant(
        "misaligned load of 16 bytes",
        4,
        "at = thread_index() % LANES * 8 * Element::BYTES;",
        "at = thread_index() % LANES * 8 * Element::BYTES + 2;",
        "misaligned",
    ),
    Mutant(
        "two lanes write the same parameters",
        3,
        "if (half == which && Data::exists(segment))",
        "if (Data::exists(segment))",
        "written before",
    ),
    Mutant(
        "shared memory is used that was not asked for",
        2,
        "to_shared<float>(shared + SCALED + 4 * thread, g.inverse);",
        "to_shared<float>(shared + SCALED + 4 * thread + 1024, g.inverse);",
        "outside of its",
    ),
    # Rounding.
    Mutant(
        "half away from zero instead of to even",
        3,
        "return bits_of(add(q, MAGIC));",
        "return MAGIC_BITS + (u32)(i32)add(q, 0.5f);",
        WRONG,
        ("ties",),
    ),
    Mutant(
        "division instead of the reciprocal",
        3,
        "float q = multiply(subtract(x, minimum), inverse);",
        "float q = divide(subtract(x, minimum), divide(1.0f, inverse));",
        WRONG,
        ("normal", "ties", "wide"),
    ),
    Mutant(
        "the reciprocal is one unit off",
        3,
        "g.inverse = reciprocal(half_to_float((u16)g.scale_bits));",
        "g.inverse = float_of(bits_of(reciprocal(half_to_float((u16)g.scale_bits))) + 1);",
        WRONG,
        ("ties", "wide"),
    ),
    Mutant(
        "the product with the scale is fused where it is not exact",
        3,
        "float q = multiply(subtract(x, minimum), inverse);",
        "float q = fused(x, inverse, -multiply(minimum, inverse));",
        "is not exact",
    ),
    Mutant(
        "e4m3: half away from zero",
        1,
        "(magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20",
        "(magnitude + 0x80000u) >> 20",
        WRONG,
        ("ties", "wide", "finite_bits"),
    ),
    Mutant(
        "turbo: coordinates are not rounded",
        6,
        "bits_of(add(multiply(x, factor), MAGIC))",
        "bits_of(add(multiply(x, factor), MAGIC + 1.0f))",
        WRONG,
    ),
    # Limits.
    Mutant("no clamp", 24, "if (CLAMP) q =", "if (false) q =", WRONG, ("offset",)),
    Mutant(
        "the clamp is thought not to be needed",
        24,
        "g.needs_clamp = !(first >= -0.5f && last < Q + 0.5f) || g.is_void;",
        "g.needs_clamp = g.is_void;",
        WRONG,
        ("offset",),
    ),
    Mutant(
        "void groups keep their parameters",
        3,
        "if (g.is_void) {\n        g.minimum = 0.0f;",
        "if (false) {\n        g.minimum = 0.0f;",
        WRONG,
        ("holes",),
    ),
    Mutant(
        "numbers beyond the limit are no reason for a void group",
        3,
        "!(lowest >= -LIMIT && highest <= LIMIT)",
        "!(lowest >= -65504.0f && highest <= 65504.0f)",
        f"{WRONG}|wrong counts",
        ("holes",),
    ),
    Mutant(
        "void groups are not counted",
        2,
        "if (g.scale_bits == 0) count(tile.void_groups, 1);",
        "",
        "wrong counts",
        ("holes",),
    ),
    Mutant("a negative zero as minimum", 3, "return h == 0x8000u ? 0u : h;", "return h;", WRONG, ("zeros", "tiny")),
    Mutant("no least scale", 3, "scale < FLOOR ? FLOOR : scale", "scale", f"{WRONG}|wrong counts", ("zeros", "tiny")),
    Mutant(
        "turbo: small vectors are not taken for zero",
        6,
        "|| sums[v] < 0x1p-40f",
        "",
        f"{WRONG}|wrong counts",
        ("tiny", "zeros"),
    ),
    Mutant(
        "int8: codes of void groups are what NaN leaves",
        2,
        "inverse == 0.0f ? 0u : 0xffffffffu",
        "0xffffffffu",
        WRONG,
        ("any_bits", "holes"),
    ),
    Mutant("kivi2: codes overlap", 5, "int at = 16 * (j % 2) + 4 * k;", "int at = 16 * (j % 2) + 2 * k;", WRONG),
)


@pytest.fixture(scope="module")
def twins(libraries: Path) -> dict[str, EmulatedRunner]:
    return build_twins(libraries, MUTANTS, CASES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_faulty_twin_is_caught(twins: dict[str, EmulatedRunner], mutant: Mutant) -> None:
    check_mutant(mutant, twins[mutant.name], CASES)
