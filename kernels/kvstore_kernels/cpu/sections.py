"""Sections of blocks to and from an engine's pages: the table that compiled functions read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore_kernels.codecs import Region
from kvstore_kernels.cpu import work
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.layout import ELEMENT_BYTES, Planes
from kvstore_kernels.paged import PagedPlanes

__all__ = ["LINE_BYTES", "Dense", "Job", "Kernel", "Method", "Order", "Plan", "address_of", "row_offsets"]

Kernel = Callable[[Kind, int, int], Any]
"""A compiled function of a kind, the address of the work and that of a thread's place."""

_ITEM_BYTES: Final = 512 << 10
"""About so many bytes of planes are an item: enough to hide the taking, little enough to share evenly."""
LINE_BYTES: Final = 64
"""Of a line of the processor's caches."""
_WORDS: Final = work.WORK_BYTES >> 3


class Order(Enum):
    """Which rows a kernel takes as those of one plane, and in which order.

    ``PLANE``: those of one plane. ``PLACES``: those of all planes of a layer, in the order of a section. ``MEMORY``:
    likewise, in the order of the engine's memory.
    """

    PLANE = "plane"
    PLACES = "places"
    MEMORY = "memory"


class Method(NamedTuple):
    """How to encode and decode planes.

    Attributes:
        encode: compiled function.
        decode: compiled function.
        kind: that both are compiled for; whether to store past the cache is decided here.
        encode_order: of the rows that ``encode`` takes.
        decode_order: of the rows that ``decode`` takes.
        scratch_bytes: of a thread's scratch memory, a multiple of a line.
    """

    encode: Kernel
    decode: Kernel
    kind: Kind
    encode_order: Order
    decode_order: Order
    scratch_bytes: int = work.SCRATCH_BYTES


@dataclass(frozen=True, slots=True)
class Dense:
    """Where planes that are copied as they are lie in their section, in bytes."""

    offset: int
    layer_stride: int
    token_stride: int
    head_stride: int


def row_offsets(where: PagedPlanes, pages: npt.NDArray[np.int32], page_tokens: int) -> npt.NDArray[np.int64]:
    """Bytes from the start of a plane to each token's row, contiguous ``[blocks, tokens]``."""
    of_page = np.multiply(pages[:, :, None], where.page_stride, dtype=np.int64)
    offsets: npt.NDArray[np.int64] = of_page + _token_offsets(page_tokens, where.token_stride)
    return offsets.reshape(len(pages), pages.shape[1] * page_tokens)


@functools.lru_cache(maxsize=64)
def _token_offsets(page_tokens: int, token_stride: int) -> npt.NDArray[np.int64]:
    """Bytes from the start of a page to the row of each of its tokens."""
    return np.arange(page_tokens, dtype=np.int64) * token_stride


