"""Faulty twins of the CUDA kernels of centred keys, each caught by what the emulator reports or by a wrong byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_centred import CENTRED_CASES, known
from cuda_mutants import RACE, UNWRITTEN, WRONG, Mutant, build_twins, check_mutant
from emulator.emulated import EmulatedRunner

UNORDERED = f"{RACE}|{UNWRITTEN}"

pytestmark = pytest.mark.nightly

MUTANTS = (
    # Barriers.
    Mutant(
        "no barrier before elements are summed up",
        3,
        "block_barrier();\n            Group::template add_columns<false>",
        "Group::template add_columns<false>",
        UNORDERED,
    ),
    Mutant(
        "no barrier before the greatest means of columns are read",
        3,
        "block_barrier();\n#pragma unroll\n            for (u32 warp = 0; warp < USED; warp++)",
        "for (u32 warp = 0; warp < USED; warp++)",
        UNORDERED,
    ),
    Mutant(
        "no barrier before means are read",
        3,
        "store_means(tile, channels, means, greatest);\n        block_barrier();",
        "store_means(tile, channels, means, greatest);",
        UNORDERED,
    ),
    Mutant(
        "a warp's barrier before squares are summed up",
        3,
        "block_barrier();\n            Group::template add_columns<true>",
        "warp_barrier();\n            Group::template add_columns<true>",
        UNORDERED,
    ),
    Mutant(
        "no barrier before factors are read",
        3,
        "store_exponents(tile, strengths, factors);\n        block_barrier();",
        "store_exponents(tile, strengths, factors);",
        UNORDERED,
    ),
    Mutant(
        "strips: no barrier after sums", 7, "if (STRIPS > 1) block_barrier();", "", f"{UNORDERED}|without a barrier"
    ),
    Mutant("strips: no barrier before the next one", 7, "if (STRIPS > 1) warp_barrier();", "", UNORDERED),
    Mutant(
        "strips: no barrier between elements and squares",
        7,
        "c, squares);\n                block_barrier();",
        "c, squares);",
        UNORDERED,
    ),
    # Exchanges between lanes, and indices.
    Mutant(
        "a step of the greatest mean over lanes is missing",
        3,
        "bit < 32; bit *= 2) most",
        "bit < 16; bit *= 2) most",
        WRONG,
    ),
    Mutant("numbers of other columns", 9, "segment % COLUMNS * COLUMN", "segment / 2 % COLUMNS * COLUMN", WRONG),
    Mutant("squares of another place", 3, "at ^ turned(row)", "at ^ turned(row + 1)", WRONG),
    Mutant("places of another row", 11, "(k * COLUMNS + column) / 2", "k * COLUMNS / 2", WRONG),
    Mutant(
        "all groups in the first one's place", 6, "tile.index * S::D + column * 64", "column * 64", "written before"
    ),
    Mutant(
        "strips of another group", 7, "tile.index * STRIPS + strip", "tile.index + strip", f"written before|{WRONG}"
    ),
    Mutant("a far vector's other chunk", 3, "i % 4 * 2 + (thread_index() & 1u)", "i % 4 * 2", WRONG, ("far",)),
    Mutant("signs of a vector are not flipped", 3, "flips << 16 & 0x80000000u", "0u", WRONG),
    # Order of sums, rounding.
    Mutant(
        "tokens are added in another order",
        5,
        "for (u32 i = 0; i < AHEAD; i++) {",
        "for (u32 i = AHEAD; i-- > 0;) {",
        WRONG,
        ("cancelling",),
    ),
    Mutant(
        "squares of elements are added as they come", 0, "return n - at + reversed;", "return n;", "wrong", ("brink",)
    ),
    Mutant("the mean of another number of tokens", 0, "1.0f / Group::G)", "1.0f / 128)", WRONG),
    Mutant(
        "a mean is added before it is rounded",
        0,
        "x[j][e] = add(x[j][e], parameter(mean, e));",
        "x[j][e] = fused(multiply(x[j][e], own), parameter(factor, e), parameter(mean, e));",
        f"is not exact|{WRONG}",
    ),
    Mutant(
        "squares of centred vectors are added before they are rounded",
        0,
        "add(own[2 * l], own[2 * l + 1])",
        "fused(x[j][2 * l + 1], x[j][2 * l + 1], own[2 * l])",
        "is not exact",
    ),
    Mutant(
        "squares of scaled vectors are taken for exact",
        0,
        "sum_squares<false>(x",
        "sum_squares<true>(x",
        "is not exact",
    ),
    Mutant("the root of two is one unit off", 0, "0x3FB504F3u", "0x3FB504F4u", WRONG),
    Mutant("an exponent is rounded down", 0, "- 127 + 1) >> 1", "- 127) >> 1", WRONG),
    Mutant("a lower bound of exponents is one off", 0, "k < -20 ? -20", "k < -19 ? -19", WRONG, ("strengths",)),
    # Vectors that are far or void.
    Mutant(
        "vectors as near as far are taken for far",
        0,
        "squares[v] < centred[v]",
        "squares[v] <= centred[v]",
        WRONG,
        ("zeros",),
    ),
    Mutant("void vectors are not far", 0, "&& !(voids & bit_of(n, v))) continue;", ") continue;", WRONG, ("void",)),
    Mutant(
        "void vectors are summed up",
        0,
        "Data::put(shared + thread_index() / 32",
        "if (false) Data::put(shared + thread_index() / 32",
        WRONG,
        ("void",),
    ),
    Mutant("void vectors come back", 0, "if (voids & bit_of(n, v)) clear(again);", "", WRONG, ("void",)),
    Mutant(
        "void vectors of strips come back",
        7,
        "if (voids & bit_of(n, j / STEPS)) clear(c[j]);",
        "if (false) clear(c[j]);",
        WRONG,
        ("void",),
    ),
    Mutant(
        "void vectors are counted by both lanes",
        0,
        "if (!(thread_index() & 1u)) count(",
        "count(",
        "wrong counts",
        ("void",),
    ),
    Mutant("far vectors are not marked", 0, "(scale & masks[v]) | flags[v]", "scale & masks[v]", WRONG, ("far",)),
    Mutant(
        "far vectors decode to negative ones",
        0,
        "(u16)(scale_bits & 0x7fffu)",
        "(u16)scale_bits",
        "decodes to",
        ("far",),
    ),
    Mutant(
        "means are added to far vectors", 0, "if (!(scale_bits & 0x8000u)) x[j][e]", "x[j][e]", "decodes to", ("far",)
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    with known():
        yield


@pytest.fixture(scope="module")
def twins(libraries: Path) -> dict[str, EmulatedRunner]:
    return build_twins(libraries, MUTANTS, CENTRED_CASES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_faulty_twin_is_caught(twins: dict[str, EmulatedRunner], mutant: Mutant) -> None:
    check_mutant(mutant, twins[mutant.name], CENTRED_CASES)
