"""The Python face of the CUDA kernels without a GPU: what is refused, what a launch is, what a missing part says."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_budgets import fast_kv

from kvstore_kernels import cuda
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda import cupy_cache
from kvstore_kernels.cuda.launch import Launch
from kvstore_kernels.cuda.program import program_for
from kvstore_kernels.encoded import check_lengths
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV, PagedPlanes

ROOT = Path(__file__).parents[4]
KV = fast_kv()


def with_planes(**changes: Any) -> PagedKV:
    sections = tuple(dataclasses.replace(planes, **changes) for planes in KV.sections)
    return dataclasses.replace(KV, sections=sections)


@pytest.mark.parametrize("codec", ["lossless", "lossless-zstd"])
def test_lossless_codecs_are_refused_naming_the_cpu(codec: str) -> None:
    with pytest.raises(ValueError, match=r"no CUDA kernels: use kvstore_kernels\.cpu"):
        cuda.check(get_codec(codec), KV)


@pytest.mark.parametrize("dim", [16, 80, 96, 112])
def test_dimensions_that_the_kernels_do_not_take_are_refused_naming_what_does(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 64, got {dim}: use kvstore_kernels\.cpu, or codec raw"):
        cuda.check(get_codec("int8"), fast_kv(dim=dim))
    cuda.check(get_codec("raw"), fast_kv(dim=dim))


def test_head_of_too_many_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1024 channels"):
        cuda.check(get_codec("int8"), fast_kv(dim=1088))
    with pytest.raises(ValueError, match="shared memory"):
        cuda.check(get_codec("kivi4"), fast_kv(dim=512, dtype="float32"))
    cuda.check(get_codec("kivi4"), fast_kv(dim=512))
    cuda.check(get_codec("kivi4"), fast_kv(dim=256, dtype="float32"))


def test_pages_on_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"use kvstore_kernels\.cpu"):
        cuda.check(get_codec("int4"), dataclasses.replace(KV, device="cpu"))


def test_channels_that_lie_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="side by side, got 32 bytes"):
        cuda.check(get_codec("raw"), with_planes(element_stride=32))


@pytest.mark.parametrize("stride", ["page_stride", "token_stride", "head_stride"])
def test_strides_that_are_no_multiple_of_16_are_refused(stride: str) -> None:
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        cuda.check(get_codec("turbo4"), with_planes(**{stride: 264}))
    cuda.check(get_codec("raw"), with_planes(**{stride: 264}))


def test_stride_beyond_two_gigabytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 2147483647 bytes"):
        cuda.check(get_codec("raw"), with_planes(page_stride=1 << 31))


def test_odd_payloads_are_refused_but_for_raw() -> None:
    pages, payloads = np.zeros((1, 4), np.int32), np.array([4097], np.uint64)
    with pytest.raises(ValueError, match="even addresses"):
        Launch(get_codec("int4"), KV, pages, payloads)
    assert "Exact<Shape<128, 64, 16, 2, 128>, 256, 1>" in Launch(get_codec("raw"), KV, pages, payloads).program.source


def test_pages_and_payloads_that_do_not_fit_are_refused() -> None:
    codec = get_codec("int8")
    with pytest.raises(ValueError, match=r"whole numbers \[blocks, 4\]"):
        cuda.encode(codec, KV, np.zeros((2, 3), np.int32), np.zeros(2, np.uint64))
    with pytest.raises(ValueError, match="0 to 1023, got 0 to 1024"):
        cuda.encode(codec, KV, np.array([[0, 1, 2, 1024]], np.int32), np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="expected 1 addresses"):
        cuda.encode(codec, KV, np.zeros((1, 4), np.int32), np.zeros(2, np.uint64))


def test_section_lengths_that_are_not_the_codecs_are_refused_naming_the_block() -> None:
    codec = get_codec("int8")
    lengths = np.tile(np.array(codec.section_bytes(KV.layout), np.int64), (2, 1))
    check_lengths(codec, KV, 2, lengths)
    lengths[1, 0] -= 1
    with pytest.raises(ValueError, match="block 1: codec int8 has sections of"):
        cuda.decode(codec, KV, np.zeros((2, 4), np.int32), np.zeros(2, np.uint64), lengths)


def test_no_blocks_need_no_device() -> None:
    codec = get_codec("kivi4")
    encoded = cuda.encode(codec, KV, np.zeros((0, 4), np.int32), np.zeros(0, np.uint64))
    assert encoded.section_bytes.shape == (0, 2)
    assert encoded.void_groups.shape == (0,)
    cuda.decode(codec, KV, np.zeros((0, 4), np.int32), np.zeros(0, np.uint64), np.zeros((0, 2), np.int64))


def test_launch_covers_all_tiles_layers_and_blocks() -> None:
    launch = Launch(get_codec("kivi4"), KV, np.zeros((5, 4), np.int32), np.full(5, 4096, np.uint64))
    assert launch.program.tiles == (1, 1)
    assert launch.program.threads == 128
    assert launch.grid == (8 * 1 + 8 * 1, 32, 5)


@pytest.mark.parametrize(("payload", "align"), [(4096, 16), (4098, 2), (4104, 2)])
def test_alignment_of_payloads_chooses_the_program(payload: int, align: int) -> None:
    launch = Launch(get_codec("int4"), KV, np.zeros((1, 4), np.int32), np.array([payload], np.uint64))
    assert f"Shape<128, 64, 16, {align}, 128>" in launch.program.source


def test_sections_that_begin_at_no_multiple_of_16_choose_the_program_for_that() -> None:
    assert "Shape<128, 64, 16, 2, 128>" in program_for(get_codec("fp8"), fast_kv(layers=3, heads=1), 256)[0].source
    assert "Shape<128, 64, 16, 16, 128>" in program_for(get_codec("fp8"), KV, 256)[0].source


def test_a_program_is_made_once() -> None:
    assert program_for(get_codec("int4"), KV, 256)[0] is program_for(get_codec("int4"), fast_kv(), 16)[0]


def test_bases_reach_the_kernels_as_they_are() -> None:
    layout = KVLayout(2, 1, 64, "float16", 64)
    planes = [PagedPlanes(np.array([16 * n, 32 * n], np.int64), 4096, 128, 128, 2) for n in (1, 5)]
    kv = PagedKV(layout, 16, 9, (planes[0], planes[1]), "cuda", None)
    launch = Launch(get_codec("int8"), kv, np.array([[3, 1, 2, 8]], np.int32), np.array([1024], np.uint64))
    words = launch.inputs[:40].view(np.int64).tolist()
    assert words == [1024, 16, 32, 80, 160]
    assert launch.inputs[40:56].view(np.int32).tolist() == [3, 1, 2, 8]
    arguments = [int(value) for value in launch.arguments(1 << 40)]
    assert arguments[:4] == [(1 << 40) + 40, 4, 1 << 40, (1 << 40) + 56]
    assert arguments[4:13] == [(1 << 40) + 8, 4096, 128, 128, 0, 0, 0, 0, 1]


# ------------------------------------------------------------------ without CuPy, a driver or a home


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CUPY", "KVSTORE", "XDG"))}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT / 'kernels')]!r}\n{program}",
        ],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


CALL = """
import numpy as np
from cuda_budgets import fast_kv
from kvstore_kernels import cuda
from kvstore_kernels.codecs import get_codec
try:
    cuda.encode(get_codec("kivi4"), fast_kv(), np.zeros((1, 4), np.int32), np.full(1, 4096, np.uint64))
