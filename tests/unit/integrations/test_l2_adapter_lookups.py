from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import Throttled
from kvstore_client.client import Match
from kvstore_client.integrations.l2_adapter.lookups import find


class Store:
    """A store that leases leading keys only, as the daemon does."""

    def __init__(self, there: set[bytes], most_leases: int = 1 << 30) -> None:
        self.there = there
        self.most_leases = most_leases
        self.requests = 0
        self.leased: list[bytes] = []
        self.leases = 0
        self.vanishing: set[bytes] = set()

    def match(self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool = False) -> Match:
        self.requests += 1
        assert lease
        if self.leases >= self.most_leases:
            raise Throttled("too many leases")
        hits = 0
        while hits < len(keys) and keys[hits] in self.there - self.vanishing:
            hits += 1
        self.leases += bool(hits)
        return Match(hits, ["dram"] * hits, 1, self.leases if hits else 0, lease)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        self.requests += 1
        return [key in self.there for key in keys]

    def locked(self, keys: Sequence[bytes], match: Match) -> None:
        assert match.lease
        assert len(keys) == match.hits
        self.leased += keys


def keys_of(count: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(1, count + 1)]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_any_keys_are_found_and_leased(present: list[bool]) -> None:
    keys = keys_of(len(present))
    store = Store({key for key, there in zip(keys, present, strict=True) if there})
    found, unlocked = find(store, keys, 5.0, store.locked)
    assert found == present
    assert unlocked == 0
    assert store.leased == [key for key, there in zip(keys, present, strict=True) if there]


def test_a_prefix_costs_one_request_or_two_and_a_gap_one_more() -> None:
    keys = keys_of(10)
    for there, requests in ((keys, 1), (keys[:9], 1), (keys[:6], 2), ([], 2), (keys[:3] + keys[5:], 3)):
        store = Store(set(there))
        find(store, keys, 5.0, store.locked)
        assert store.requests == requests, (len(there), store.requests)


def test_without_leases_one_request_says_it() -> None:
    keys = keys_of(10)
    store = Store(set(keys[::2]))
    assert find(store, keys, 0.0, store.locked) == ([True, False] * 5, 0)
    assert store.requests == 1
    assert not store.leased


def test_where_no_lease_is_left_keys_are_found_all_the_same() -> None:
    keys = keys_of(9)
    there = [0, 1, 3, 4, 6, 7, 8]
    for most, leased in ((0, 0), (1, 2), (2, 4)):
        store = Store({keys[at] for at in there}, most)
        found, unlocked = find(store, keys, 5.0, store.locked)
        assert [at for at in range(9) if found[at]] == there
        assert len(store.leased) == leased
        assert unlocked == len(there) - leased


def test_too_many_runs_are_found_and_not_leased() -> None:
    keys = keys_of(400)
    store = Store(set(keys[1::2]))
    found, unlocked = find(store, keys, 5.0, store.locked)
    assert sum(found) == 200
    assert len(store.leased) == 64
    assert unlocked == 136


def test_what_goes_between_two_requests_is_missing() -> None:
    keys = keys_of(8)
    store = Store(set(keys[2:]))
    store.vanishing = {keys[4]}
    found, _ = find(store, keys, 5.0, store.locked)
    assert [at for at in range(8) if found[at]] == [2, 3, 5, 6, 7]
    assert store.leased == [keys[at] for at in (2, 3, 5, 6, 7)]
