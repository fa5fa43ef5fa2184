"""Which events changes become, and which batches can be had again."""

from __future__ import annotations

import pytest
from fakes.small_store import SmallStore, key_of
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.journal import Journal
from kvstore.protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from kvstore.protocol.namespace import Namespace
from kvstore.server.event_batches import BatchRing, events_of

IDLE = b"idle"


@pytest.fixture
def small() -> SmallStore:
    made = SmallStore(capacity_pages=20, namespace=Namespace(name="tokens", block_tokens=16))
    made.store.journal = Journal()
    return made


def keys(letters: str) -> list[bytes]:
    return [key_of(letter) for letter in letters]


def test_chain_is_one_event_and_a_branch_another(small: SmallStore) -> None:
    assert small.store.journal is not None
    small.put("abc")
    small.put("xy", at="a")
    digest = small.namespace.digest
    common = {"block_size": 16, "namespace": digest, "incarnation": 7}
    assert events_of(small.store.journal.drain(99), 7) == [
        BlockStored(keys("abc"), None, **common),
        BlockStored(keys("xy"), key_of("a"), **common),
    ]
    small.put("z", at="y")
    small.remove("bc")
    small.put("q")
    assert events_of(small.store.journal.drain(99), 7) == [
        BlockStored(keys("z"), key_of("y"), **common),
        BlockRemoved(keys("bc"), namespace=digest, incarnation=7),
        BlockStored(keys("q"), None, **common),
    ]
    small.clear_all()
    small.put("p")
    assert events_of(small.store.journal.drain(99), 7) == [AllBlocksCleared(7), BlockStored(keys("p"), None, **common)]
    assert events_of([], 7) == []


def test_namespaces_are_kept_apart(small: SmallStore) -> None:
    assert small.store.journal is not None
    first = small.namespace
    second = small.join(Namespace(name="second"))
    small.put("a")
    small.namespace = second
    small.put("b", at="a")
    stored = events_of(small.store.journal.drain(99), 1)
    assert [(event.namespace, event.block_hashes) for event in stored if isinstance(event, BlockStored)] == [
        (first.digest, keys("a")),
        (second.digest, keys("b")),
    ]
    small.remove("b")
    small.namespace = first
    small.remove("a")
    removed = events_of(small.store.journal.drain(99), 1)
    assert [(event.namespace, event.block_hashes) for event in removed if isinstance(event, BlockRemoved)] == [
        (second.digest, keys("b")),
        (first.digest, keys("a")),
    ]


@given(
    steps=st.integers(1, 5),
    most_bytes=st.integers(1, 60),
    batches=st.lists(st.none() | st.binary(min_size=1, max_size=20), max_size=30),
    lost=st.integers(0, 40),
)
def test_ring_says_everything_or_that_something_is_lost(
    steps: int, most_bytes: int, batches: list[bytes | None], lost: int
) -> None:
    """``None`` is a batch without events; the one at ``lost`` could not be made."""
    ring = BatchRing(steps, IDLE, most_bytes=most_bytes)
    published: list[bytes | None] = []
    for number, payload in enumerate(batches):
        if number == lost:
            ring.lose()
            published.append(b"never made")
        elif payload is None:
            assert ring.append_idle() == number
            published.append(None)
        else:
            assert ring.append(payload) == number
            published.append(payload)
    kept = [number for number, payload in ring.since(0) if payload is not ring.idle]
    assert len(kept) <= steps
    sizes = [len(published[number] or b"") for number in kept]
    assert sum(sizes) <= most_bytes or len(kept) == 1
    for start in range(len(published) + 3):
        found = ring.since(start)
        assert all(number >= start for number, _ in found)
        assert [number for number, _ in found] == sorted({number for number, _ in found})
        told = {number: payload for number, payload in found if payload is not ring.idle}
        assert all(published[number] == payload for number, payload in told.items())
        if start >= len(published):
            assert found == []
        elif found and found[0][0] == start:
            # Then all batches with events are there.
            assert told == {number: payload for number, payload in enumerate(published) if payload and number >= start}
        else:
            gone = [number for number, payload in enumerate(published) if payload and number >= start]
            assert gone
            assert gone[0] not in told
