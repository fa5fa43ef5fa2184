"""Causes of misses on replays: they add up, and what is said of evicted blocks is what a larger LRU would do."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest
from fakes.store_replay import StoreReplay
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.core.misses import Misses
from kvstore.protocol.misses import MissCause

PAGE_BYTES = 4096
LONGEST = 10


def chain_of(path: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    for step in path:
        keys.append(sha256((keys[-1] if keys else b"") + bytes([step])).digest())
    return keys


class RecencyModel:
    """All blocks ever asked for in the order of a tail-first LRU: a tier holds the last ones that it has room for."""

    def __init__(self) -> None:
        self.order: list[bytes] = []

    def request(self, keys: list[bytes]) -> None:
        self.order = [key for key in self.order if key not in keys] + keys[::-1]

    def holds(self, key: bytes, capacity: int) -> bool:
        return key in self.order[max(len(self.order) - capacity, 0) :]


@pytest.mark.parametrize(("capacity", "seed"), [(16, 1), (24, 2), (40, 3)])
def test_evicted_blocks_are_hits_in_an_lru_of_as_many_more_bytes_and_misses_in_one_of_a_slot_less(
    capacity: int, seed: int
) -> None:
    choose = random.Random(seed)
    replay, model = StoreReplay(capacity, LONGEST), RecencyModel()
    misses = Misses.watch(replay.store, 1 << 20)
    asked = hit = evicted = 0
    for _ in range(400):
        path = [choose.randrange(3 if level < 2 or choose.random() < 0.8 else 9) for level in range(1, 1 + LONGEST)]
        keys = chain_of(path[: choose.randrange(1, LONGEST + 1)])
        blocks = replay.store.leading(replay.namespace.id, keys)
        missing = keys[len(blocks) :]
        found = misses.causes(replay.namespace, missing, blocks[-1] if blocks else None, matched=True)
        for key, (cause, place) in zip(missing, found, strict=True):
            if cause is MissCause.EVICTED:
                evicted += 1
                extra = misses.ghosts.extra_bytes(place) // PAGE_BYTES
                assert model.holds(key, capacity + extra)
                assert not model.holds(key, capacity + extra - 1)
            else:
                assert key not in model.order
        asked += len(keys)
        hit += replay.request(keys)
        model.request(keys)
    assert misses.blocks.total() == asked - hit
    assert misses.blocks[MissCause.EVICTED] == evicted == sum(misses.extra) > 100


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=LONGEST).map(chain_of), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(requests=PATHS, capacity=st.integers(LONGEST, 30), named=st.integers(1, LONGEST))
def test_causes_add_up_to_what_matches_missed_however_many_keys_are_named(
    requests: list[list[bytes]], capacity: int, named: int
) -> None:
    replay = StoreReplay(capacity, LONGEST, named=named)
    misses = Misses.watch(replay.store, 1 << 20)
    missed = [len(keys) - replay.request(keys) for keys in requests]
    assert misses.blocks.total() == sum(missed)
    assert misses.requests.total() == sum(map(bool, missed))
    assert sum(misses.extra) <= misses.blocks[MissCause.EVICTED]
