"""Recordings of lookups: what is written is read, what is damaged ends the reading, and keys are not in it."""

from __future__ import annotations

import random
import struct
from hashlib import sha256

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptRecord
from kvstore.format.lookup_trace import (
    FILE_HEADER_BYTES,
    Lookup,
    LookupDecoder,
    LookupEncoder,
    LookupFileHeader,
    NamespaceFacts,
    decode_header,
    encode_header,
)

SALT = bytes(range(32))
HEADER = encode_header(LookupFileHeader(b"r" * 16, 0, 1))
NAMESPACES = [NamespaceFacts(0, 64, 4096, "raw"), NamespaceFacts(1, 16, 0, "kivi4")]


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def chat(count: int, seed: int = 1) -> list[Lookup]:
    draw = random.Random(seed)
    sessions: list[list[int]] = []
    lookups = []
    for turn in range(count):
        if not sessions or draw.random() < 0.3:
            sessions.append([1000 + draw.randrange(3)])
        session = draw.choice(sessions)
        session += [draw.randrange(1 << 40) for _ in range(draw.randrange(6))]
        hits = draw.randint(0, len(session))
        lookups.append(
            Lookup(
                turn * 7,
                NAMESPACES[session[0] % 2],
                [key(number) for number in session],
                len(session) + draw.choice([0, 0, 3]),
                hits,
                draw.randint(0, hits),
            )
        )
    return lookups


def written(lookups: list[Lookup], encoder: LookupEncoder, every: int = 10) -> bytes:
    parts = [HEADER]
    for number, lookup in enumerate(lookups, 1):
        encoder.add(lookup)
        if number % every == 0:
            parts.append(encoder.frame())
    return b"".join([*parts, encoder.frame()])


def check_same(lookups: list[Lookup], data: bytes, decoder: LookupDecoder, known: dict[tuple[int, bytes], int]) -> int:
    """Each block is always read as the same number, and as one of its own; how many were read."""
    read = list(decoder.lookups(data))
    for lookup, found in zip(lookups, read, strict=False):
        assert found[2:] == (found.blocks, lookup.asked, lookup.hits, lookup.below)
        assert (found.time_ms, found.namespace) == (lookup.time_ms, lookup.namespace.number)
        assert len(found.blocks) == len(lookup.keys)
        for one, number in zip(lookup.keys, found.blocks, strict=True):
            assert known.setdefault((found.namespace, one), number) == number
    assert len(set(known.values())) == len(known)
    return len(read)


@pytest.mark.parametrize("max_nodes", [1 << 18, 60])
def test_what_is_written_is_read_also_where_blocks_are_forgotten(max_nodes: int):
    lookups = [lookup for lookup in chat(400) if len(lookup.keys) < 50]
    decoder = LookupDecoder()
    assert check_same(lookups, written(lookups, LookupEncoder(SALT, max_nodes)), decoder, {}) == len(lookups)
    assert decoder.damage == ""
    assert decoder.namespaces == {0: NAMESPACES[0], 1: NAMESPACES[1]}


def test_blocks_are_the_same_across_the_files_of_a_recording():
    lookups = chat(300)
    decoder, known = LookupDecoder(), dict[tuple[int, bytes], int]()
    for begin in (0, 100, 200):
        some = lookups[begin : begin + 100]
        assert check_same(some, written(some, LookupEncoder(SALT)), decoder, known) == 100


def test_known_prefixes_cost_a_few_bytes():
    prompt = [key(number) for number in range(2000)]
    encoder = LookupEncoder(SALT)
    encoder.add(Lookup(0, NAMESPACES[0], prompt, 2000, 0, 0))
    assert encoder.waiting_bytes < 2000 * 4 + 40
    encoder.frame()
    encoder.add(Lookup(1, NAMESPACES[0], [*prompt, key(-1)], 2001, 2000, 0))
    assert encoder.waiting_bytes < 20
    assert LookupEncoder(SALT).frame() == b""


def test_neither_keys_nor_salt_are_in_it_and_another_salt_gives_other_bytes():
    lookups = chat(50)
    one, other = (written(lookups, LookupEncoder(salt)) for salt in (SALT, bytes(32)))
    for lookup in lookups:
        for block in lookup.keys:
            assert block[:4] not in one
    assert SALT[:8] not in one
    assert one != other
    assert len(one) == len(other)


def test_facts_of_a_namespace_that_change_are_told_again():
    encoder = LookupEncoder(SALT)
    for slot_bytes in (0, 4096, 4096, 8192):
        encoder.add(Lookup(0, NAMESPACES[0]._replace(slot_bytes=slot_bytes), [key(1)], 1, 0, 0))
    decoder = LookupDecoder()
    read = list(decoder.lookups(HEADER + encoder.frame()))
    assert [found.blocks for found in read] == [(0,)] * 4
    assert decoder.namespaces[0].slot_bytes == 8192


def test_torn_file_gives_all_frames_before_the_tear():
    lookups = chat(60)
    data = written(lookups, LookupEncoder(SALT), every=20)
    lengths = set()
    for end in range(FILE_HEADER_BYTES, len(data) + 1, 7):
        decoder = LookupDecoder()
        lengths.add(check_same(lookups, data[:end], decoder, {}))
        if end < len(data) and decoder.damage:
            assert "torn" in decoder.damage
    assert lengths <= {0, 20, 40, 60}
    assert {0, 20, 40} <= lengths


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found_and_what_is_before_it_good(data: st.DataObject):
    lookups = chat(30)
    whole = bytearray(written(lookups, LookupEncoder(SALT), every=10))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    decoder = LookupDecoder()
    if at < FILE_HEADER_BYTES:
        with pytest.raises(CorruptRecord):
            list(decoder.lookups(bytes(whole)))
        return
    assert check_same(lookups, bytes(whole), decoder, {}) in (0, 10, 20)
    assert decoder.damage


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=80), st.integers(0, 12))
def test_hostile_payload_is_damage_and_never_another_error(payload: bytes, entries: int):
    head = struct.pack("<II", len(payload), entries)
    frame = head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + payload)) + payload
    decoder = LookupDecoder()
    read = list(decoder.lookups(HEADER + frame))
    assert decoder.damage or len(read) <= entries


def test_headers_of_other_things_are_refused():
    for data, why in (
        (b"", "no recording"),
        (b"KVLOOKUP", "no recording"),
        (b"x" * 64, "no recording"),
        (HEADER[:8] + b"\2" + HEADER[9:], "version 2"),
        (HEADER[:20] + b"x" + HEADER[21:], "header is damaged"),
    ):
        with pytest.raises(CorruptRecord, match=why):
            decode_header(data)
    strange = struct.pack("<8sHHI16sIIQQ", b"KVLOOKUP", 1, 64, 1, b"r" * 16, 0, 0, 1, 0)
    with pytest.raises(CorruptRecord, match="what version 1 does not know"):
        decode_header(strange + struct.pack("<Q", xxhash.xxh3_64_intdigest(strange)))
