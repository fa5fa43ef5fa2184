"""The cases of the CUDA kernels on a GPU, and single functions of their arithmetic there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from emulator.cases import FILLER, Case, Paged
from emulator.probes import PROBES, Words, shared_source

from kvstore_kernels import cuda
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cuda import program
from kvstore_kernels.cuda.device import cupy_module
from kvstore_kernels.paged import PagedKV

REDZONE: Final = 256
"""Bytes around a payload that must stay as they are."""
PROBE_KERNEL: Final = """
KV_KERNEL(256, 1) kv_probe(u32 which, const u32* a, const u32* b, u32* r, u64 n) {
    for (u64 i = blockIdx.x * 256ull + threadIdx.x; i < n; i += gridDim.x * 256ull) r[i] = probe(which, a[i], b[i]);
}
"""


class GpuRunner:
    """Runs cases through the public functions, on payloads in device or in pinned host memory.

    Args:
        pinned: payloads are in host memory.
        stream: to run on.
    """

    def __init__(self, *, pinned: bool = False, stream: Any = None) -> None:
        self._cupy = cupy_module()
        self._pinned = pinned
        self._stream = stream

    def encode(self, case: Case, pages: Paged) -> tuple[list[bytes], list[int]]:
        codec, kv = get_codec(case.codec), self._on_device(case, pages)
        size = sum(codec.max_section_bytes(case.layout))
        memory, addresses = self._memory(len(pages.pages), size, case.offset)
        encoded = cuda.encode(codec, kv, pages.pages, addresses, stream=self._stream)
        rows = self._read(memory)
        begin = REDZONE + case.offset
        assert (rows[:, :begin] == FILLER).all()
        assert (rows[:, begin + size :] == FILLER).all()
        assert encoded.section_bytes.sum(1).tolist() == [size] * len(rows)
        return [row[begin : begin + size].tobytes() for row in rows], encoded.void_groups.tolist()

    def decode(self, case: Case, pages: Paged, payloads: Sequence[bytes]) -> None:
        codec, kv = get_codec(case.codec), self._on_device(case, pages)
        size, begin = len(payloads[0]), REDZONE + case.offset
        memory, addresses = self._memory(len(payloads), size, case.offset)
        rows = self._read(memory)
        for row, payload in zip(rows, payloads, strict=True):
            row[begin : begin + size] = np.frombuffer(payload, np.uint8)
        if self._pinned:
            memory[:] = rows
        else:
            memory.set(rows)
        lengths = np.tile(np.array(codec.section_bytes(case.layout), np.int64), (len(payloads), 1))
        cuda.decode(codec, kv, pages.pages, addresses, lengths, stream=self._stream)
        for layer, on_device in zip(pages.layers, kv.owner, strict=True):  # type: ignore[call-overload]
            raw = self._cupy.asnumpy(on_device).view(np.uint8).reshape(-1)
            layer.view(torch.uint8).reshape(-1)[:] = torch.from_numpy(raw)

    def _on_device(self, case: Case, pages: Paged) -> PagedKV:
        words = {1: torch.int8, 2: torch.float16, 4: torch.float32}[case.layout.element_bytes]
        if case.layout.dtype == "bfloat16":
            words = torch.int16
        layers = [self._cupy.asarray(layer.view(words).numpy()) for layer in pages.layers]
        return PagedKV.from_layers(case.layout, layers, case.axes)

    def _memory(self, blocks: int, size: int, offset: int) -> tuple[Any, npt.NDArray[np.uint64]]:
        """Rows of memory full of ``FILLER``, and the addresses of the payloads in them."""
        pitch = -(-(size + 2 * REDZONE + offset) // 256) * 256
        memory: Any
        if self._pinned:
            whole = self._cupy.cuda.alloc_pinned_memory(blocks * pitch + 256)
            flat = np.frombuffer(whole, np.uint8)
            begin = -flat.ctypes.data % 256
            memory = flat[begin : begin + blocks * pitch].reshape(blocks, pitch)
            first = memory.ctypes.data
        else:
            memory = self._cupy.empty((blocks, pitch), np.uint8)
            first = memory.data.ptr
        memory[:] = FILLER
        return memory, np.uint64(first + REDZONE + offset) + np.arange(blocks, dtype=np.uint64) * np.uint64(pitch)

    def _read(self, memory: Any) -> npt.NDArray[np.uint8]:
        rows: npt.NDArray[np.uint8] = memory.copy() if self._pinned else self._cupy.asnumpy(memory)
        return rows


def probe_source() -> str:
    """A kernel that calls single functions on the device."""
    return program._source("primitives.cuh") + shared_source() + PROBE_KERNEL


class GpuProbes:
    """As ``HostProbes``, on the device; denormals are flushed, as in the kernels."""

    def __init__(self) -> None:
        self._cupy = cupy_module()
        module = self._cupy.RawModule(code=probe_source(), options=program.COMPILER_OPTIONS, backend="nvrtc")
        self._run = module.get_function("kv_probe")

    def __call__(self, name: str, a: Words, b: Words | None = None) -> Words:
        first = self._cupy.asarray(a)
        second = first if b is None else self._cupy.asarray(b)
        result = self._cupy.empty(len(a), np.uint32)
        self._run((1024,), (256,), (np.uint32(PROBES.index(name)), first, second, result, np.uint64(len(a))))
        words: Words = self._cupy.asnumpy(result)
        return words
