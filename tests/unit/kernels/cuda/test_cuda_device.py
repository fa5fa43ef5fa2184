"""What happens between the Python face and a device, with a CuPy that runs kernels on the emulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_centred import known
from emulator.cases import BLOCKS, CASES, Case, Paged, check_case, paged
from fakes.fake_cupy import FakeCupy, FakeStream

from kvstore_kernels import cuda
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda import blocks, device
from kvstore_kernels.layout import KVLayout


class FaceRunner:
    """Runs cases through the public functions."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream

    def encode(self, case: Case, pages: Paged) -> tuple[list[bytes], list[int]]:
        memory, addresses = payloads_of(case)
        kv = dataclasses.replace(pages.kv, device="cuda")
        encoded = cuda.encode(get_codec(case.codec), kv, pages.pages, addresses, threads=4, stream=self._stream)
        assert encoded.section_bytes.sum(1).tolist() == [memory.shape[1]] * BLOCKS
        return [row.tobytes() for row in memory], encoded.void_groups.tolist()

    def decode(self, case: Case, pages: Paged, payloads: Sequence[bytes]) -> None:
        memory, addresses = payloads_of(case)
        for row, payload in zip(memory, payloads, strict=True):
            row[:] = np.frombuffer(payload, np.uint8)
        codec, kv = get_codec(case.codec), dataclasses.replace(pages.kv, device="cuda")
        lengths = np.tile(np.array(codec.section_bytes(case.layout), np.int64), (BLOCKS, 1))
        cuda.decode(codec, kv, pages.pages, addresses, lengths, stream=self._stream)


def payloads_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    size = sum(get_codec(case.codec).max_section_bytes(case.layout))
    memory = np.zeros((BLOCKS, -(-size // 16) * 16 + 16), np.uint8)
    begin = -memory.ctypes.data % 16
    memory = memory[:, begin : begin + size]
    return memory, np.array([row.ctypes.data for row in memory], np.uint64)


@pytest.fixture
def cupy(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy(libraries)
    monkeypatch.setattr(device, "cupy_module", lambda: fake)
    device._compiled.cache_clear()
    return fake


@pytest.mark.parametrize("number", [0, 4, 6, 47])
def test_face_encodes_and_decodes_through_cupy(cupy: FakeCupy, number: int) -> None:
    check_case(FaceRunner(), CASES[number], "holes")


def test_one_launch_a_call_on_the_device_that_holds_the_pages(cupy: FakeCupy) -> None:
    check_case(FaceRunner(), CASES[4], "normal")
    launches = [line for line in cupy.log if line.startswith("kv_")]
    assert launches == ["kv_encode device 1 stream 0", "kv_decode device 1 stream 0"]
    assert cupy.log.count("RawModule") == 1
    assert cupy.log[-1] == "synchronize 0"
    assert cupy.devices == [0]


@pytest.mark.parametrize("stream", [77, "object"])
def test_given_stream_is_the_one_that_is_used_and_waited_for(cupy: FakeCupy, stream: Any) -> None:
    given = FakeStream(cupy, 77) if stream == "object" else stream
    check_case(FaceRunner(given), CASES[4], "normal")
    assert [line for line in cupy.log if line.startswith("kv_")] == [
        "kv_encode device 1 stream 77",
        "kv_decode device 1 stream 77",
    ]
    assert cupy.log[-1] == "synchronize 77"


def test_more_blocks_than_a_grid_has_room_for_take_several_launches(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCKS", 1)
    check_case(FaceRunner(), CASES[4], "holes")
    assert sum(line.startswith("kv_encode") for line in cupy.log) == BLOCKS


@pytest.mark.parametrize(
    "case",
    [
        Case("kivi4", KVLayout(1, 1, 256, "float32", 64), 16),
        Case("centred4", KVLayout(1, 2, 128, "bfloat16", 128), 16),
    ],
    ids=str,
)
def test_kernels_that_need_much_shared_memory_ask_for_it(cupy: FakeCupy, case: Case) -> None:
    with known():
        check_case(FaceRunner(), case, "normal")


def test_payloads_that_a_device_cannot_use_are_refused(cupy: FakeCupy) -> None:
    source = paged(CASES[4], "normal")
    _, addresses = payloads_of(CASES[4])
    cupy.unknown.add(int(addresses[0]))
    kv = dataclasses.replace(source.kv, device="cuda")
    with pytest.raises(ValueError, match="pin the memory"):
        cuda.encode(get_codec("kivi4"), kv, source.pages, addresses)
    assert cupy.log == []


def test_device_that_is_too_old_is_refused(libraries: Path, cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cupy_module", lambda: FakeCupy(libraries, "75"))
    with pytest.raises(cuda.CudaUnavailable, match=r"compute capability 7\.5, the CUDA kernels need 8\.0"):
        check_case(FaceRunner(), CASES[4], "normal")


def test_compiler_that_is_missing_is_named(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(cupy, "RawModule", fail)
    with pytest.raises(cuda.CudaUnavailable, match=r"libnvrtc.*kvstored\[cuda\]"):
        check_case(FaceRunner(), CASES[4], "normal")
