"""Single blocks through the CPU's kernels, in memory with guards around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from kvstore_kernels import cpu
from kvstore_kernels.codecs import Codec, Encoded
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

GUARD_BYTES: Final = 256
_GUARD: Final = 0xA5
_LINE_BYTES: Final = 64


class Guarded:
    """Memory of so many bytes, at so many bytes from a line's start, and whether what is around it is untouched."""

    def __init__(self, length: int, offset: int = 0) -> None:
        self._memory = np.full(length + 2 * GUARD_BYTES + _LINE_BYTES, _GUARD, np.uint8)
        self._begin = GUARD_BYTES + (offset - self._memory.ctypes.data - GUARD_BYTES) % _LINE_BYTES
        self.data = self._memory[self._begin : self._begin + length]
        self.address = int(self.data.ctypes.data)

    def check(self) -> None:
        around = np.delete(self._memory, slice(self._begin, self._begin + len(self.data)))
        assert (around == _GUARD).all(), "bytes around the memory were written"

    def tensor(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.from_numpy(self.data).view(getattr(torch, dtype)).view(tuple(shape))


def first_block() -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.zeros((1, 1), np.int32)


def encoded_by_cpu(codec: Codec, block: torch.Tensor, layout: Layout, *, threads: int = 1) -> Encoded:
    """Encode one block; nothing but its sections is written."""
    lengths = codec.section_bytes(layout) or codec.max_section_bytes(layout)
    payload = Guarded(sum(lengths), offset=16)
    addresses = np.array([payload.address], np.uint64)
    result = cpu.encode(codec, PagedKV.from_tensor(layout, block), first_block(), addresses, threads=threads)
    payload.check()
    sections, at = [], 0
    for length in result.section_bytes[0].tolist():
        sections.append(payload.data[at : at + length].tobytes())
        at += length
    return Encoded(sections, int(result.void_groups[0]))


def decoded_by_cpu(
    codec: Codec, sections: Sequence[bytes], layout: Layout, *, offset: int = 0, threads: int = 1
) -> torch.Tensor:
    """Decode one block to memory at so many bytes from a line's start; nothing else is written."""
    target = Guarded(layout.block_bytes, offset)
    data = np.frombuffer(b"".join(sections), np.uint8)
    block = target.tensor(layout.shape, layout.dtype)
    cpu.decode(
        codec,
        PagedKV.from_tensor(layout, block),
        first_block(),
        np.array([data.ctypes.data], np.uint64),
        np.array([[len(section) for section in sections]]),
        threads=threads,
    )
    target.check()
    return block
