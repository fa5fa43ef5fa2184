"""``validate_state`` sees what it is there to see: each way to damage a state is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes.small_store import SESSION, SmallStore, key_of

from kvstore.core.block import RecordState
from kvstore.core.invariants import validate_state
from kvstore.errors import InvariantViolation

Damage = Callable[[SmallStore], None]


def _first(small: SmallStore) -> tuple[int, ...]:
    return tuple(record.slot for record in small.blocks("a")[0].parts.values())


def _swap_records(small: SmallStore) -> None:
    first, second = small.blocks("ab")
    first.parts, second.parts = second.parts, first.parts


def _lose_record(small: SmallStore) -> None:
    del small.store.records[_first(small)[0]]


def _free_used_slot(small: SmallStore) -> None:
    small.store.slabs.slab_of(_first(small)[0]).free.append(_first(small)[0])


def _forget_child(small: SmallStore) -> None:
    small.blocks("a")[0].children = set()


def _forget_orphan(small: SmallStore) -> None:
    small.namespace.orphans.clear()


def _forget_in_policy(small: SmallStore) -> None:
    small.store.policy.discard(small.blocks("z")[0])


def _count_lease(small: SmallStore) -> None:
    small.blocks("b")[0].leases += 1


def _exceed_capacity(small: SmallStore) -> None:
    object.__setattr__(small.store.limits, "capacity_bytes", 4096)


def _exceed_records(small: SmallStore) -> None:
    object.__setattr__(small.store.limits, "max_records", 2)


def _exceed_grants(small: SmallStore) -> None:
    object.__setattr__(small.store.limits, "grant_bytes", 0)


def _lose_grant(small: SmallStore) -> None:
    small.store.sessions[SESSION].grants.clear()


def _wrong_depth(small: SmallStore) -> None:
    small.blocks("b")[0].depth = 7


def _resident_grant(small: SmallStore) -> None:
    (record,) = small.store.sessions[SESSION].grants.values()
    record.state = RecordState.RESIDENT


def _blocks_in_a_stale_namespace(small: SmallStore) -> None:
    small.namespace.current = False


def _empty_block(small: SmallStore) -> None:
    small.blocks("z")[0].parts = {}


def _lose_slab(small: SmallStore) -> None:
    small.store.slabs._empty.clear()


def _miscount(name: str) -> Damage:
    def damage(small: SmallStore) -> None:
        setattr(small.store, name, getattr(small.store, name) + 4096)

    damage.__name__ = f"_miscount_{name}"
    return damage


DAMAGES: list[tuple[Damage, str]] = [
    (_swap_records, "of no block"),
    (_lose_record, "RESIDENT bytes"),
    (_free_used_slot, "used and free|lost a slot"),
    (_forget_child, "not its parent's child"),
    (_forget_orphan, "orphan .* is not noted"),
    (_forget_in_policy, "policy holds"),
    (_count_lease, "counts 1 leases"),
    (_exceed_capacity, "over capacity"),
    (_exceed_records, "3 records, over the limit"),
    (_exceed_grants, "granted bytes, over the limit"),
    (_lose_grant, "holds 0, not"),
    (_wrong_depth, "has depth 7"),
    (_resident_grant, "0 bytes in a slot"),
    (_blocks_in_a_stale_namespace, "invalidated namespace"),
    (_empty_block, "has no parts"),
    (_lose_slab, "empty slabs"),
    (_miscount("resident_bytes"), "RESIDENT bytes"),
    (_miscount("limbo_bytes"), "LIMBO bytes"),
    (_miscount("granted_bytes"), "GRANTED bytes"),
    (_miscount("block_count"), "blocks counted"),
    (_miscount("record_count"), "records are miscounted"),
    (_miscount("resident_record_bytes"), "record bytes are miscounted"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__.strip("_") for damage, _ in DAMAGES])
def test_validate_state_damaged_state_is_named(damage: Damage, message: str):
    small = SmallStore(capacity_pages=8, grant_pages=16)
    small.put("ab")
    small.put("z", at="y")
    small.grant()
    validate_state(small.store)
    damage(small)
    with pytest.raises(InvariantViolation, match=message):
        validate_state(small.store)


def test_story_of_a_key_tells_its_life():
    small = SmallStore(capacity_pages=1)
    small.put("a")
    small.put("b")
    chapters = small.store.story.of(key_of("a"))
    assert [(chapter.before.name, chapter.after.name, chapter.cause) for chapter in chapters] == [
        ("GRANTED", "RESIDENT", "committed"),
        ("RESIDENT", "LIMBO", "evicted"),
    ]
    assert "RESIDENT -> LIMBO (evicted)" in small.store.story.tell(key_of("a"), -1)
