"""Blocks in an engine's pages to encoded blocks and back."""

from __future__ import annotations

import functools
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvstore_kernels.codecs import EXACT, Codec, Region
from kvstore_kernels.codecs.lossless import Lossless
from kvstore_kernels.cpu.lossless import compress_block, decompress_block
from kvstore_kernels.cpu.methods import method_of
from kvstore_kernels.cpu.sections import Dense, Job, Method, Plan, row_offsets
from kvstore_kernels.cpu.threads import run_jobs, work_together
from kvstore_kernels.encoded import EncodedBlocks, check_blocks, check_lengths
from kvstore_kernels.layout import Layout, MLALayout, Planes
from kvstore_kernels.paged import PagedKV, PagedPlanes

__all__ = ["EncodedBlocks", "decode", "encode"]


def encode(
    codec: Codec,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    payloads: npt.NDArray[np.uint64],
    *,
    threads: int = 1,
) -> EncodedBlocks:
    """Encode blocks out of an engine's pages. Releases the interpreter's lock while it works.

    Args:
        codec: to use.
        kv: the pages.
        pages: of each block, in its order: int32 ``[blocks, kv.block_pages]``.
        payloads: addresses of memory for each block, of ``sum(codec.max_section_bytes(kv.layout))`` bytes.
        threads: at most so many work, the caller's among them.

    Raises:
        ValueError: the codec cannot store the layout, or an argument is out of range.
    """
    pages, addresses = _check(kv, pages, payloads, threads)
    if isinstance(codec, Lossless):
        lengths = _compress(codec, kv, pages, addresses, threads)
        return EncodedBlocks(lengths, np.zeros(len(pages), np.int64))
    jobs = _jobs(codec, kv, pages, addresses, decoding=False)
    run_jobs(jobs, threads)
    voids = np.zeros(len(pages), np.int64)
    for job in jobs:
        voids += job.voids
    return EncodedBlocks(np.repeat(_lengths(codec, kv.layout), len(pages), 0), voids)


def decode(
    codec: Codec,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    payloads: npt.NDArray[np.uint64],
    section_bytes: npt.NDArray[np.int64],
    *,
    threads: int = 1,
) -> None:
    """Decode blocks into an engine's pages. Releases the interpreter's lock while it works.

    Args:
        codec: that encoded the blocks.
        kv: the pages; overwritten.
        pages: of each block, as for ``encode``.
        payloads: addresses of the encoded blocks.
        section_bytes: of each block ``[blocks, sections]``; nothing is read behind them.
        threads: at most so many work, the caller's among them.

    Raises:
        ValueError: the codec cannot store the layout, an argument is out of range, or a block is not well formed; then
            pages of this block and of others may have been written.
    """
    pages, addresses = _check(kv, pages, payloads, threads)
    given = check_lengths(codec, kv, len(pages), section_bytes)
    if isinstance(codec, Lossless):
        _decompress(codec, kv, pages, addresses, given, threads)
        return
    run_jobs(_jobs(codec, kv, pages, addresses, decoding=True), threads)


def _compress(
    codec: Lossless, kv: PagedKV, pages: npt.NDArray[np.int32], addresses: npt.NDArray[np.int64], threads: int
) -> npt.NDArray[np.int64]:
    """Section lengths of blocks that are compressed as a whole; a thread takes one block after another."""
    lengths = np.zeros((len(pages), 1), np.int64)
    places = iter(enumerate(addresses.tolist()))

    def work() -> None:
        block = np.empty(kv.layout.block_bytes, np.uint8)
        for number, address in places:
            _copy_block(kv, pages[number : number + 1], block, decoding=False)
            lengths[number, 0] = compress_block(codec.compressor, kv.layout, block, address)

    work_together(work, max(1, min(threads, len(pages))))
    return lengths


def _decompress(
    codec: Lossless,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    addresses: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    threads: int,
) -> None:
    places = iter(enumerate(addresses.tolist()))

    def work() -> None:
        block = np.empty(kv.layout.block_bytes, np.uint8)
        for number, address in places:
            try:
                decompress_block(codec.compressor, kv.layout, address, int(lengths[number, 0]), block)
            except ValueError as error:
                raise ValueError(f"block {number}: {error}") from None
            _copy_block(kv, pages[number : number + 1], block, decoding=True)

    work_together(work, max(1, min(threads, len(pages))))


def _copy_block(kv: PagedKV, pages: npt.NDArray[np.int32], block: npt.NDArray[np.uint8], *, decoding: bool) -> None:
    """One block between its pages and memory in the layout's order."""
    address = np.array([block.ctypes.data], np.int64)
    run_jobs(_jobs(None, kv, pages, address, decoding=decoding), 1)


