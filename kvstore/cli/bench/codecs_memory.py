"""What the codecs' benchmark works on: the same KV in one tensor and in an engine's pages, and room for the results.

Covers: making and placing it, reading single blocks of it for checks. Does not cover timing.

All of it is in private numpy arrays, whose pages are there: between two of them ``memmove`` is as fast as it gets. The
numbers are normally distributed, with a few key channels that stand out, as in large models.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil

from kvstore.errors import InsufficientMemory
from kvstore.sizes import format_size
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

__all__ = ["CONTIGUOUS", "PAGED", "PAGE_TOKENS", "Form", "KVMemory", "check_memory"]

CONTIGUOUS: Final = "contiguous"
PAGED: Final = "paged"
PAGE_TOKENS: Final = 16
"""Tokens of a page of the paged form, as in most engines."""

_AREAS: Final = 4
"""Arrays of the size of the KV: it in both forms, payloads, what is decoded."""

_SPARE_BYTES: Final = 512 << 20
_LINE_BYTES: Final = 64
_OUTLIER_EVERY: Final = 41
_OUTLIER_GAIN: Final = 8.0

Array = npt.NDArray[Any]


def check_memory(total_bytes: int, *, least_bytes: int = 0) -> None:
    """Whether the machine has room for KV of so many bytes in all the forms it takes.

    Raises:
        InsufficientMemory: it has not.
    """
    needed = _AREAS * total_bytes + _SPARE_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        fitting_mib = max(0, (available - _SPARE_BYTES) // _AREAS) >> 20
        advice = f"at most --mib {fitting_mib}" if fitting_mib << 20 >= max(least_bytes, 1) else "a larger machine"
        raise InsufficientMemory(
            f"measuring codecs on {format_size(total_bytes)} of KV takes {format_size(needed)} of memory and "
            f"{format_size(available)} are available; use {advice}"
        )


class Form:
    """KV of all blocks in one of two forms: where it is read, where decoded KV is written, and the pages of each block.

    Args:
        name: ``CONTIGUOUS`` or ``PAGED``.
        layout: of a block.
        source: ``[L, 2, tokens, H, D]``, or ``[L, 2, num_pages, PAGE_TOKENS, H, D]``.
        target: likewise.
        pages: ``[blocks, pages a block]`` int32.
    """

    def __init__(self, name: str, layout: KVLayout, source: Array, target: Array, pages: npt.NDArray[np.int32]) -> None:
        self.name = name
        self.pages = pages
        self._layout = layout
        self._target = target
        self.source = _paged_kv(layout, source)
        self.target = _paged_kv(layout, target)
        self._source = source

    def source_block(self, number: int) -> Array:
        """A copy of a block of the source, of the layout's shape."""
        return self._block(self._source, number)

    def target_block(self, number: int) -> Array:
        """A copy of a block of the target."""
        return self._block(self._target, number)

    def spoil_target(self, begin: int, end: int) -> None:
        """Put what no decoder gives into a part of each of these blocks of the target."""
        for number in range(begin, end):
            if self.name == CONTIGUOUS:
                first = self._target[-1, -1, number * self._layout.block_tokens]
            else:
                first = self._target[-1, -1, self.pages[number, 0], 0]
            first.view(np.uint8)[...] = 0xFF

    def _block(self, array: Array, number: int) -> Array:
        tokens = self._layout.block_tokens
        if self.name == CONTIGUOUS:
            return np.ascontiguousarray(array[:, :, number * tokens : (number + 1) * tokens])
        return array[:, :, self.pages[number]].reshape(self._layout.shape)


def _paged_kv(layout: KVLayout, array: Array) -> PagedKV:
    if array.ndim == 5:
        return PagedKV.from_tensor(layout, array)
    return PagedKV.from_layers(layout, list(array), axes="kv page token head dim")


class KVMemory:
    """KV of ``blocks`` blocks in both forms.

    Attributes:
        layout: of a block.
        blocks: how many.
        contiguous, paged: the two forms; the blocks of both have the same content.
        total_bytes: of the KV.
        source_address, target_address: of the contiguous form's arrays.

    Args:
        layout: of a block, of a dtype that the lossy codecs take.
        blocks: how many.

    Raises:
        InsufficientMemory: there is not enough.
    """

    def __init__(self, layout: KVLayout, blocks: int) -> None:
        self.layout = layout
        self.blocks = blocks
        self.total_bytes = blocks * layout.block_bytes
        check_memory(self.total_bytes, least_bytes=layout.block_bytes)
        layers, kinds, tokens, heads, dim = layout.shape
        pages = blocks * tokens // PAGE_TOKENS
        element = _element_dtype(layout)
        source = _aligned((layers, kinds, blocks * tokens, heads, dim), element)
        _fill(source, layout.dtype)
        order = np.random.default_rng(7).permutation(pages).astype(np.int32)
        paged = _aligned((layers, kinds, pages, PAGE_TOKENS, heads, dim), element)
        paged[:, :, order] = source.reshape(paged.shape)
        target = _aligned(source.shape, element)
        target.fill(0)
        self.source_address = int(source.ctypes.data)
        self.target_address = int(target.ctypes.data)
        self.contiguous = Form(CONTIGUOUS, layout, source, target, np.arange(blocks, dtype=np.int32).reshape(-1, 1))
        self.paged = Form(PAGED, layout, paged, target.reshape(paged.shape), order.reshape(blocks, -1))


def _aligned(shape: tuple[int, ...], element: npt.DTypeLike) -> Array:
    """An array that starts where a line of the cache does, as tensors of torch and of engines do."""
    length = math.prod(shape) * np.dtype(element).itemsize
    memory = np.empty(length + _LINE_BYTES, np.uint8)
    begin = -int(memory.ctypes.data) % _LINE_BYTES
    return memory[begin : begin + length].view(element).reshape(shape)


def _element_dtype(layout: KVLayout) -> npt.DTypeLike:
    """Numpy has no bfloat16: its bits stand for it."""
    return np.uint16 if layout.dtype == "bfloat16" else np.dtype(layout.dtype)


def _fill(kv: Array, dtype: str) -> None:
    """Each layer's keys and values are another stretch of one sequence of rows of random numbers."""
    layers, kinds, tokens, heads, dim = kv.shape
    step, rows = 2 * heads + 1, tokens * heads
    random = np.random.default_rng(1)
    for kind in range(kinds):
        numbers = random.standard_normal((rows + layers * step, dim), np.float32)
        if kind == 0:
            numbers[:, ::_OUTLIER_EVERY] *= _OUTLIER_GAIN
        drawn = _rounded(numbers, dtype)
        for layer in range(layers):
            kv[layer, kind] = drawn[layer * step : layer * step + rows].reshape(tokens, heads, dim)


def _rounded(numbers: npt.NDArray[np.float32], dtype: str) -> Array:
    if dtype != "bfloat16":
        return numbers.astype(dtype)
    bits = numbers.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
