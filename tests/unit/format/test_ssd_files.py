"""The headers of the SSD tier's files: what was encoded is decoded, and nothing else is."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import CorruptRecord
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import (
    CHECKPOINT_MAGIC,
    FILE_HEADER_BYTES,
    LOG_MAGIC,
    SLABS_MAGIC,
    SLABS_NAME,
    NumberedHeader,
    OtherFormat,
    SlabsHeader,
    checkpoint_name,
    decode_numbered_header,
    decode_slabs_header,
    encode_numbered_header,
    encode_slabs_header,
    log_name,
    parse_name,
)
from kvstore.tiers import disk

STORE = bytes(range(16))
STORES = st.binary(min_size=16, max_size=16)
NUMBERS = st.integers(0, (1 << 64) - 1)
SLABS = SlabsHeader(3 * PAGE_BYTES, STORE)
LOG = NumberedHeader(LOG_MAGIC, 5, STORE)


@given(pages=st.integers(1, 1 << 50), store=STORES)
def test_slabs_header_comes_back(pages: int, store: bytes):
    header = SlabsHeader(pages * PAGE_BYTES, store)
    page = encode_slabs_header(header)
    assert len(page) == PAGE_BYTES
    assert decode_slabs_header(page) == header


@given(magic=st.sampled_from([LOG_MAGIC, CHECKPOINT_MAGIC]), number=NUMBERS, store=STORES)
def test_numbered_header_comes_back(magic: bytes, number: int, store: bytes):
    header = NumberedHeader(magic, number, store)
    data = encode_numbered_header(header)
    assert len(data) == FILE_HEADER_BYTES
    assert decode_numbered_header(data, magic) == header
    assert decode_numbered_header(data + b"frames", magic) == header


@pytest.mark.parametrize("at", range(FILE_HEADER_BYTES))
def test_headers_with_a_flipped_byte_are_refused(at: int):
    page, header = bytearray(encode_slabs_header(SLABS)), bytearray(encode_numbered_header(LOG))
    for bit in range(8):
        for data in (page, header):
            data[at] ^= 1 << bit
        with pytest.raises(CorruptRecord):
            decode_slabs_header(bytes(page))
        with pytest.raises(CorruptRecord):
            decode_numbered_header(bytes(header), LOG_MAGIC)
        for data in (page, header):
            data[at] ^= 1 << bit


@given(at=st.integers(FILE_HEADER_BYTES, PAGE_BYTES - 1), value=st.integers(1, 255))
def test_slabs_page_with_a_byte_behind_its_header_is_refused(at: int, value: int):
    page = bytearray(encode_slabs_header(SLABS))
    page[at] = value
    with pytest.raises(CorruptRecord, match="not zero behind its header"):
        decode_slabs_header(bytes(page))


@pytest.mark.parametrize("length", range(FILE_HEADER_BYTES))
def test_headers_that_end_early_are_refused(length: int):
    with pytest.raises(CorruptRecord, match="ends within its header"):
        decode_slabs_header(encode_slabs_header(SLABS)[:length])
    with pytest.raises(CorruptRecord, match="ends within its header"):
        decode_numbered_header(encode_numbered_header(LOG)[:length], LOG_MAGIC)


@pytest.mark.parametrize("length", [FILE_HEADER_BYTES, PAGE_BYTES - 1])
def test_slabs_page_that_is_not_whole_is_refused(length: int):
    with pytest.raises(CorruptRecord, match="ends within its first page"):
        decode_slabs_header(encode_slabs_header(SLABS)[:length])


def sealed(data: bytes) -> bytes:
    """A header with the checksum that belongs to it."""
    return data[:56] + xxhash.xxh3_64_intdigest(data[:56]).to_bytes(8, "little") + data[FILE_HEADER_BYTES:]


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return sealed(data[:at] + value + data[at + len(value) :])


def test_headers_of_another_version_are_of_another_format():
    for version in (0, 2, 65535):
        for data, decode in (
            (encode_slabs_header(SLABS), decode_slabs_header),
            (encode_numbered_header(LOG), lambda data: decode_numbered_header(data, LOG_MAGIC)),
        ):
            with pytest.raises(OtherFormat, match=f"format {version}; this version knows 1"):
                decode(changed(data, 8, version.to_bytes(2, "little")))


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, CHECKPOINT_MAGIC, "wrong magic"),
        (10, b"\x80\0", "header has 128 bytes"),
        (12, b"\0\x20\0\0", "pages of 8192 bytes"),
        (16, bytes(8), "slabs of 0 bytes"),
        (16, (PAGE_BYTES + 1).to_bytes(8, "little"), "slabs of 4097 bytes"),
        (40, b"\1", "reserved bytes"),
        (55, b"\1", "reserved bytes"),
    ],
)
def test_slabs_page_that_says_something_impossible_is_refused(at: int, value: bytes, error: str):
    with pytest.raises(CorruptRecord, match=error):
        decode_slabs_header(changed(encode_slabs_header(SLABS), at, value))


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, SLABS_MAGIC, "wrong magic"),
        (0, CHECKPOINT_MAGIC, "wrong magic"),
        (10, b"\x80\0", "reserved bytes"),
        (12, b"\1", "reserved bytes"),
        (40, b"\1", "reserved bytes"),
        (55, b"\1", "reserved bytes"),
    ],
)
def test_numbered_header_that_says_something_impossible_is_refused(at: int, value: bytes, error: str):
    with pytest.raises(CorruptRecord, match=error):
        decode_numbered_header(changed(encode_numbered_header(LOG), at, value), LOG_MAGIC)


@given(number=NUMBERS)
def test_names_say_what_a_file_is(number: int):
    assert parse_name(log_name(number)) == ("log", number)
    assert parse_name(checkpoint_name(number)) == ("checkpoint", number)
    assert log_name(number).partition("-")[2] == checkpoint_name(number).partition("-")[2]


def test_names_sort_as_numbers_do():
    numbers = [0, 9, 10, 255, 256, (1 << 64) - 1]
    assert sorted(map(log_name, numbers)) == [log_name(number) for number in numbers]


@pytest.mark.parametrize(
    "name",
    [
        SLABS_NAME,
        "owner.lock",
        "log-",
        "log-5",
        "log-000000000000000G",
        "log-000000000000000A",
        "log-0000000000000005.tmp",
        "log-0000000000000005\n",
        " log-0000000000000005",
        "checkpoint-00000000000000005",
        "LOG-0000000000000005",
        "log-\N{ARABIC-INDIC DIGIT ONE}000000000000005",
    ],
)
def test_names_of_other_files_are_neither(name: str):
    assert parse_name(name) is None


def test_name_of_the_slab_file_is_the_one_that_is_opened():
    assert disk.SLABS_NAME == SLABS_NAME
