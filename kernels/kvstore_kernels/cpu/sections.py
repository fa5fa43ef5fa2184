"""Sections of blocks to and from an engine's pages: the table that compiled functions read, and threads to run them."""

from __future__ import annotations

import _thread
import functools
import threading
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
from kvstore_kernels.paged import PagedKV, PagedPlanes

__all__ = ["Dense", "Job", "Kernel", "Method", "Order", "Section", "row_offsets", "run_jobs"]

Kernel = Callable[[Kind, int, int], Any]
"""A compiled function of a kind, the address of the work and that of a thread's place."""

_ITEM_BYTES: Final = 256 << 10
"""About so many bytes of planes are an item: enough to hide the taking, little enough to share evenly."""
_THREAD_BYTES: Final = 1 << 20
"""Fewer are not worth another thread, which takes a tenth of a millisecond to start."""
_LINE_BYTES: Final = 64


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
    """

    encode: Kernel
    decode: Kernel
    kind: Kind
    encode_order: Order
    decode_order: Order


@dataclass(frozen=True, slots=True)
class Dense:
    """Where planes that are copied as they are lie in their section, in bytes."""

    offset: int
    layer_stride: int
    token_stride: int
    head_stride: int


@dataclass(frozen=True, slots=True)
class Section:
    """A section, or a part of one, of many blocks.

    Attributes:
        planes: what is in it.
        where: the planes are in the engine's memory.
        rows: bytes from the start of a plane to each token's row, int64 ``[blocks, tokens]``.
        sections: addresses of the blocks' sections, int64 ``[blocks]``.
        form: what is in a section: regions, or planes as they are.
    """

    planes: Planes
    where: PagedPlanes
    rows: npt.NDArray[np.int64]
    sections: npt.NDArray[np.int64]
    form: Sequence[Region] | Dense


def row_offsets(kv: PagedKV, number: int, pages: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Bytes from the start of a plane of a section to each token's row: ``[blocks, tokens]``."""
    of_page = pages.astype(np.int64)[:, :, None] * kv.sections[number].page_stride
    of_token = np.arange(kv.page_tokens, dtype=np.int64) * kv.sections[number].token_stride
    return (of_page + of_token).reshape(len(pages), kv.layout.block_tokens)


