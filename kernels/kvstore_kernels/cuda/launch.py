"""One launch: its program, its grid, and its arguments, as the kernels take them. Needs no GPU."""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore_kernels.codecs import Codec
from kvstore_kernels.cuda.program import Program, program_for
from kvstore_kernels.encoded import check_blocks
from kvstore_kernels.paged import PagedKV

__all__ = ["MAX_BLOCKS", "Launch", "Scalar"]

MAX_BLOCKS: Final = 65_535
"""Blocks of tokens of one launch: what a grid's z axis can be."""

Scalar = np.int32 | np.uint32 | np.int64 | np.uint64


class Launch:
    """Blocks of a codec to be encoded or decoded.

    What the kernels read besides KV and payloads is one piece of memory, ``inputs``, to be copied to the device; counts
    of void groups are its end, zero before an encoding.

    Args:
        codec: to use.
        kv: the pages.
        pages: int32 ``[blocks, kv.block_pages]``, 1 to ``MAX_BLOCKS`` blocks.
        payloads: uint64 ``[blocks]``.

    Attributes:
        program: to run.
        grid: blocks of threads.
        inputs: uint8.
        void_groups_at: byte of ``inputs`` where uint32 ``[blocks]`` begins.

    Raises:
        ValueError: an argument is out of range, or there are no kernels for this.
    """

    program: Program
    grid: tuple[int, int, int]
    inputs: npt.NDArray[np.uint8]
    void_groups_at: int

    def __init__(
        self, codec: Codec, kv: PagedKV, pages: npt.NDArray[np.int32], payloads: npt.NDArray[np.uint64]
    ) -> None:
        pages, payloads = check_blocks(kv, pages, payloads)
        blocks = len(pages)
        if not 1 <= blocks <= MAX_BLOCKS:
            raise ValueError(f"a launch is of 1 to {MAX_BLOCKS} blocks, got {blocks}")
        common = int(np.bitwise_or.reduce(payloads))
        self.program, plans = program_for(codec, kv, 16 if common % 16 == 0 else common & -common)
        tiles = (plan.planes.num_heads * count for plan, count in zip(plans, self.program.tiles, strict=True))
        self.grid = (sum(tiles), kv.layout.num_layers, blocks)
        arrays: list[npt.NDArray[Any]] = [payloads, *(section.bases for section in kv.sections), pages]
        parts = [_bytes_of(array) for array in (*arrays, np.zeros(blocks, np.uint32))]
        starts = list(itertools.accumulate((part.nbytes for part in parts), initial=0))
        self.inputs = np.concatenate(parts)
        self._payloads_at, *self._bases_at, self._pages_at, self.void_groups_at, _ = starts
        self._block_pages = kv.block_pages
        self._sections = [
            (
                (paged.page_stride, paged.token_stride, paged.head_stride),
                (plan.offset, *plan.strides),
                plan.planes.num_heads,
            )
            for plan, paged in zip(plans, kv.sections, strict=True)
        ]

    def arguments(self, address: int) -> list[Scalar]:
        """The kernels' arguments, with ``inputs`` at an address of the device."""
        arguments: list[Scalar] = [
            np.uint64(address + self._pages_at),
            np.uint32(self._block_pages),
            np.uint64(address + self._payloads_at),
            np.uint64(address + self.void_groups_at),
        ]
        for at, (strides, offsets, heads) in zip(self._bases_at, self._sections, strict=True):
            arguments += [np.uint64(address + at), *map(np.int32, strides), *map(np.int64, offsets), np.uint32(heads)]
        return arguments

    def void_groups(self, inputs: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Counts of void groups ``[blocks]`` out of ``inputs`` as a kernel left them."""
        return inputs[self.void_groups_at :].view(np.uint32).astype(np.int64)


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