class Plan:
    """How one section of blocks, or a part of one, is encoded or decoded; which blocks is said with each ``job``.

    Args:
        method: does it.
        planes: what is in the section.
        where: the planes are in the engine's memory.
        block_tokens: tokens of a block.
        form: what is in a section: regions, or planes as they are.
        decoding: whether planes are written.

    Attributes:
        kernel: the compiled function.
        kind: that it is called with.
        place_bytes: of a thread's place.
        table: words of the work that are the same with each job.
        block_items: items of a block.
        block_plane_bytes: of the planes of a block.
    """

    def __init__(
        self,
        method: Method,
        planes: Planes,
        where: PagedPlanes,
        block_tokens: int,
        form: Sequence[Region] | Dense,
        *,
        decoding: bool,
    ) -> None:
        order = method.decode_order if decoding else method.encode_order
        element_bytes = ELEMENT_BYTES[planes.dtype]
        row_bytes = planes.dim * element_bytes
        staged = where.element_stride != element_bytes
        by_row = order is not Order.PLANE and not staged
        heads, dim = planes.num_heads, planes.dim
        if isinstance(form, Dense) and where.head_stride == row_bytes and not staged:
            # Rows of all heads lie side by side in both places: one copy a token.
            heads, dim = 1, heads * dim
        layer_bytes = planes.num_heads * block_tokens * row_bytes
        item_layers = min(max(1, _ITEM_BYTES // layer_bytes), planes.num_layers)
        streaming = decoding and not staged and _whole_lines(where, row_bytes)
        order, row_heads = (order, heads) if by_row else (Order.PLANE, 1)
        self.kernel = method.decode if decoding else method.encode
        self.kind = replace(method.kind, streaming=True) if streaming else method.kind
        staged_at = work.SCRATCH + method.scratch_bytes
        self.place_bytes = staged_at + (block_tokens * row_bytes if staged else 0)
        self.block_items = -(-planes.num_layers // item_layers)
        self.block_plane_bytes = planes.num_layers * layer_bytes
        # The table has their addresses.
        self._bases = np.ascontiguousarray(where.bases, np.int64)
        self._staged_rows = np.arange(block_tokens, dtype=np.int64) * row_bytes
        self._row_table = _row_table(block_tokens, row_heads, where.head_stride, where.token_stride, order)
        words = {
            work.ITEM_LAYERS: item_layers,
            work.LAYERS: planes.num_layers,
            work.HEADS: 1 if by_row else heads,
            work.ROW_COUNT: block_tokens * row_heads,
            work.DIM: dim,
            work.BASES: address_of(self._bases),
            work.HEAD_STRIDE: where.head_stride,
            work.ELEMENT_STRIDE: where.element_stride,
            work.ELEMENT_BYTES: element_bytes,
            work.STAGED_ROWS: address_of(self._staged_rows) if staged else 0,
            work.DECODING: int(decoding),
            work.BLOCK_TOKENS: block_tokens,
            work.ROW_TABLE: address_of(self._row_table),
            work.STAGED: staged_at,
            **_form_words(form, planes.num_layers * (1 if by_row else heads)),
        }
        self.table = np.array([words.get(offset, 0) for offset in range(0, work.WORK_BYTES, 8)], np.int64)


class Job:
    """The encoding or decoding of one section of many blocks, ready to be run by any number of threads.

    Args:
        plan: how.
        rows: bytes from the start of a plane to each token's row, contiguous int64 ``[blocks, tokens]``.
        sections: addresses of the blocks' sections, int64 ``[blocks]``.

    Attributes:
        plan: how.
        voids: void groups of each block, when it has run.
    """

    def __init__(self, plan: Plan, rows: npt.NDArray[np.int64], sections: npt.NDArray[np.int64]) -> None:
        blocks = len(sections)
        self.plan = plan
        self._rows = rows
        # Asking an array where it is takes as long as an operation of numpy, so all that is small has one address.
        self._memory = memory = np.zeros(_WORDS + 2 * blocks, np.int64)
        self._begin = begin = address_of(memory)
        memory[:_WORDS] = plan.table
        memory[work.ITEMS >> 3] = blocks * plan.block_items
        memory[work.BLOCK_ROWS >> 3] = address_of(rows)
        memory[work.SECTIONS >> 3] = begin + work.WORK_BYTES
        memory[work.VOIDS >> 3] = begin + work.WORK_BYTES + 8 * blocks
        memory[_WORDS : _WORDS + blocks] = sections
        self.voids = memory[_WORDS + blocks :]

    @property
    def plane_bytes(self) -> int:
        """Bytes of all its planes."""
        return len(self.voids) * self.plan.block_plane_bytes

    def run(self, place: int) -> None:
        """Take items until none are left. Any number of threads at once, each with a place of its own, once."""
        self.plan.kernel(self.plan.kind, self._begin, place)


@functools.lru_cache(maxsize=64)
def _row_table(tokens: int, heads: int, head_stride: int, token_stride: int, order: Order) -> npt.NDArray[np.int64]:
    """``work.ROW_TABLE`` for so many planes."""
    token, head = np.meshgrid(np.arange(tokens, dtype=np.int64), np.arange(heads, dtype=np.int64))
    table = np.stack([8 * token, head_stride * head, tokens * head + token], axis=-1)
    if order is Order.MEMORY and abs(head_stride) < abs(token_stride):
        table = table.swapaxes(0, 1)
    return np.ascontiguousarray(table.reshape(-1, 3))


def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array begins; ``array.ctypes`` takes three times as long."""
    address: int = array.__array_interface__["data"][0]
    return address


def _form_words(form: Sequence[Region] | Dense, planes: int) -> dict[int, int]:
    """Words that tell where the parts of so many planes are in a section."""
    if isinstance(form, Dense):
        return {
            work.TARGET: form.offset,
            work.TARGET_LAYER_STRIDE: form.layer_stride,
            work.TARGET_TOKEN_STRIDE: form.token_stride,
            work.TARGET_HEAD_STRIDE: form.head_stride,
        }
    words, at = {}, 0
    for number, region in enumerate(form):
        entry = work.REGIONS + 16 * number
        words[entry] = at
        words[entry + 8] = region.region_bytes // planes
        at += region.region_bytes
    return words


def _whole_lines(where: PagedPlanes, row_bytes: int) -> bool:
    """Whether every row is whole lines: only for those stores past the cache pay."""
    strides = (where.page_stride, where.token_stride, where.head_stride, row_bytes)
    return all(stride % LINE_BYTES == 0 for stride in strides) and not np.any(where.bases % LINE_BYTES)
