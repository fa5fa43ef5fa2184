"""The unmodified CUDA kernels on the emulator: bytes and values are those of the reference and of the CPU's kernels."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_budgets import fast_kv
from cuda_centred import CENTRED_CASES, NAMES
from emulator.cases import BLOCKS, CASES, FAST, KINDS, Case, check_case, compare_sections, paged
from emulator.emulated import SANITIZE, Bytes, EmulatedRunner, KernelFault, Memory
from golden_codecs import BLOCKS as BLOCKS_OF
from golden_codecs import golden, golden_block, golden_names, sha256_of

from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.cuda import check
from kvstore_kernels.layout import MLALayout, Rule

MAIN = CASES[: len(FAST)]
"""Each codec once, in its fastest form."""
SOME_KINDS = ("normal", "finite_bits", "offset", "holes", "wide")
GOLDEN = [
    (block, codec)
    for block, codec in golden_names()
    if codec in (*FAST, *NAMES)
    and all(planes.dim % 64 == 0 or planes.rule is Rule.EXACT for planes in BLOCKS_OF[block].planes)
]
"""Golden blocks whose dimensions the kernels take."""
ROOT = Path(__file__).parents[4]


def test_every_codec_that_has_kernels_has_a_case() -> None:
    taken = set()
    for name, codec in CODECS.items():
        with contextlib.suppress(ValueError):
            check(codec, fast_kv())
            taken.add(name)
    assert {case.codec for case in CASES} == set(FAST)
    assert taken == {case.codec for case in (*CASES, *CENTRED_CASES)}


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in (KINDS if case in MAIN else SOME_KINDS)],
    ids=str,
)
def test_kernels_give_the_reference_bytes_and_values(libraries: Path, case: Case, kind: str) -> None:
    check_case(EmulatedRunner(libraries), case, kind)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_kernels_do_not_depend_on_the_order_of_threads(libraries: Path, case: Case, seed: int) -> None:
    check_case(EmulatedRunner(libraries, seed=seed), case, "wide", seed)


@pytest.mark.parametrize("kind", ["tiny", "wide", "finite_bits", "holes"])
@pytest.mark.parametrize("case", [*MAIN, CASES[24], CASES[27]], ids=str)
def test_kernels_give_the_same_bytes_when_denormals_are_flushed(libraries: Path, case: Case, kind: str) -> None:
    """CuPy compiles with ``-ftz=true``."""
    check_case(EmulatedRunner(libraries, flush_denormals=True), case, kind)


def test_fp8_by_instruction_gives_the_same_bytes_as_in_steps(libraries: Path) -> None:
    """From compute capability 8.9 on, an instruction converts to E4M3; the host finds its result by search."""
    runner = EmulatedRunner(libraries, flags=("-DEMULATOR_HARDWARE_E4M3",))
    for kind in ("normal", "ties", "wide", "tiny"):
        check_case(runner, MAIN[1], kind)


@pytest.mark.parametrize("case", [MAIN[4], MAIN[7], CASES[31]], ids=str)
def test_kernels_do_nothing_undefined(libraries: Path, case: Case) -> None:
    runner = EmulatedRunner(libraries, flags=SANITIZE)
    for kind in ("wide", "any_bits"):
        check_case(runner, case, kind)


@pytest.mark.parametrize(("block", "codec"), GOLDEN)
def test_kernels_give_the_golden_bytes(libraries: Path, block: str, codec: str) -> None:
    expected = golden(block, codec)
    axes = "page token dim" if isinstance(expected.layout, MLALayout) else "kv page token head dim"
    case = Case(codec, expected.layout, 16, axes)
    source = paged(case, "zeros")
    for of_page, whole in zip(source.layers, golden_block(block), strict=True):
        at = axes.split().index("page")
        for pages in source.pages:
            for number, page in enumerate(pages.tolist()):
                tokens = slice(16 * number, 16 * number + 16)
                of_page.select(at, page)[:] = whole[tokens] if at == 0 else whole[:, tokens]
    runner = EmulatedRunner(libraries)
    payloads, void_groups = runner.encode(case, source)
    assert void_groups == [expected.void_groups] * BLOCKS
    for number, payload in enumerate(payloads):
        compare_sections(get_codec(codec), expected.layout, number, expected.sections, payload)
    runner.decode(case, source, payloads)
    assert {sha256_of(decoded) for decoded in source.blocks()} == {expected.decoded_sha256}


@pytest.mark.parametrize("kind", ["normal", "holes"])
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_kernels_agree_with_those_of_the_cpu(libraries: Path, case: Case, kind: str) -> None:
    from kvstore_kernels import cpu

    codec, source = get_codec(case.codec), paged(case, kind)
    size = sum(codec.max_section_bytes(case.layout))
    memory = np.zeros((BLOCKS, size), np.uint8)
    addresses = np.array([row.ctypes.data for row in memory], np.uint64)
    on_cpu = cpu.encode(codec, source.kv, source.pages, addresses)
    payloads, void_groups = EmulatedRunner(libraries).encode(case, source)
    assert [row.tobytes() for row in memory] == payloads
    assert on_cpu.void_groups.tolist() == void_groups


@pytest.mark.slow
def test_kernels_run_under_the_address_sanitizer(libraries: Path) -> None:
    """In a process of its own, whose first library must be the sanitizer's."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("g++ has no sanitizers' libraries")
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT / 'kernels')]!r}\n"
        "from pathlib import Path\n"
        "from emulator.cases import CASES, check_case\n"
        "from emulator.emulated import SANITIZE, EmulatedRunner\n"
        "flags = ('-fsanitize=address', *SANITIZE, '-DEMULATOR_STACK_BYTES=(512 << 10)')\n"
        f"runner = EmulatedRunner(Path({str(libraries)!r}), flags=flags)\n"
        "for number in (4, 28, 31): check_case(runner, CASES[number], 'normal')\n"
        "print('clean')\n"
    )
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "clean" in done.stdout


def test_emulator_reports_memory_that_a_launch_was_not_given(libraries: Path) -> None:
    class Short(EmulatedRunner):
        """Keeps the payloads' last bytes from a launch."""

        def _memory(self, payload: Bytes, written: bool) -> Memory:
            return Memory(payload[:-16], written)

    with pytest.raises(KernelFault, match="outside of all memory|past the end"):
        check_case(Short(libraries), MAIN[4], "normal")
