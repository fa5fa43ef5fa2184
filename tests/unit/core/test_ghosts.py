"""What is remembered of blocks that left: a ring of places, found by key, in a stated amount of memory."""

from __future__ import annotations

import random
import tracemalloc
from hashlib import sha256

import numpy as np
import pytest

from kvstore.core.ghost_bytes import SPAN, GhostBytes
from kvstore.core.ghosts import DEPARTURE, GHOST_BYTES, SMALLEST_BYTES, Ghosts
from kvstore.protocol.messages import Reason, TierId
from kvstore.protocol.misses import MissCause

SALT = 12345


def key_of(number: int) -> bytes:
    return sha256(number.to_bytes(8, "little")).digest()


def departure(ghosts: Ghosts, number: int, out_bytes: int = 1, salt: int = SALT) -> bytes:
    form = ghosts.form_of(MissCause.EVICTED, TierId.DRAM, "lru", depth=number)
    key = key_of(number)
    return DEPARTURE.pack(hash(key) ^ salt, form, 1000 + number, out_bytes, key)


def add(ghosts: Ghosts, departures: bytes, *, singly: bool = False) -> None:
    if singly:
        for fields in DEPARTURE.iter_unpack(departures):
            ghosts.add_one(*fields)
        return
    ghosts.add(np.frombuffer(departures, np.int64).reshape(-1, DEPARTURE.size // 8))


def find_many(ghosts: Ghosts, keys: list[bytes], salt: int = SALT) -> list[tuple[int, int]]:
    return ghosts.find_many(np.array([hash(key) ^ salt for key in keys], np.int64))


def test_bytes_are_those_of_a_plain_sum() -> None:
    choose = random.Random(7)
    places = 3 * SPAN
    sums, plain = GhostBytes(places), [0] * places
    at = 0
    for _ in range(400):
        count = min(choose.choice((1, 3, 64, 700, 5000)), places - at)
        written = [choose.randrange(100) for _ in range(count)]
        if count < 64:
            for place, out_bytes in enumerate(written, at):
                sums.write_one(place, out_bytes)
        else:
            sums.write(at, np.array(written, np.int64))
        plain[at : at + count] = written
        at = (at + count) % places
        for _ in range(20):
            gone = choose.randrange(places)
            sums.clear(gone)
            plain[gone] = 0
        begin = choose.randrange(places)
        expected = sum(plain[begin:at]) if begin < at else sum(plain[begin:]) + sum(plain[:at])
        assert sums.since(begin, at) == expected


@pytest.mark.parametrize("singly", [False, True])
def test_ghosts_are_found_until_their_place_is_used_again(singly: bool) -> None:
    ghosts = Ghosts(SMALLEST_BYTES)
    assert ghosts.places == SPAN
    number = 0
    choose = random.Random(3)
    while number < 3 * SPAN:
        count = choose.randrange(1, 900)
        add(ghosts, b"".join(departure(ghosts, index) for index in range(number, number + count)), singly=singly)
        number += count
        known = range(max(number - SPAN, 0), number)
        for index in choose.sample(known, min(50, len(known))):
            place = ghosts.find(SALT, key_of(index))
            assert place >= 0
            assert ghosts.key(place) == key_of(index)
            assert ghosts.ghost(place).depth == index
            assert ghosts.extra_bytes(place) == number - index
        asked = [choose.randrange(number + 100) for _ in range(64)]
        found = dict(find_many(ghosts, [key_of(index) for index in asked]))
        assert sorted(asked[at] for at in found) == sorted(index for index in asked if index in known)
        for at, place in found.items():
            assert ghosts.key(place) == key_of(asked[at])
    assert len(ghosts) == SPAN
    assert ghosts.oldest_ns == 1000 + number - SPAN


def test_a_key_of_another_namespace_is_another_ghost() -> None:
    ghosts = Ghosts(SMALLEST_BYTES)
    add(ghosts, departure(ghosts, 1) + departure(ghosts, 1, salt=99))
    assert ghosts.find(SALT, key_of(1)) == 0
    assert ghosts.find(99, key_of(1)) == 1
    assert ghosts.find(7, key_of(1)) == -1
    assert [find_many(ghosts, [key_of(1)], salt) for salt in (99, SALT, 7)] == [[(0, 1)], [(0, 0)], []]


def test_many_ghosts_of_one_bucket_are_found_up_to_a_bound() -> None:
    ghosts = Ghosts(SMALLEST_BYTES)
    mask = 2 * SPAN - 1
    numbers = [number for number in range(400_000) if hash(key_of(number)) & mask == 5][:40]
    add(ghosts, b"".join(departure(ghosts, number, salt=0) for number in numbers))
    found = [ghosts.find(0, key_of(number)) >= 0 for number in numbers]
    assert found == [False] * (len(numbers) - 32) + [True] * min(32, len(numbers))
    many = find_many(ghosts, [key_of(number) for number in numbers], 0)
    assert sorted(at for at, _ in many) == list(range(len(numbers) - 32, len(numbers)))


def test_what_came_back_is_not_out_any_more() -> None:
    ghosts = Ghosts(SMALLEST_BYTES)
    add(ghosts, b"".join(departure(ghosts, number) for number in range(10)))
    ghosts.came_back(ghosts.find(SALT, key_of(7)))
    assert ghosts.extra_bytes(0) == 9
    back = ghosts.ghost(7)
    assert (back.back, back.cause) == (True, MissCause.EVICTED)
    ghosts.refused(7, Reason.NO_ROOM, 5)
    assert ghosts.ghost(7) == back._replace(back=False, cause=MissCause.NOT_STORED, reason=Reason.NO_ROOM, since_ns=5)


def test_a_form_keeps_all_that_is_remembered() -> None:
    ghosts = Ghosts(SMALLEST_BYTES)
    policies = [f"policy-{number}" for number in range(80)]
    for number, cause in enumerate(MissCause):
        form = ghosts.form_of(
            cause, TierId.SSD, policies[number], reason=Reason.MISSING, depth=1 << 32, branched=bool(number % 2)
        )
        add(ghosts, DEPARTURE.pack(hash(key_of(number)) ^ SALT, form, 77, 0, key_of(number)))
        found = ghosts.ghost(number)
        assert found == (cause, 77, TierId.SSD, policies[number], Reason.MISSING, 1 << 32, bool(number % 2), False)
    assert all(ghosts.form_of(MissCause.EVICTED, TierId.DRAM, policy) for policy in policies)


@pytest.mark.parametrize("limit_bytes", [SMALLEST_BYTES, 4 << 20])
def test_memory_of_a_full_ring_is_within_its_limit(limit_bytes: int) -> None:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        ghosts = Ghosts(limit_bytes)
        for number in range(0, ghosts.places + 1000, 500):
            add(ghosts, b"".join(departure(ghosts, index) for index in range(number, number + 500)))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ghosts.used_bytes == ghosts.places * GHOST_BYTES <= limit_bytes
    assert after - before <= ghosts.used_bytes + 8192
    assert after - before > 0.8 * ghosts.used_bytes
