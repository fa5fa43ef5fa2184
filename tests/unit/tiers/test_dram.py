"""The arena's memory: what a slot holds after it was used again, moved, or damaged; how it is cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptRecord
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import encode_header, raw_header
from kvstore.mapped.arena import ARENA_HEADER_BYTES, FIRST_SLAB_PAGE, ArenaHeader, ArenaState, decode_arena_header
from kvstore.tiers.dram import POPULATE_STEP_BYTES, Arena, automatic_slab_bytes, slab_count

PAGE_BYTES = 4096
MIB = 1 << 20
KEY, PARENT, DIGEST = b"k" * 32, b"p" * 32, b"n" * 32
SLOT = FIRST_SLAB_PAGE


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena(tmp_path / "arena-1", ArenaHeader(7, 8 * PAGE_BYTES, 4, os.getpid()), 0o600)
    for slab in range(4):
        assert arena.populate_step(slab, 0)
    yield arena
    if arena.path.exists():
        arena.close()


def write(arena: Arena, slot: int, payload: bytes, slot_pages: int = 2, part: int = 0) -> int:
    """A record with this payload; its length."""
    header = raw_header(key=KEY, parent_key=PARENT, namespace_digest=DIGEST, part=part, payload=payload)
    arena.write(slot, slot_pages * PAGE_BYTES, encode_header(header), payload)
    return header.record_bytes


def test_arena_new_file_says_what_it_is(arena: Arena):
    data = arena.path.read_bytes()
    assert decode_arena_header(data[:PAGE_BYTES]) == ArenaHeader(7, 8 * PAGE_BYTES, 4, os.getpid(), ArenaState.LIVE)
    assert len(data) == ARENA_HEADER_BYTES + 4 * 8 * PAGE_BYTES


def test_arena_header_takes_one_page_of_memory_only(tmp_path: Path):
    arena = Arena(tmp_path / "arena-1", ArenaHeader(7, MIB, 4, os.getpid()), 0o600)
    assert arena.path.stat().st_blocks * 512 == PAGE_BYTES
    arena.populate_step(0, 0)
    assert arena.path.stat().st_blocks * 512 == PAGE_BYTES + MIB
    arena.close()


def test_arena_close_marks_it_dead_for_those_that_map_it(arena: Arena):
    with arena.path.open("rb") as other:
        arena.close()
        assert decode_arena_header(other.read(PAGE_BYTES)).state is ArenaState.DEAD
    assert not arena.path.exists()


def test_arena_close_while_a_record_is_being_sent_keeps_its_bytes(arena: Arena):
    length = write(arena, SLOT, b"payload")
    view = arena.record(SLOT, length)
    arena.close()
    assert bytes(view[RECORD_HEADER_BYTES:]) == b"payload"


def test_arena_record_is_read_only_and_exactly_the_record(arena: Arena):
    length = write(arena, SLOT, b"x" * 100)
    view = arena.record(SLOT, length)
    assert view.readonly
    assert len(view) == RECORD_HEADER_BYTES + 100
    view.release()


@given(st.lists(st.integers(1, 2 * PAGE_BYTES - RECORD_HEADER_BYTES), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arena_slot_used_again_by_any_lengths_has_zero_padding(arena: Arena, lengths: list[int]):
    # One arena for all examples: each begins with what the last one left in the slot.
    neighbour = write(arena, SLOT + 2, b"n" * (2 * PAGE_BYTES - RECORD_HEADER_BYTES))
    for number, length in enumerate(lengths):
        written = write(arena, SLOT, bytes([number + 1]) * length)
        header = arena.verify(SLOT, 2 * PAGE_BYTES, written, KEY, 0)
        assert header.record_bytes == written
        with arena.record(SLOT, 2 * PAGE_BYTES) as slot:
            assert not any(slot[written:])
    arena.verify(SLOT + 2, 2 * PAGE_BYTES, neighbour, KEY, 0)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_arena_write_takes_any_buffer(arena: Arena, kind: type):
    payload = b"abc" * 50
    header = encode_header(raw_header(key=KEY, parent_key=PARENT, namespace_digest=DIGEST, part=0, payload=payload))
    arena.write(SLOT, PAGE_BYTES, kind(header), kind(payload))
    arena.verify(SLOT, PAGE_BYTES, RECORD_HEADER_BYTES + 150, KEY, 0)


def test_arena_write_that_does_not_fit_its_slot_raises_and_spares_the_neighbour(arena: Arena):
    neighbour = write(arena, SLOT + 1, b"n" * 100, slot_pages=1)
    with pytest.raises(ValueError, match="slot"):
        arena.write(SLOT, PAGE_BYTES, bytes(RECORD_HEADER_BYTES), bytes(PAGE_BYTES))
    arena.verify(SLOT + 1, PAGE_BYTES, neighbour, KEY, 0)


def test_arena_move_copies_the_whole_slot(arena: Arena):
    write(arena, SLOT + 4, b"old" * 2000)
    length = write(arena, SLOT, b"new")
    arena.move(SLOT, SLOT + 4, 2 * PAGE_BYTES)
    arena.verify(SLOT + 4, 2 * PAGE_BYTES, length, KEY, 0)


@pytest.mark.parametrize("offset", [0, 40, 255, RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + 99])
def test_arena_verify_damaged_record_is_corrupt(arena: Arena, offset: int):
    length = write(arena, SLOT, b"x" * 100)
    with arena.path.open("r+b") as other:
        other.seek(SLOT * PAGE_BYTES + offset)
        other.write(b"\xa5")
    with pytest.raises(CorruptRecord):
        arena.verify(SLOT, 2 * PAGE_BYTES, length, KEY, 0)


@pytest.mark.parametrize("offset", [RECORD_HEADER_BYTES + 100, PAGE_BYTES, 2 * PAGE_BYTES - 1])
def test_arena_verify_dirty_padding_is_corrupt(arena: Arena, offset: int):
    length = write(arena, SLOT, b"x" * 100)
    with arena.path.open("r+b") as other:
        other.seek(SLOT * PAGE_BYTES + offset)
        other.write(b"\x01")
    with pytest.raises(CorruptRecord, match="padding"):
        arena.verify(SLOT, 2 * PAGE_BYTES, length, KEY, 0)


def test_arena_verify_record_of_another_block_or_part_is_corrupt(arena: Arena):
    length = write(arena, SLOT, b"x", part=1)
    arena.verify(SLOT, 2 * PAGE_BYTES, length, KEY, 1)
    for key, part in ((KEY, 0), (b"K" * 32, 1)):
        with pytest.raises(CorruptRecord, match="another block"):
            arena.verify(SLOT, 2 * PAGE_BYTES, length, key, part)


def test_populate_step_goes_through_a_slab_in_steps(tmp_path: Path):
    slab_bytes = 2 * POPULATE_STEP_BYTES + PAGE_BYTES
    arena = Arena(tmp_path / "arena-1", ArenaHeader(7, slab_bytes, 1, os.getpid()), 0o600)
    assert [arena.populate_step(0, step) for step in range(3)] == [False, False, True]
    assert arena.path.stat().st_blocks * 512 == PAGE_BYTES + slab_bytes
    arena.close()


@given(st.integers(PAGE_BYTES, 1 << 42), st.integers(PAGE_BYTES, 1 << 36))
def test_automatic_slab_bytes_is_a_power_of_two_and_a_256th_that_leaves_grants_room(
    capacity_bytes: int, grant_bytes: int
):
    slab_bytes = automatic_slab_bytes(capacity_bytes, grant_bytes)
    round_bytes, rest = divmod(slab_bytes * 256, 257)
    assert not rest
    assert not slab_bytes % PAGE_BYTES
    assert MIB <= round_bytes <= 64 * MIB
    assert round_bytes.bit_count() == 1
    assert round_bytes == MIB or round_bytes * 2 <= grant_bytes
    slabs = slab_count(capacity_bytes, grant_bytes, slab_bytes)
    assert (slabs - 1) * slab_bytes < capacity_bytes + grant_bytes <= slabs * slab_bytes


@pytest.mark.parametrize("block_bytes", [1 << 20, 2 << 20, 4 << 20])
def test_automatic_slab_bytes_loses_no_slot_to_the_header_of_a_block(block_bytes: int):
    slab_bytes = automatic_slab_bytes(1 << 40, 1 << 30)
    slot_bytes = block_bytes + PAGE_BYTES
    assert slab_bytes // slot_bytes == (64 * MIB) // block_bytes
