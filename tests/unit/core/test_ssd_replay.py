"""What entries of a checkpoint and logs mean together, and which records a slab file cannot have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.ssd_replay import Replayed
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_log import EmptyEntry, EndEntry, Entry, FreeEntry, NamespaceEntry, PutEntry, TouchEntry

SLAB_PAGES, SLABS = 8, 4
SPACE = NamespaceEntry(1, 0, b"one")
PUT = PutEntry(255, 1, 0, 1, 2, 0, 2, 1, 100, 5, 10, b"a" * 32, bytes(32))


def key(letter: str) -> bytes:
    return letter.encode() * 32


def replay(*entries: Entry) -> Replayed:
    state = Replayed()
    state.take([SPACE])
    state.take(entries)
    return state


def settled(state: Replayed) -> list[PutEntry]:
    return state.settle(SLAB_PAGES * PAGE_BYTES, 1, SLABS)


def test_put_is_there_until_its_slot_is_freed():
    assert settled(replay(PUT)) == [PUT]
    assert settled(replay(PUT, FreeEntry(1))) == []
    assert settled(replay(PUT, FreeEntry(3))) == [PUT]
    assert settled(replay(PUT, FreeEntry(1), FreeEntry(1), PUT)) == [PUT]


def test_put_ends_what_lay_in_its_slot():
    other = PUT._replace(key=key("b"))
    state = replay(PUT, other)
    assert settled(state) == [other]
    state.take([PUT._replace(slot=3)])
    assert settled(state) == [other, PUT._replace(slot=3)]


def test_put_ends_what_there_was_of_its_key_and_part():
    better = PUT._replace(slot=3, fidelity=255)
    state = replay(PUT, better)
    assert settled(state) == [better]
    state.take([FreeEntry(1)])
    assert settled(state) == [better], "the free slot is the one before"
    other_part = PUT._replace(part=1, slot=5)
    state.take([other_part])
    assert settled(state) == [better, other_part]
    state.take([FreeEntry(3), PUT])
    assert settled(state) == [other_part, PUT]


def test_put_again_in_the_same_slot_is_one_record():
    again = PUT._replace(access=11)
    assert settled(replay(PUT, again)) == [again]
    assert settled(replay(PUT, again, FreeEntry(1))) == []


def test_same_key_in_two_namespaces_is_two_records():
    other = PUT._replace(namespace=2, slot=3)
    state = replay(PUT, NamespaceEntry(2, 0, b"two"), other)
    assert settled(state) == [PUT, other]
    state.take([EmptyEntry(1)])
    assert settled(state) == [other]


def test_touches_order_records_and_never_go_back():
    second = PUT._replace(slot=3, key=key("b"), access=11)
    assert settled(replay(PUT, second)) == [PUT, second]
    state = replay(PUT, second, TouchEntry(1, 20), TouchEntry(1, 4), TouchEntry(3, 9), TouchEntry(7, 99))
    assert settled(state) == [second, PUT._replace(access=20)]


def test_namespace_begins_empty_whatever_was_there():
    assert settled(replay(PUT, SPACE)) == []
    state = replay(PUT)
    state.take([NamespaceEntry(1, 1, b"one")])
    assert (settled(state), state.namespaces[1].generation) == ([], 1)
    state.take([PUT])
    assert settled(state) == [PUT]


def test_cleared_namespace_can_be_put_into_again():
    second = PUT._replace(slot=3)
    state = replay(PUT, EmptyEntry(1), second, FreeEntry(1))
    assert settled(state) == [second]
    state.take([EmptyEntry(1), EmptyEntry(7)])
    assert settled(state) == []


def test_end_is_whole_only_with_the_right_count():
    assert not replay(PUT).complete
    assert replay(PUT, EndEntry(1)).complete
    assert replay(EndEntry(0)).complete
    assert not replay(PUT, EndEntry(2)).complete


def test_doubt_drops_what_was_there_and_takes_what_comes():
    state = replay(PUT, PUT._replace(slot=3, key=key("b")))
    state.doubt()
    assert (settled(state), state.dropped) == ([], 2)
    state.take([PUT._replace(slot=5)])
    assert settled(state) == [PUT._replace(slot=5)]
    state.take([PUT])
    assert settled(state) == [PUT]
    assert state.dropped == 2


@pytest.mark.parametrize(
    "impossible",
    [
        PUT._replace(slot=0),
        PUT._replace(slot=1 + SLAB_PAGES * SLABS),
        PUT._replace(slot=(1 << 64) - 1),
        PUT._replace(slot=2),
        PUT._replace(slot_pages=3, home_pages=3, slot=7),
        PUT._replace(slot_pages=0, home_pages=0),
        PUT._replace(slot_pages=SLAB_PAGES + 1, home_pages=SLAB_PAGES + 1),
        PUT._replace(home_pages=1),
        PUT._replace(namespace=2),
        PUT._replace(record_bytes=0),
        PUT._replace(record_bytes=2 * PAGE_BYTES + 1),
    ],
)
def test_record_that_no_slab_file_can_have_is_dropped(impossible: PutEntry):
    good = PUT._replace(key=key("z"), slot=3)
    state = replay(good, impossible)
    assert settled(state) == [good]
    assert state.dropped == 1


def test_slab_has_the_size_of_its_latest_record_that_fits():
    small = PUT._replace(slot_pages=1, home_pages=1, key=key("b"), slot=4)
    assert settled(replay(PUT, small)) == [small]
    assert settled(replay(small, PUT)) == [PUT]
    assert settled(replay(small, PUT._replace(slot=9))) == [small, PUT._replace(slot=9)]
    # One that is not on a border says nothing of its slab.
    assert settled(replay(small, PUT._replace(slot=2))) == [small]


SLOTS = st.integers(1, 6)
ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(
        lambda slot, letter, part, namespace, access: PUT._replace(
            slot=slot, slot_pages=1, home_pages=1, key=key(letter), part=part, namespace=namespace, access=access,
            record_bytes=9,
        ),
        SLOTS, st.sampled_from("abc"), st.integers(0, 1), st.integers(1, 2), st.integers(0, 9),
    ),
    st.builds(FreeEntry, SLOTS),
    st.builds(TouchEntry, SLOTS, st.integers(0, 9)),
    st.builds(NamespaceEntry, st.integers(1, 2), st.integers(0, 2), st.just(b"")),
    st.builds(EmptyEntry, st.integers(1, 2)),
)  # fmt: skip


@given(entries=st.lists(ENTRIES, max_size=30))
def test_replay_agrees_with_a_list(entries: list[Entry]):
    """Each rule the obvious, slow way."""
    model: list[PutEntry] = []
    known: set[int] = set()
    for entry in entries:
        if isinstance(entry, PutEntry):
            place = (entry.namespace, entry.key, entry.part)
            model = [put for put in model if put.slot != entry.slot and (put.namespace, put.key, put.part) != place]
            model.append(entry)
        elif isinstance(entry, FreeEntry):
            model = [put for put in model if put.slot != entry.slot]
        elif isinstance(entry, TouchEntry):
            model = [
                put._replace(access=max(put.access, entry.access)) if put.slot == entry.slot else put for put in model
            ]
        elif isinstance(entry, NamespaceEntry):
            model = [put for put in model if put.namespace != entry.namespace]
            known.add(entry.namespace)
        else:
            assert isinstance(entry, EmptyEntry)
            model = [put for put in model if put.namespace != entry.namespace]
    state = Replayed()
    for entry in entries:
        state.take([entry])
    assert list(state.slots.values()) == model
    assert settled(state) == sorted((put for put in model if put.namespace in known), key=lambda put: put.access)


@given(
    before=st.lists(ENTRIES, max_size=20),
    entries=st.lists(ENTRIES, max_size=20),
    again=st.integers(0, 20),
    said=st.integers(0, 20),
)
def test_replaying_a_log_on_top_of_what_came_of_it_changes_nothing(
    before: list[Entry], entries: list[Entry], again: int, said: int
):
    """A checkpoint says what holds at any moment after its log began, of namespaces what was durable before."""
    whole = Replayed()
    whole.take([*before, *entries])
    at_moment = Replayed()
    at_moment.take([*before, *entries[:again]])
    durable = Replayed()
    durable.take([*before, *entries[: min(said, again)]])
    checkpoint = Replayed()
    checkpoint.take(durable.namespaces.values())
    checkpoint.take(sorted(at_moment.slots.values(), key=lambda put: put.access))
    checkpoint.take(entries)
    # Touches may count already; which records there are must be the same.
    assert {put._replace(access=0) for put in checkpoint.slots.values()} == {
        put._replace(access=0) for put in whole.slots.values()
    }
    assert checkpoint.namespaces == whole.namespaces
