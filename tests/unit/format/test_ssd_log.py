"""Frames and entries of the SSD tier's log: they come back, torn tails end a log, and no damage goes unnoticed."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptRecord
from kvstore.format.ssd_files import FILE_HEADER_BYTES, LOG_MAGIC, NumberedHeader, encode_numbered_header
from kvstore.format.ssd_log import (
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    EmptyEntry,
    EndEntry,
    Entry,
    EntryKind,
    Frames,
    FreeEntry,
    NamespaceEntry,
    PutEntry,
    TouchEntry,
    decode_entries,
    encode_entry,
    encode_frame,
    frame_seed,
)

HEADER = encode_numbered_header(NumberedHeader(LOG_MAGIC, 5, bytes(range(16))))
OTHER = encode_numbered_header(NumberedHeader(LOG_MAGIC, 6, bytes(range(16))))
U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
KEYS = st.binary(min_size=32, max_size=32)
PUTS = st.builds(PutEntry, U8, U16, U16, U32, U32, U32, U32, U64, U64, U64, U64, KEYS, KEYS)
ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    PUTS,
    st.builds(FreeEntry, U64),
    st.builds(TouchEntry, U64, U64),
    st.builds(NamespaceEntry, U32, U64, st.binary(max_size=40)),
    st.builds(EmptyEntry, U32),
    st.builds(EndEntry, U64),
)
PUT = PutEntry(255, 2, 1, 3, 4, 64, 5, 77, 16000, 0x1122334455667788, 9, b"k" * 32, b"p" * 32)
EACH: list[Entry] = [
    NamespaceEntry(3, 1, b'{"name":"chat"}'),
    PUT,
    FreeEntry(78),
    TouchEntry(77, 10),
    EmptyEntry(4),
    EndEntry(1),
]
LOG: list[list[Entry]] = [EACH[:2], [], EACH[2:4], [PUT._replace(slot=81)]]


def frames_of(log: list[list[Entry]], header: bytes = HEADER) -> Iterator[bytes]:
    for sequence, entries in enumerate(log):
        yield encode_frame(frame_seed(header), sequence, [encode_entry(entry) for entry in entries])


def file_of(log: list[list[Entry]], header: bytes = HEADER) -> bytes:
    return header + b"".join(frames_of(log, header))


def read(data: bytes) -> tuple[list[list[Entry]], Frames]:
    frames = Frames(data, FILE_HEADER_BYTES)
    return list(frames), frames


@given(log=st.lists(st.lists(ENTRIES, max_size=4), max_size=4))
def test_log_comes_back(log: list[list[Entry]]):
    data = file_of(log)
    found, frames = read(data)
    assert found == log
    assert (frames.problem, frames.end, frames.next_sequence) == ("", len(data), len(log))
    assert not frames.skip()


@given(entries=st.lists(ENTRIES, max_size=8))
def test_entries_are_multiples_of_eight_bytes(entries: list[Entry]):
    encoded = [encode_entry(entry) for entry in entries]
    assert all(len(data) % 8 == 0 for data in encoded)
    assert decode_entries(memoryview(b"".join(encoded))) == entries


@pytest.mark.parametrize("length", range(1, 129))
def test_entries_that_end_early_are_refused(length: int):
    for entry in EACH:
        data = encode_entry(entry)
        if length < len(data):
            with pytest.raises(CorruptRecord, match="ends within"):
                decode_entries(memoryview(data[:length]))


def test_entries_with_bytes_that_must_be_zero_and_are_not_are_refused():
    found = {}
    for entry in EACH:
        data = bytearray(encode_entry(entry))
        for at in range(1, len(data)):
            data[at] ^= 0xFF
            try:
                assert decode_entries(memoryview(data)) != [entry]
            except CorruptRecord as error:
                if "must be zero" in str(error):
                    found.setdefault(type(entry), []).append(at)
            data[at] ^= 0xFF
    sevens = list(range(1, 8))
    assert found == {
        NamespaceEntry: [1, 31],
        PutEntry: [6, 7],
        FreeEntry: sevens,
        TouchEntry: sevens,
        EmptyEntry: [1, 2, 3],
        EndEntry: sevens,
    }


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(EntryKind)))
def test_entries_of_unknown_kinds_are_refused(kind: int):
    with pytest.raises(CorruptRecord, match=f"unknown kind {kind}"):
        decode_entries(memoryview(bytes([kind]) + bytes(127)))


def test_entry_with_a_number_that_is_too_large_is_a_bug():
    for entry in (PUT._replace(part=1 << 16), FreeEntry(1 << 64), NamespaceEntry(1, 1, bytes(1 << 16))):
        with pytest.raises(struct.error):
            encode_entry(entry)


def test_log_with_any_byte_flipped_says_so():
    data = bytearray(file_of(LOG))
    ends = [FILE_HEADER_BYTES]
    for frame in frames_of(LOG):
        ends.append(ends[-1] + len(frame))
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        found, frames = read(bytes(data))
        # A header's damage is its own decoder's to see; here nothing below it is a frame any more.
        whole = 0 if at < FILE_HEADER_BYTES else next(index for index, end in enumerate(ends[1:]) if at < end)
        assert (found, frames.end, bool(frames.problem)) == (LOG[:whole], ends[whole], True), at
        assert frames.skip() is (at >= FILE_HEADER_BYTES and whole < len(LOG) - 1), at
        if whole < len(LOG) - 1 and at >= FILE_HEADER_BYTES:
            assert frames.problem == ""
            assert list(frames) == LOG[whole + 1 :]
            assert frames.end == len(data)
        data[at] ^= 1 << at % 8


def test_log_torn_at_any_byte_ends_with_its_last_whole_frame():
    data = file_of(LOG)
    ends = [FILE_HEADER_BYTES]
    for frame in frames_of(LOG):
        ends.append(ends[-1] + len(frame))
    for length in range(FILE_HEADER_BYTES, len(data)):
        found, frames = read(data[:length])
        whole = sum(end <= length for end in ends) - 1
        assert found == LOG[:whole]
        assert bool(frames.problem) is (length not in ends)
        assert (frames.end, frames.next_sequence) == (ends[whole], whole)
        assert not frames.skip()


@given(cut=st.integers(1, 200), filling=st.sampled_from([b"\0", b"\xff", b"KVSF"]))
def test_log_torn_into_what_was_on_the_disk_before_ends_there(cut: int, filling: bytes):
    frames = list(frames_of(LOG))
    whole = HEADER + b"".join(frames[:-1])
    torn = (frames[-1][: min(cut, len(frames[-1]) - 1)] + filling * 200)[: 3 * len(frames[-1])]
    found, reader = read(whole + torn)
    assert found == LOG[:-1]
    assert reader.problem
    assert not reader.skip()


def test_log_does_not_take_frames_of_another_file():
    """Of a log that lay in the same place of the disk before."""
    ours, theirs = list(frames_of(LOG)), list(frames_of(LOG, OTHER))
    assert list(map(len, ours)) == list(map(len, theirs))
    found, frames = read(HEADER + ours[0] + b"".join(theirs[1:]))
    assert found == LOG[:1]
    assert frames.problem
    assert not frames.skip()


def test_log_does_not_take_a_key_for_a_frame():
    """Clients choose keys: one that looks like a frame must not make a torn tail look like damage in the middle."""
    for seed in (0, frame_seed(OTHER), frame_seed(b"")):
        forged = encode_frame(seed, 7, [])
        assert len(forged) == FRAME_HEADER_BYTES
        frame = list(frames_of([[PUT], [PUT._replace(key=forged), PUT]]))
        found, frames = read(HEADER + frame[0] + frame[1][:-1])
        assert (found, bool(frames.problem)) == ([[PUT]], True)
        assert not frames.skip()


def test_log_skips_to_later_frames_only():
    first, second, third = frames_of([[PUT], [FreeEntry(1)], [FreeEntry(2)]])
    found, frames = read(HEADER + first + second + first + third)
    assert (found, frames.problem) == ([[PUT], [FreeEntry(1)]], f"the frame at {frames.end} has number 0, not 2")
    assert frames.skip()
    assert list(frames) == [[FreeEntry(2)]]
    found, frames = read(HEADER + first + third)
    assert (found, "has number 2, not 1" in frames.problem) == ([[PUT]], True)
    assert frames.skip()
    assert list(frames) == [[FreeEntry(2)]]


def test_log_skips_over_several_broken_frames():
    frames = list(frames_of([[FreeEntry(number)] for number in range(9)]))
    for broken in (1, 2, 5):
        frames[broken] = frames[broken][:-1] + b"\xee"
    _, reader = read(HEADER + b"".join(frames))
    found = [[FreeEntry(0)]]
    while reader.problem:
        assert reader.skip()
        found += list(reader)
    assert found == [[FreeEntry(number)] for number in (0, 3, 4, 6, 7, 8)]


def test_log_with_many_magics_is_read_in_one_pass():
    """Whoever chose keys so that each looks like a long frame makes recovery no slower."""
    key = FRAME_MAGIC.to_bytes(4, "little") + (1 << 20).to_bytes(4, "little") + bytes(24)
    entries: list[Entry] = [PUT._replace(slot=slot, key=key) for slot in range(20_000)]
    frames = list(frames_of([entries[:1], entries, [FreeEntry(1)]]))
    broken = frames[1][:-1] + b"\1"
    _, reader = read(HEADER + frames[0] + broken + frames[2])
    hashed = 0
    payload = reader._payload

    def counted(begin: int) -> tuple[list[Entry], int]:
        nonlocal hashed
        hashed += 1
        return payload(begin)

    reader._payload = counted  # type: ignore[method-assign]
    assert reader.skip()
    assert hashed == 2  # the broken one again, and the next one
    assert list(reader) == [[FreeEntry(1)]]


@settings(max_examples=200)
@given(data=st.binary(max_size=300))
def test_log_of_noise_is_no_log(data: bytes):
    found, frames = read(HEADER + data)
    assert found == []
    assert bool(frames.problem) is bool(data)
    assert not frames.skip()