except cuda.CudaUnavailable as error:
    print(error)
"""


def test_without_cupy_the_error_says_what_to_install() -> None:
    done = run(f"sys.modules['cupy'] = None\n{CALL}")
    assert "need CuPy" in done.stdout, done.stderr
    assert "pip install 'kvstored[cuda]'" in done.stdout


def test_without_a_device_the_error_says_so() -> None:
    pytest.importorskip("cupy")
    done = run(CALL, CUDA_VISIBLE_DEVICES="")
    assert "CuPy finds no CUDA device" in done.stdout, done.stderr


def test_importing_the_package_loads_no_heavy_module() -> None:
    done = run("import kvstore_kernels.cuda; print(sorted({'cupy', 'torch', 'numba'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_cache_of_cupy_is_left_alone_where_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cupy_cache.ensure_cache_directory()
    assert "CUPY_CACHE_DIR" not in os.environ
    assert (tmp_path / ".cupy" / "kernel_cache").is_dir()


def test_cache_of_cupy_moves_where_the_home_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("KVSTORE_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    cupy_cache.ensure_cache_directory()
    assert os.environ.pop("CUPY_CACHE_DIR") == str(tmp_path / "kept" / "cupy")


def test_cache_of_cupy_is_this_process_s_own_where_nothing_can_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for name in ("HOME", "KVSTORE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    cupy_cache.ensure_cache_directory()
    directory = Path(os.environ.pop("CUPY_CACHE_DIR"))
    assert directory.stat().st_mode & 0o777 == 0o700
    assert "KVSTORE_CACHE_DIR" in caplog.text
    directory.rmdir()


def test_directory_that_others_may_write_to_holds_no_code(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    assert not cupy_cache._usable(directory)
    directory.chmod(0o700)
    assert cupy_cache._usable(directory)
