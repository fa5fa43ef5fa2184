"""The CUDA kernels of centred keys without a GPU: the reference's bytes and values, and what they are compiled to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_blocks import CENTRED
from cuda_budgets import fast_kv
from cuda_centred import CENTRED_CASES, CENTRED_KINDS, MAIN, NAMES, known
from emulator.cases import KINDS, Case, bits, check_case, paged
from emulator.emulated import SANITIZE, EmulatedRunner

from kvstore_kernels.codecs import get_codec
from kvstore_kernels.codecs.centred import GREATEST_EXPONENT, LEAST_EXPONENT, CentredKey
from kvstore_kernels.cuda import check
from kvstore_kernels.cuda.program import program_for

SOME_KINDS = ("wide", "far", "void", "strengths", "brink")
OF_TOKENS = ("cancelling", "borders")
"""Kinds that show the order of sums, where pages are groups."""
RUNS = [
    (case, kind)
    for case in CENTRED_CASES
    for kind in (*KINDS, *CENTRED_KINDS)
    if (kind in SOME_KINDS or case == MAIN[0] or kind in OF_TOKENS)
    and (kind not in OF_TOKENS or case.page_tokens == case.layout.block_tokens)
]


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    with known():
        yield


def test_every_centred_codec_has_a_case() -> None:
    assert {case.codec for case in CENTRED_CASES} == set(NAMES) == set(CENTRED)


@pytest.mark.parametrize(("case", "kind"), RUNS, ids=str)
def test_kernels_give_the_reference_bytes_and_values(libraries: Path, case: Case, kind: str) -> None:
    check_case(EmulatedRunner(libraries), case, kind)


def test_numbers_have_all_kinds_of_vectors_and_exponents() -> None:
    """What the other tests rely on."""
    case, exponents = MAIN[0], set[int]()
    for kind in CENTRED_KINDS[:-2]:
        keys = paged(case, kind).blocks()[0][:, 0].permute(0, 2, 1, 3).float()
        (_, scales, _, _, found), void = CentredKey(4).encode(keys)
        exponents |= set(found.unique().tolist())
        far = int(scales.signbit().sum())
        assert (void > 0) == (kind in ("void", "brink"))
        assert kind not in ("void", "brink") or 20 < void < scales.numel() - 20
        assert kind != "far" or 20 < far < scales.numel() - 20
    assert exponents >= set(range(LEAST_EXPONENT, 13))


@pytest.mark.parametrize(("case", "seed"), [(MAIN[1], 1), (CENTRED_CASES[7], 2), (CENTRED_CASES[11], 1)], ids=str)
def test_kernels_do_not_depend_on_the_order_of_threads(libraries: Path, case: Case, seed: int) -> None:
    check_case(EmulatedRunner(libraries, seed=seed), case, "void", seed)


@pytest.mark.parametrize("kind", ["tiny", "finite_bits", "strengths"])
@pytest.mark.parametrize("case", [MAIN[0], CENTRED_CASES[4], CENTRED_CASES[5]], ids=str)
def test_kernels_give_the_same_bytes_when_denormals_are_flushed(libraries: Path, case: Case, kind: str) -> None:
    """CuPy compiles with ``-ftz=true``."""
    check_case(EmulatedRunner(libraries, flush_denormals=True), case, kind)


def test_kernels_do_nothing_undefined(libraries: Path) -> None:
    runner = EmulatedRunner(libraries, flags=SANITIZE)
    for kind in ("void", "any_bits"):
        check_case(runner, CENTRED_CASES[9], kind)


@pytest.mark.parametrize("case", [MAIN[1], CENTRED_CASES[8], CENTRED_CASES[9]], ids=str)
def test_any_codes_and_exponents_decode_to_the_reference_values(libraries: Path, case: Case) -> None:
    """Exponents that no encoder gives are brought within their bounds; a mean's code may be -128."""
    codec, source = get_codec(case.codec), paged(case, "keys")
    keys, _ = case.layout.planes
    at, rng = 0, np.random.default_rng(5)
    payloads, expected = [], []
    section = np.frombuffer(codec.encode(source.blocks()[0], case.layout).sections[0], np.uint8).copy()
    for region in codec.regions(keys, case.layout.block_tokens):
        if region.name not in ("scales", "mean_scales"):
            section[at : at + region.region_bytes] = rng.integers(0, 256, region.region_bytes, np.uint8)
        at += region.region_bytes
    assert section[-keys.dim :].view(np.int8).max() > GREATEST_EXPONENT
    for block in source.blocks():
        sections = [section.tobytes(), codec.encode(block, case.layout).sections[1]]
        payloads.append(b"".join(sections))
        expected.append(codec.decode(sections, case.layout))
    target = paged(case, "zeros")
    EmulatedRunner(libraries).decode(case, target, payloads)
    for decoded, reference in zip(target.blocks(), expected, strict=True):
        assert torch.equal(bits(decoded), bits(reference))


@pytest.mark.parametrize("kind", ["normal", "void"])
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_kernels_agree_with_those_of_the_cpu(libraries: Path, case: Case, kind: str) -> None:
    from kvstore_kernels import cpu

    codec, source = get_codec(case.codec), paged(case, kind)
    memory = np.zeros((len(source.pages), sum(codec.max_section_bytes(case.layout))), np.uint8)
    addresses = np.array([row.ctypes.data for row in memory], np.uint64)
    on_cpu = cpu.encode(codec, source.kv, source.pages, addresses)
    payloads, void_groups = EmulatedRunner(libraries).encode(case, source)
    assert [row.tobytes() for row in memory] == payloads
    assert on_cpu.void_groups.tolist() == void_groups


# ------------------------------------------------------------------ programs


@pytest.mark.parametrize(
    ("dim", "tokens", "threads", "tiles"),
    [
        *((64, 64, 64, 1), (64, 128, 128, 1), (128, 64, 128, 1), (128, 128, 256, 1), (128, 192, 128, 3)),
        *((192, 64, 192, 1), (192, 256, 192, 2), (256, 128, 256, 1), (320, 64, 160, 1), (512, 128, 256, 1)),
    ],
)
def test_block_of_threads_has_a_group(dim: int, tokens: int, threads: int, tiles: int) -> None:
    for dtype in ("bfloat16", "float32"):
        program, _ = program_for(CENTRED["centred3"], fast_kv(dtype, dim, tokens), 16)
        assert (program.threads, program.tiles[0]) == (threads, tiles)
        assert program.encode_shared_bytes <= 70 << 10


def test_shapes_that_the_kernels_do_not_take_are_refused_naming_what_does() -> None:
    codec = CENTRED["centred4"]
    check(codec, fast_kv(dim=512, tokens=128))
    with pytest.raises(ValueError, match="needs blocks of a multiple of 64 tokens, got 96"):
        check(codec, fast_kv(tokens=96))
    with pytest.raises(ValueError, match=r"multiple of 64, got 80: use kvstore_kernels\.cpu"):
        check(codec, fast_kv(dim=80))
    with pytest.raises(ValueError, match="more shared memory than GPUs have"):
        check(codec, fast_kv(dim=832))
