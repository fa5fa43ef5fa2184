"""The work on one section of many blocks, as compiled functions see it, and the walk over its planes.

To a codec whose groups are within a row, all planes of a layer are one plane, whose rows it takes in the order in which
they lie in memory.

Python fills a table of words once a call. Threads share it and take items, a few layers of a block each, by an atomic
counter, so that a thread enters compiled code once a section and needs the interpreter's lock no more often. Where a
thread is, is in words at the start of its scratch memory.
"""

from __future__ import annotations

from typing import Final

from kvstore_kernels.cpu.code import inlined
from kvstore_kernels.cpu.memory import add_atomic, copy_bytes, fence_streams, load, store

# Words of the table.
NEXT: Final = 0
"""The next item to be taken."""
ITEMS: Final = 8
ITEM_LAYERS: Final = 16
"""Layers of an item; the last item of a block may have fewer."""
LAYERS: Final = 24
HEADS: Final = 32
ROW_COUNT: Final = 40
"""Rows of a plane: its tokens; with ``ROW_TABLE`` those of all planes of a layer."""
DIM: Final = 48
BLOCK_ROWS: Final = 56
"""Address of int64 ``[blocks, tokens]``: bytes from the start of a plane to each token's row."""
BASES: Final = 64
"""Address of int64 ``[layers]``: where the plane of the first head starts."""
HEAD_STRIDE: Final = 72
ELEMENT_STRIDE: Final = 80
ELEMENT_BYTES: Final = 88
SECTIONS: Final = 96
"""Address of int64 ``[blocks]``: addresses of encoded sections."""
VOIDS: Final = 104
"""Address of int64 ``[blocks]``: counts of void groups, added to."""
STAGED_ROWS: Final = 112
"""Address of int64 ``[rows]``: rows of a plane in contiguous memory. 0 where planes are used in place."""
DECODING: Final = 120
"""1 where planes are written."""
REGIONS: Final = 128
"""Pairs for up to six regions: bytes from the section's start, and bytes a plane."""

# Where planes are copied as they are, these instead of regions: bytes from the section's start, and strides.
TARGET: Final = REGIONS
TARGET_LAYER_STRIDE: Final = 136
TARGET_TOKEN_STRIDE: Final = 144
TARGET_HEAD_STRIDE: Final = 152

BLOCK_TOKENS: Final = 224
"""Tokens of a block: rows of its part of ``BLOCK_ROWS``."""
ROW_TABLE: Final = 232
"""Address of int64 ``[rows, 3]`` for kernels that take all planes of a layer as one: of each row eight times its token,
bytes from the first plane to its own, and its place in a section.
"""
STAGED: Final = 240
"""Bytes from a thread's place to its staged plane."""
WORK_BYTES: Final = 256

# Words of a thread's place.
PLANE: Final = 0
"""Address of the plane to encode or decode."""
ROWS: Final = 8
"""Address of int64 ``[tokens]``: bytes from there to each row."""
FOLLOWING: Final = 16
"""Address of the plane after it, or its own: for fetching ahead; its rows are the same."""
SECTION: Final = 24
INDEX: Final = 32
"""Number of the plane in the section."""
_BLOCK: Final = 40
_LAYER: Final = 48
_END_LAYER: Final = 56
_HEAD: Final = 64
_ORIGIN: Final = 72
"""Address of the plane in the engine's memory."""
_BEGUN: Final = 80
"""1 while the place names a plane; 0 before the first one and after the last."""
PLACE_BYTES: Final = 128

SCRATCH: Final = PLACE_BYTES
"""Behind the place: memory for tables of a codec, then a staged plane."""
SCRATCH_BYTES: Final = 8192
"""Of a codec that does not ask for more."""


