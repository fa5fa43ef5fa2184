"""The CUDA kernels on a GPU: primitives against the host bit by bit, kernels against the reference and the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cuda_budgets
import numpy as np
import pytest
import torch
from cuda_budgets import fast_program
from cuda_centred import CENTRED_CASES, CENTRED_KINDS, MAIN, NAMES, known
from emulator.cases import CASES, FAST, KINDS, Case, check_case, fill
from emulator.probes import HostProbes
from gpu_cases import GpuProbes, GpuRunner

from kvstore_kernels import cpu, cuda
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda.device import CudaUnavailable, _compiled, cupy_module
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

pytestmark = pytest.mark.gpu

FLOATS = ("float_to_half", "floats_to_halves", "floats_to_bfloats", "e4m3_in_steps", "e4m3_pair")
"""Checked on every float32."""
PAIRS = ("least_bfloats", "greatest_bfloats", "least_halves", "greatest_halves", "least", "greatest", "pick_bytes")
OPERATIONS = ("reciprocal", "square_root", "divide", "add", "multiply", "int_to_float", "minimum", "maximum")


RUNS = [(case, kind) for case in CASES for kind in KINDS]
RUNS += [(case, kind) for case in CENTRED_CASES for kind in (*KINDS, *CENTRED_KINDS[:-2])]
RUNS += [(case, kind) for case in CENTRED_CASES[5:10:4] for kind in CENTRED_KINDS[-2:]]


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> Iterator[None]:
    try:
        cupy_module()
    except CudaUnavailable as error:
        pytest.skip(str(error))
    with known():
        yield


@pytest.fixture(scope="module")
def host(libraries: Path) -> HostProbes:
    return HostProbes(libraries)


@pytest.fixture(scope="module")
def device() -> GpuProbes:
    return GpuProbes()


def differ(expected: np.ndarray, got: np.ndarray, *, floats: bool) -> np.ndarray:
    """Where results differ; NaN is NaN, and where results are float32 those beside denormals are left out."""
    if not floats:
        return np.flatnonzero(expected != got)
    magnitude = expected & 0x7FFFFFFF
    same_nan = (magnitude > 0x7F800000) & ((got & 0x7FFFFFFF) > 0x7F800000)
    flushed = (magnitude < 0x00800000) & ((got & 0x7FFFFFFF) < 0x00800000)
    return np.flatnonzero((expected != got) & ~same_nan & ~flushed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOATS)
def test_conversions_of_every_float_are_those_of_the_host(host: HostProbes, device: GpuProbes, name: str) -> None:
    step = 1 << 24
    for begin in range(0, 1 << 32, step):
        words = np.arange(begin, begin + step, dtype=np.uint64).astype(np.uint32)
        if name.startswith("e4m3"):
            words = words[np.isfinite(words.view(np.float32))]
        # Denormals are flushed on the way in; every result of them is a zero of their sign, or the least number.
        normal = words[((words & 0x7F800000) != 0) | ((words & 0x7FFFFFFF) == 0)]
        wrong = np.flatnonzero(host(name, normal) != device(name, normal))
        assert not len(wrong), f"{name}({normal[wrong[0]]:#010x})"


def test_halves_and_e4m3_of_every_code_are_those_of_the_host(host: HostProbes, device: GpuProbes) -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    for name in ("half_to_float", "e4m3_to_halves"):
        assert not len(differ(host(name, words), device(name, words), floats=True))


@pytest.mark.parametrize("name", [*PAIRS, *OPERATIONS])
def test_operations_are_those_of_the_host(host: HostProbes, device: GpuProbes, name: str) -> None:
    rng = np.random.default_rng(0)
    special = np.array(
        [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000, 0x7F80FF80, 0x7C00FC00], np.uint32
    )
    pairs = np.array(np.meshgrid(special, special), np.uint32).reshape(2, -1)
    a, b = np.concatenate([rng.integers(0, 1 << 32, (2, 1 << 24), np.uint32), pairs], 1)
    if name in OPERATIONS or name in ("least", "greatest"):
        normal = np.all([((x & 0x7F800000) != 0) | ((x & 0x7FFFFFFF) == 0) for x in (a, b)], 0)
        a, b = a[normal], b[normal]
    wrong = differ(host(name, a, b), device(name, a, b), floats=name in OPERATIONS or name in ("least", "greatest"))
    assert not len(wrong), f"{name}({a[wrong[0]]:#010x}, {b[wrong[0]]:#010x})"


def test_turbo_cells_are_those_of_the_host(host: HostProbes, device: GpuProbes) -> None:
    y = np.arange(-23171, 23172).astype(np.uint32)
    place = host("fused_unit", y)
    assert (place == device("fused_unit", y)).all()
    assert (host("fused_down", place) == device("fused_down", place)).all()


@pytest.mark.parametrize(("case", "kind"), RUNS, ids=str)
def test_kernels_on_a_gpu_give_the_reference_bytes_and_values(case: Case, kind: str) -> None:
    check_case(GpuRunner(), case, kind)


@pytest.mark.parametrize("case", [*CASES[: len(FAST)], *MAIN], ids=str)
def test_kernels_on_a_gpu_reach_pinned_memory(case: Case) -> None:
    check_case(GpuRunner(pinned=True), case, "wide")


def test_kernels_on_a_gpu_run_on_a_given_stream() -> None:
    cupy = cupy_module()
    stream = cupy.cuda.Stream(non_blocking=True)
    check_case(GpuRunner(stream=stream), CASES[4], "normal")
    check_case(GpuRunner(stream=stream.ptr), CASES[6], "normal")


def test_unpinned_memory_is_refused_before_it_is_touched() -> None:
    cupy = cupy_module()
    layout = KVLayout(1, 1, 128, "float16", 64)
    kv = PagedKV.from_tensor(layout, cupy.zeros((1, 2, 64, 1, 128), np.float16))
    payload = np.zeros(1 << 16, np.uint8)
    with pytest.raises(ValueError, match="pin the memory|not known to CUDA"):
        cuda.encode(get_codec("int8"), kv, np.zeros((1, 1), np.int32), np.array([payload.ctypes.data], np.uint64))


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 64, 257])
@pytest.mark.parametrize("codec", [*FAST, *NAMES])
def test_launches_of_many_blocks_give_the_bytes_of_the_cpu(codec: str, blocks: int) -> None:
    cupy = cupy_module()
    layout, method = KVLayout(2, 2, 128, "bfloat16", 64), get_codec(codec)
    tensor = fill("wide", (2, 2, 64 * blocks, 2, 128), "bfloat16", blocks)
    size = sum(method.max_section_bytes(layout))
    pages = np.random.default_rng(blocks).permutation(blocks).astype(np.int32)[:, None]
    memory = np.zeros((blocks, size), np.uint8)
    rows = np.array([row.ctypes.data for row in memory], np.uint64)
    expected = cpu.encode(method, PagedKV.from_tensor(layout, tensor), pages, rows)
    on_device = cupy.zeros((blocks, -(-size // 256) * 256), np.uint8)
    addresses = np.uint64(on_device.data.ptr) + np.arange(blocks, dtype=np.uint64) * np.uint64(on_device.shape[1])
    kv = PagedKV.from_tensor(layout, cupy.asarray(tensor.view(torch.int16).numpy()))
    encoded = cuda.encode(method, kv, pages, addresses)
    assert (cupy.asnumpy(on_device)[:, :size] == memory).all()
    assert encoded.void_groups.tolist() == expected.void_groups.tolist()


@pytest.mark.parametrize("codec", cuda_budgets.NAMES)
def test_kernels_spill_nothing_on_this_device(codec: str) -> None:
    module = _compiled(fast_program(codec), 0)
    for kernel in ("kv_encode", "kv_decode"):
        assert module.get_function(kernel).local_size_bytes == 0
