"""First page of the arena: golden bytes, and a decoder that takes nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import CorruptRecord
from kvstore.mapped.arena import (
    ARENA_HEADER_BYTES,
    FIRST_SLAB_PAGE,
    STATE_OFFSET,
    ArenaHeader,
    ArenaState,
    decode_arena_header,
    encode_arena_header,
)

HEADER = ArenaHeader(incarnation=0x0123456789ABCDEF, slab_bytes=1 << 20, slab_count=65, pid=4242)
# magic, version 1, state 1 (live), incarnation, slab bytes, slab count, pid; all little-endian.
GOLDEN = bytes.fromhex(
    "4b564152454e4100 01000000 01000000 efcdab8967452301 0000100000000000 4100000000000000 9210000000000000"
)


def test_arena_header_encodes_to_its_golden_bytes():
    assert encode_arena_header(HEADER) == GOLDEN
    assert decode_arena_header(GOLDEN) == HEADER
    assert decode_arena_header(memoryview(GOLDEN + bytes(4048))) == HEADER


def test_arena_header_layout_is_the_documented_one():
    assert ARENA_HEADER_BYTES == 2 << 20
    assert FIRST_SLAB_PAGE * 4096 == ARENA_HEADER_BYTES
    assert HEADER.arena_bytes == (2 << 20) + 65 * (1 << 20)
    dead = bytearray(GOLDEN)
    dead[STATE_OFFSET : STATE_OFFSET + 4] = int(ArenaState.DEAD).to_bytes(4, "little")
    assert decode_arena_header(bytes(dead)) == dataclasses.replace(HEADER, state=ArenaState.DEAD)


@given(
    st.builds(
        ArenaHeader,
        incarnation=st.integers(0, (1 << 64) - 1),
        slab_bytes=st.integers(1, 1 << 40).map(lambda pages: pages * 4096),
        slab_count=st.integers(1, (1 << 64) - 1),
        pid=st.integers(0, (1 << 64) - 1),
        state=st.sampled_from(ArenaState),
    )
)
def test_arena_header_round_trip_is_the_same(header: ArenaHeader):
    assert decode_arena_header(encode_arena_header(header)) == header


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"kVARENA\0", "wrong magic"),
        (0, bytes(8), "wrong magic"),
        (8, b"\x02\0\0\0", "version 2"),
        (8, b"\0\0\0\0", "version 0"),
        (12, b"\0\0\0\0", "impossible"),
        (12, b"\x03\0\0\0", "impossible"),
        (24, b"\x01", "impossible"),
        (24, bytes(8), "impossible"),
        (32, bytes(8), "impossible"),
    ],
)
def test_arena_header_damaged_is_refused(offset: int, value: bytes, message: str):
    damaged = GOLDEN[:offset] + value + GOLDEN[offset + len(value) :]
    with pytest.raises(CorruptRecord, match=message):
        decode_arena_header(damaged)


@pytest.mark.parametrize("length", [0, 1, 47])
def test_arena_header_too_short_is_refused(length: int):
    with pytest.raises(CorruptRecord, match=f"{length} bytes"):
        decode_arena_header(GOLDEN[:length])