class _Part(NamedTuple):
    """One section of encoded blocks, or what one role is of a whole block.

    Attributes:
        number: of the role.
        planes: of the role.
        method: encodes and decodes it.
        form: what is in it.
        offset: bytes from the payload's start.
    """

    number: int
    planes: Planes
    method: Method
    form: Dense | tuple[Region, ...]
    offset: int


@functools.lru_cache(maxsize=64)
def _parts(codec: Codec, layout: Layout) -> tuple[_Part, ...]:
    """What a block of a codec of fixed size consists of.

    Raises:
        ValueError: the codec cannot store the layout.
    """
    codec.check(layout)
    if codec.whole:
        return _whole_parts(layout)
    lengths = codec.section_bytes(layout)
    if lengths is None:
        raise ValueError(f"codec {codec.name} is not known here: its sections vary in length")
    parts, offset = [], 0
    for number, (planes, length) in enumerate(zip(layout.planes, lengths, strict=True)):
        form: Dense | tuple[Region, ...] = codec.regions(planes, layout.block_tokens)
        name = codec.plane_codec(planes)
        if name == EXACT:
            row_bytes = planes.dim * layout.element_bytes
            form = Dense(0, row_bytes * layout.block_tokens, row_bytes, 0)
        parts.append(_Part(number, planes, method_of(name, planes), form, offset))
        offset += length
    return tuple(parts)


@functools.lru_cache(maxsize=64)
def _lengths(codec: Codec, layout: Layout) -> npt.NDArray[np.int64]:
    """Lengths of the sections of a codec of fixed size, ``[1, sections]``."""
    return np.array([codec.max_section_bytes(layout)], np.int64)


@functools.lru_cache(maxsize=64)
def _whole_parts(layout: Layout) -> tuple[_Part, ...]:
    """The roles of a block in the layout's own order."""
    planes = layout.planes
    return tuple(
        _Part(number, planes[number], method_of(EXACT, planes[number]), dense, 0)
        for number, dense in enumerate(_whole_block(layout))
    )


class _PlannedPart(NamedTuple):
    """How one part of a block is worked on in an engine's pages.

    Attributes:
        plan: does it.
        where: its planes in the pages.
        offset: bytes from the payload's start.
    """

    plan: Plan
    where: PagedPlanes
    offset: int


_PlannedParts = tuple[_PlannedPart, ...]
_planned: Final[WeakKeyDictionary[PagedKV, dict[tuple[Codec | None, bool], _PlannedParts]]] = WeakKeyDictionary()
"""What takes longest before the compiled functions start, of each engine's pages, by codec and direction."""


def _planned_parts(codec: Codec | None, kv: PagedKV, *, decoding: bool) -> _PlannedParts:
    plans = _planned.get(kv)
    if plans is None:
        plans = _planned[kv] = {}
    planned = plans.get((codec, decoding))
    if planned is None:
        parts = _whole_parts(kv.layout) if codec is None else _parts(codec, kv.layout)
        planned = plans[codec, decoding] = tuple(
            _PlannedPart(
                Plan(part.method, part.planes, where, kv.layout.block_tokens, part.form, decoding=decoding),
                where,
                part.offset,
            )
            for part in parts
            for where in (kv.sections[part.number],)
        )
    return planned


def _jobs(
    codec: Codec | None,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    addresses: npt.NDArray[np.int64],
    *,
    decoding: bool,
) -> list[Job]:
    """Jobs for blocks; without a codec as they are, in the layout's own order."""
    jobs: list[Job] = []
    offsets: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
    for plan, where, offset in _planned_parts(codec, kv, decoding=decoding):
        strides = where.page_stride, where.token_stride
        rows = offsets.get(strides)
        if rows is None:
            rows = offsets[strides] = row_offsets(where, pages, kv.page_tokens)
        jobs.append(Job(plan, rows, addresses + offset))
    return jobs


def _check(
    kv: PagedKV, pages: npt.NDArray[np.int32], payloads: npt.NDArray[np.uint64], threads: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Arguments checked, and addresses as compiled functions take them."""
    if kv.device != "cpu":
        raise ValueError(f"the pages are on the device {kv.device!r}: use kvstore_kernels.cuda")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    pages, addresses = check_blocks(kv, pages, payloads)
    return pages, addresses.view(np.int64)


def _whole_block(layout: Layout) -> tuple[Dense, ...]:
    """Where the planes of each role lie in a block of the layout's own order."""
    layer_bytes = layout.block_bytes // layout.num_layers
    token_bytes = layer_bytes // layout.block_tokens
    if isinstance(layout, MLALayout):
        latent = layout.latent_dim * layout.element_bytes
        plane = layout.planes[0].dim * layout.element_bytes
        return Dense(0, layer_bytes, token_bytes, plane), Dense(latent, layer_bytes, token_bytes, 0)
    head, half = layout.head_dim * layout.element_bytes, layer_bytes // 2
    return tuple(Dense(i * half, layer_bytes, token_bytes // 2, head) for i in (0, 1))