class Job:
    """The encoding or decoding of one section of many blocks, ready to be run by any number of threads.

    Args:
        method: does it.
        section: what.
        decoding: whether planes are written.

    Attributes:
        voids: void groups of each block, when it has run.
        plane_bytes: bytes of all its planes.
    """

    def __init__(self, method: Method, section: Section, *, decoding: bool) -> None:
        planes, where = section.planes, section.where
        order = method.decode_order if decoding else method.encode_order
        element_bytes = ELEMENT_BYTES[planes.dtype]
        row_bytes = planes.dim * element_bytes
        blocks, tokens = section.rows.shape
        staged = where.element_stride != element_bytes
        by_row = order is not Order.PLANE and not staged
        heads, dim = planes.num_heads, planes.dim
        if isinstance(section.form, Dense) and where.head_stride == row_bytes and not staged:
            # Rows of all heads lie side by side in both places: one copy a token.
            heads, dim = 1, heads * dim
        layer_bytes = planes.num_heads * tokens * row_bytes
        item_layers = min(max(1, _ITEM_BYTES // layer_bytes), planes.num_layers)
        self._kernel = method.decode if decoding else method.encode
        streaming = decoding and not staged and _whole_lines(where, row_bytes)
        self._kind = replace(method.kind, streaming=True) if streaming else method.kind
        self._bases = np.ascontiguousarray(where.bases, np.int64)
        self._sections = np.ascontiguousarray(section.sections, np.int64)
        self._staged_rows = np.arange(tokens, dtype=np.int64) * row_bytes
        self._rows = np.ascontiguousarray(section.rows, np.int64)
        order, row_heads = (order, heads) if by_row else (Order.PLANE, 1)
        self._row_table = _row_table(tokens, row_heads, where.head_stride, where.token_stride, order)
        self.voids = np.zeros(blocks, np.int64)
        self.plane_bytes = blocks * planes.num_layers * layer_bytes
        self.place_bytes = work.STAGED + (tokens * row_bytes if staged else 0)
        words = {
            work.ITEMS: blocks * -(-planes.num_layers // item_layers),
            work.ITEM_LAYERS: item_layers,
            work.LAYERS: planes.num_layers,
            work.HEADS: 1 if by_row else heads,
            work.ROW_COUNT: tokens * row_heads,
            work.DIM: dim,
            work.BLOCK_ROWS: _address(self._rows),
            work.BASES: _address(self._bases),
            work.HEAD_STRIDE: where.head_stride,
            work.ELEMENT_STRIDE: where.element_stride,
            work.ELEMENT_BYTES: element_bytes,
            work.SECTIONS: _address(self._sections),
            work.VOIDS: _address(self.voids),
            work.STAGED_ROWS: _address(self._staged_rows) if staged else 0,
            work.DECODING: int(decoding),
            work.BLOCK_TOKENS: tokens,
            work.ROW_TABLE: _address(self._row_table),
            **_form_words(section, planes.num_layers * (1 if by_row else heads)),
        }
        self._table = np.array([words.get(offset, 0) for offset in range(0, work.WORK_BYTES, 8)], np.int64)

    def run(self, place: int) -> None:
        """Take items until none are left. Any number of threads at once, each with a place of its own, once."""
        self._kernel(self._kind, _address(self._table), place)


def run_jobs(jobs: Sequence[Job], threads: int) -> None:
    """Run jobs one after another.

    Args:
        jobs: to run.
        threads: at most so many run them, the caller's among them; fewer where there is little to do.
    """
    threads = max(1, min(threads, sum(job.plane_bytes for job in jobs) // _THREAD_BYTES))
    place_bytes = max(job.place_bytes for job in jobs)
    places = [np.zeros(place_bytes + _LINE_BYTES, np.uint8) for _ in range(threads)]
    errors: list[BaseException] = []

    def call(memory: npt.NDArray[np.uint8], done: threading.Lock) -> None:
        try:
            for job in jobs:
                job.run(-(-_address(memory) // _LINE_BYTES) * _LINE_BYTES)
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    waiting = []
    try:
        for memory in places:
            done = threading.Lock()
            done.acquire()
            if memory is places[-1]:
                call(memory, done)
            else:
                # Not a Thread, whose start waits until it runs: a tenth of a millisecond, of calls that take a few.
                _thread.start_new_thread(call, (memory, done))
            waiting.append(done)
    finally:
        while waiting:
            try:
                with waiting[-1]:
                    waiting.pop()
            except KeyboardInterrupt as error:
                errors.append(error)  # Whoever still works reads and writes memory that the caller owns.
    if errors:
        raise errors[0]


@functools.lru_cache(maxsize=64)
def _row_table(tokens: int, heads: int, head_stride: int, token_stride: int, order: Order) -> npt.NDArray[np.int64]:
    """``work.ROW_TABLE`` for so many planes."""
    token, head = np.meshgrid(np.arange(tokens, dtype=np.int64), np.arange(heads, dtype=np.int64))
    table = np.stack([8 * token, head_stride * head, tokens * head + token], axis=-1)
    if order is Order.MEMORY and abs(head_stride) < abs(token_stride):
        table = table.swapaxes(0, 1)
    return np.ascontiguousarray(table.reshape(-1, 3))


def _address(array: npt.NDArray[Any]) -> int:
    """Where an array begins; ``array.ctypes`` takes three times as long."""
    address: int = array.__array_interface__["data"][0]
    return address


def _form_words(section: Section, planes: int) -> dict[int, int]:
    """Words that tell where the parts of so many planes are in a section."""
    form = section.form
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
    return all(stride % _LINE_BYTES == 0 for stride in strides) and not np.any(where.bases % _LINE_BYTES)
