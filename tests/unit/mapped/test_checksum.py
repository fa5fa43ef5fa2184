"""XXH3 on raw addresses: the C library's value for every length and alignment, while copying too."""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.format.record import checksum
from kvstore.mapped.checksum import copy_xxh3_64, copy_xxh3_64_nogil, xxh3_64

AREA_BYTES = 1 << 20
PAGE_BYTES = mmap.PAGESIZE
GUARD_BYTES = 192
EVERY_LENGTH = range(2101)
# Around where the algorithm changes, around whole stripes and blocks, and the sizes of records.
EDGE_LENGTHS = sorted(
    {0, 1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241}
    | {base + step for base in (1024, 2048, 4096, 65536, 262144, 917504) for step in (-65, -64, -1, 0, 1, 63, 64, 65)}
)
CONTENT = random.Random(3).randbytes(AREA_BYTES)
Copy = Callable[[int, int, int, int], int]


class Area:
    """Page-aligned memory of a test's own."""

    def __init__(self, length: int = AREA_BYTES) -> None:
        self.memory = mmap.mmap(-1, length)
        self._pointer = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self._pointer)

    def protect(self, offset: int, length: int, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(length), protection) == 0

    def close(self) -> None:
        del self._pointer
        self.memory.close()


@pytest.fixture(scope="module")
def source() -> Iterator[Area]:
    area = Area()
    area.memory[:] = CONTENT
    yield area
    area.close()


@pytest.fixture(scope="module")
def target() -> Iterator[Area]:
    area = Area()
    yield area
    area.close()


def unsigned(value: int) -> int:
    return value & (1 << 64) - 1


def check_copy(copy: Copy, target: Area, source: Area, length: int, at: int, source_at: int, streaming: int) -> None:
    """Copy over a pattern and look at the result and at the guard bytes on both sides."""
    begin, end = at - GUARD_BYTES, at + length + GUARD_BYTES
    pattern = bytes([length % 251 + 1]) * (end - begin)
    target.memory[begin:end] = pattern
    expected = CONTENT[source_at : source_at + length]
    result = copy(target.address + at, source.address + source_at, length, streaming)
    case = f"{length} bytes, target at {at % 64}, source at {source_at % 64}, streaming {streaming}"
    guard = pattern[:GUARD_BYTES]
    assert target.memory[begin:end] == guard + expected + guard, case
    assert unsigned(result) == xxhash.xxh3_64_intdigest(expected), case


def test_checksum_known_inputs_are_the_published_values():
    memory = ctypes.create_string_buffer(b"xxhash")
    address = ctypes.addressof(memory)
    assert unsigned(xxh3_64(address, 0)) == 0x2D06800538D394C2
    assert unsigned(xxh3_64(address, 6)) == xxhash.xxh3_64_intdigest(b"xxhash") == checksum(b"xxhash")


@pytest.mark.parametrize("offset", [0, 3])
def test_checksum_every_length_is_the_libraries(source: Area, offset: int):
    wrong = [
        length
        for length in EVERY_LENGTH
        if unsigned(xxh3_64(source.address + offset, length)) != checksum(CONTENT[offset : offset + length])
    ]
    assert wrong == []


def test_checksum_extreme_bytes_are_the_libraries(target: Area):
    # All bits set carries furthest: arithmetic must wrap and must not be signed anywhere.
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        content = bytes([byte]) * 4096
        target.memory[:4096] = content
        for length in (*range(300), 1023, 1024, 1025, 4095, 4096):
            assert unsigned(xxh3_64(target.address, length)) == checksum(content[:length]), (byte, length)


@pytest.mark.parametrize("streaming", [0, 1])
@pytest.mark.parametrize(("at", "source_at"), [(256, 0), (256, 13), (257, 0), (288, 7)])
def test_copy_every_length_writes_and_hashes_exactly_it(
    target: Area, source: Area, at: int, source_at: int, streaming: int
):
    for length in EVERY_LENGTH:
        check_copy(copy_xxh3_64, target, source, length, at, source_at, streaming)


@pytest.mark.parametrize("copy", [copy_xxh3_64, copy_xxh3_64_nogil])
def test_copy_edge_lengths_and_random_alignments_write_and_hash_exactly_them(copy: Copy, target: Area, source: Area):
    chance = random.Random(5)
    lengths = EDGE_LENGTHS + [chance.randrange(2048, 300_000) for _ in range(40)]
    for length in lengths:
        for streaming in (0, 1):
            at = 256 + chance.choice((0, 0, 64, chance.randrange(64)))
            check_copy(copy, target, source, length, at, chance.randrange(64), streaming)
            assert unsigned(xxh3_64(source.address + at, length)) == checksum(CONTENT[at : at + length])


@given(
    content=st.binary(max_size=3000),
    at=st.integers(0, 127),
    source_at=st.integers(0, 127),
    streaming=st.sampled_from([0, 1, -1]),
)
def test_copy_any_content_is_hashed_as_by_the_library(content: bytes, at: int, source_at: int, streaming: int):
    length = len(content)
    memory = ctypes.create_string_buffer(bytes(source_at) + content, source_at + length + 1)
    room = ctypes.create_string_buffer(length + 256)
    base = -ctypes.addressof(room) % 64 + at
    result = copy_xxh3_64(ctypes.addressof(room) + base, ctypes.addressof(memory) + source_at, length, streaming)
    assert unsigned(result) == xxhash.xxh3_64_intdigest(content)
    assert room.raw == bytes(base) + content + bytes(length + 256 - base - length)
    assert xxh3_64(ctypes.addressof(memory) + source_at, length) == result


def test_copy_between_forbidden_pages_touches_neither():
    # A byte read or written outside ends this process: there is no softer way to see reads.
    source, target = Area(6 * PAGE_BYTES), Area(6 * PAGE_BYTES)
    source.memory[:] = CONTENT[: 6 * PAGE_BYTES]
    for area in (source, target):
        area.protect(0, PAGE_BYTES, 0)
        area.protect(5 * PAGE_BYTES, PAGE_BYTES, 0)
    for length in (*range(1, 300), 1023, 1024, 1025, 1088, 4095, 4096, 4097, 4 * PAGE_BYTES):
        for offset in (PAGE_BYTES, 5 * PAGE_BYTES - length):
            expected = checksum(CONTENT[offset : offset + length])
            assert unsigned(xxh3_64(source.address + offset, length)) == expected
            for streaming in (0, 1):
                result = copy_xxh3_64(target.address + offset, source.address + offset, length, streaming)
                assert unsigned(result) == expected
    for area in (source, target):
        area.close()


@pytest.mark.parametrize("streaming", [0, 1])
@pytest.mark.parametrize("length", [200, 1000, 65536, 262144 + 40])
def test_copy_of_a_changing_source_is_hashed_as_it_was_stored(target: Area, length: int, streaming: int):
    source, stop = Area(), threading.Event()

    def change() -> None:
        byte = 0
        while not stop.is_set():
            byte = (byte + 1) % 256
            ctypes.memset(source.address, byte, length)

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for _ in range(300):
            result = copy_xxh3_64_nogil(target.address, source.address, length, streaming)
            assert unsigned(result) == checksum(target.memory[:length])
    finally:
        stop.set()
        writer.join(10)
        source.close()