@inlined
def next_plane(work: int, place: int) -> int:
    """Finish the plane that the place names, and go on to the next; 0 where none is left."""
    decoding, staged = load(work + DECODING), load(work + STAGED_ROWS) != 0
    layer, head = load(place + _LAYER), load(place + _HEAD) + 1
    if load(place + _BEGUN) != 0 and staged and decoding != 0:
        _stage(work, place, 1)
    if head >= load(work + HEADS):
        layer, head = layer + 1, 0
    if load(place + _BEGUN) == 0 or layer >= load(place + _END_LAYER):
        item, layers, item_layers = add_atomic(work + NEXT, 1), load(work + LAYERS), load(work + ITEM_LAYERS)
        if item >= load(work + ITEMS):
            store(place + _BEGUN, 0)
            fence_streams()
            return 0
        block_items = (layers + item_layers - 1) // item_layers
        block = item // block_items
        layer, head = item % block_items * item_layers, 0
        store(place + _BEGUN, 1)
        store(place + _BLOCK, block)
        store(place + _END_LAYER, min(layer + item_layers, layers))
        store(place + SECTION, load(load(work + SECTIONS) + 8 * block))
    store(place + _LAYER, layer)
    store(place + _HEAD, head)
    store(place + INDEX, layer * load(work + HEADS) + head)
    rows = load(work + BLOCK_ROWS) + 8 * load(place + _BLOCK) * load(work + BLOCK_TOKENS)
    origin = load(load(work + BASES) + 8 * layer) + head * load(work + HEAD_STRIDE)
    store(place + _ORIGIN, origin)
    store(place + ROWS, rows)
    if staged:
        store(place + PLANE, place + load(work + STAGED))
        store(place + FOLLOWING, load(place + PLANE))
        if decoding == 0:
            _stage(work, place, 0)
        store(place + ROWS, load(work + STAGED_ROWS))
        return 1
    store(place + PLANE, origin)
    if head + 1 < load(work + HEADS):
        store(place + FOLLOWING, origin + load(work + HEAD_STRIDE))
    else:
        following = min(layer + 1, load(work + LAYERS) - 1)
        store(place + FOLLOWING, load(load(work + BASES) + 8 * following))
    return 1


@inlined
def count_void(work: int, place: int, groups: int) -> None:
    """Add to the void groups of the place's block."""
    if groups != 0:
        add_atomic(load(work + VOIDS) + 8 * load(place + _BLOCK), groups)


@inlined
def region(work: int, place: int, number: int) -> int:
    """Address of the plane's part of a region."""
    entry = work + REGIONS + 16 * number
    address: int = load(place + SECTION) + load(entry) + load(place + INDEX) * load(entry + 8)
    return address


@inlined
def copied_plane(work: int, place: int) -> int:
    """Address of a plane that is copied as it is, in its section."""
    layer, head = load(place + _LAYER) * load(work + TARGET_LAYER_STRIDE), load(place + _HEAD)
    address: int = load(place + SECTION) + load(work + TARGET) + layer + head * load(work + TARGET_HEAD_STRIDE)
    return address


@inlined
def row_ahead(work: int, place: int, row: int) -> int:
    """As ``row_address``, and behind the last row one of the plane that follows: for fetching ahead."""
    count = load(work + ROW_COUNT)
    plane = load(place + PLANE)
    if row >= count:
        plane, row = load(place + FOLLOWING), min(row - count, count - 1)
    return _row_at(work, place, plane, row)


@inlined
def row_address(work: int, place: int, row: int) -> int:
    """Address of a row of the place's plane, by ``ROW_TABLE``."""
    return _row_at(work, place, load(place + PLANE), row)


@inlined
def row_place(work: int, row: int) -> int:
    """Place of a row in its section, by ``ROW_TABLE``."""
    number: int = load(load(work + ROW_TABLE) + 24 * row + 16)
    return number


@inlined
def _row_at(work: int, place: int, plane: int, row: int) -> int:
    entry = load(work + ROW_TABLE) + 24 * row
    address: int = plane + load(load(place + ROWS) + load(entry)) + load(entry + 8)
    return address


@inlined
def _stage(work: int, place: int, back: int) -> None:
    """Copy a plane whose elements lie apart into contiguous memory, or back."""
    stride, size = load(work + ELEMENT_STRIDE), load(work + ELEMENT_BYTES)
    count, dim = load(work + ROW_COUNT), load(work + DIM)
    origin, staged = load(place + _ORIGIN), place + load(work + STAGED)
    rows = load(work + BLOCK_ROWS) + 8 * load(place + _BLOCK) * count
    # Sixteen channels of all tokens at a time: where tokens lie side by side, lines are used up while they are near.
    for channel in range(0, dim, 16):
        width = min(16, dim - channel)
        for row in range(count):
            apart = origin + load(rows + 8 * row) + channel * stride
            dense = staged + (row * dim + channel) * size
            for i in range(width):
                if back == 0:
                    copy_bytes(size, dense + i * size, apart + i * stride)
                else:
                    copy_bytes(size, apart + i * stride, dense + i * size)
