"""Which namespaces are remembered, and that ids are never used again."""

from __future__ import annotations

from fakes.small_store import SESSION, SmallStore

from kvstore.core.events import ClearWanted, InvalidateWanted, Joined, SessionClosed, SessionOpened
from kvstore.core.instructions import EndNamespace, Namespaced
from kvstore.core.invariants import validate_state
from kvstore.core.namespaces import MOST_IDLE, NamespaceState
from kvstore.protocol.namespace import Namespace


def join(small: SmallStore, name: str, session: int, generation: int = -1) -> NamespaceState:
    answer = small.executor.apply(Joined(Namespace(name=name), (), generation, session))
    assert isinstance(answer, Namespaced)
    assert not answer.stale
    return answer.namespace


def come_and_go(small: SmallStore, names: list[str]) -> list[int]:
    """Clients that join a namespace each and leave; the ids."""
    ids = []
    for name in names:
        small.executor.apply(SessionOpened(77))
        ids.append(join(small, name, 77).id)
        small.executor.apply(SessionClosed(77))
    return ids


def test_namespaces_without_blocks_and_members_are_forgotten_when_there_are_many():
    small = SmallStore()
    ids = come_and_go(small, [f"idle {number}" for number in range(3 * MOST_IDLE)])
    assert len(set(ids)) == len(ids)
    assert len(small.store.namespaces.by_id) == MOST_IDLE + 1
    # The latest are there, the first come back under ids of their own.
    assert come_and_go(small, [f"idle {3 * MOST_IDLE - 1}"]) == ids[-1:]
    (again,) = come_and_go(small, ["idle 0"])
    assert again not in ids
    assert small.store.namespaces.by_id[again].generation == 0
    validate_state(small.store)


def test_namespace_with_blocks_or_members_is_remembered():
    small = SmallStore()
    small.put("ab")
    small.executor.apply(SessionOpened(2))
    member = join(small, "member", 2)
    come_and_go(small, [f"idle {number}" for number in range(2 * MOST_IDLE)])
    assert small.hits("ab") == 2
    assert join(small, "member", 2) is member
    validate_state(small.store)
    # Its last blocks and its last member gone, it is one of many.
    small.executor.apply(SessionClosed(SESSION))
    small.executor.apply(SessionOpened(SESSION))
    assert small.store.namespaces.by_id[small.namespace.id] is small.namespace
    first = small.namespace.id
    small.executor.apply(ClearWanted(first))
    come_and_go(small, [f"more {number}" for number in range(2 * MOST_IDLE)])
    assert first not in small.store.namespaces.by_id
    assert small.join(small.namespace.description).id != first
    validate_state(small.store)


def test_later_generation_is_never_forgotten_and_the_earlier_one_is():
    small = SmallStore()
    small.executor.apply(SessionOpened(2))
    before = join(small, "weights", 2)
    answer = small.executor.apply(InvalidateWanted(before.id, 2))
    assert isinstance(answer, Namespaced)
    after = answer.namespace
    small.executor.apply(SessionClosed(2))
    come_and_go(small, [f"idle {number}" for number in range(2 * MOST_IDLE)])
    assert before.id not in small.store.namespaces.by_id
    small.executor.apply(SessionOpened(2))
    assert join(small, "weights", 2) is after
    stale = small.executor.apply(Joined(Namespace(name="weights"), (), 0, 2))
    assert stale == Namespaced(after, stale=True)
    validate_state(small.store)


def test_namespace_that_is_forgotten_is_over_for_readers():
    small = SmallStore()
    come_and_go(small, [f"idle {number}" for number in range(MOST_IDLE)])
    small.executor.apply(SessionOpened(77))
    first = min(small.store.namespaces.by_id.keys() - {small.namespace.id})
    join(small, "one more", 77)
    small.executor.apply(SessionClosed(77))
    assert EndNamespace(first) in small.executor.last
