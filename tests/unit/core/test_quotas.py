"""Quotas of tenants in DRAM: whose blocks leave, what is refused, and that nobody else notices."""

from __future__ import annotations

from functools import partial

import pytest
from fakes.small_store import PAGE_BYTES, SESSION, SmallStore, key_of

from kvstore.core.block import Block, Record
from kvstore.core.events import Displaced, InvalidateWanted, LeaseReleased, PolicyChanged, RetainWanted
from kvstore.core.instructions import Namespaced, Refuse
from kvstore.core.invariants import validate_state
from kvstore.core.pools import pooled
from kvstore.core.state import StoreLimits
from kvstore.core.watching import Cause
from kvstore.policy.base import PolicyContext
from kvstore.policy.registry import POLICIES, make_policy
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

STORED = (PutStatus.STORED, Reason.NONE)
OVER_QUOTA = (PutStatus.REJECTED, Reason.QUOTA)
every_policy = pytest.mark.parametrize("policy", POLICIES)


class Left:
    """Which blocks left, and why."""

    def __init__(self) -> None:
        self.causes: dict[str, Cause] = {}

    def accessed(self, *_: object) -> None: ...

    def stored(self, *_: object, **__: object) -> None: ...

    def left(self, block: Block, cause: Cause) -> None:
        self.causes[block.key.rstrip(b"_").decode()] = cause


class Tenants(SmallStore):
    """Tenant ``chat`` may have four pages, ``batch`` two, everybody else has no quota; the tier has eight."""

    def __init__(self, policy: str = "lru", capacity_pages: int = 8, **quotas: int) -> None:
        super().__init__(capacity_pages, 8, policy=policy, quotas=quotas or {"chat": 4, "batch": 2})
        self.spaces = {"small": self.namespace}
        for name in ("chat", "batch", "free"):
            self.spaces[name] = self.join(Namespace(name=name))
        self.left = Left()
        self.store.watchers.append(self.left)

    def as_(self, name: str) -> SmallStore:
        self.namespace = self.spaces[name]
        return self

    def has(self, name: str) -> str:
        self.as_(name)
        validate_state(self.store)
        return self.resident()

    def want(self, name: str, pages: int = 1, access: int = 0, parent: str = "") -> Record | Refuse:
        space = self.spaces[name]
        return self.executor.want_slot(
            SESSION, pages * PAGE_BYTES - 1, access, space.id, key_of(parent) if parent else b""
        )


@every_policy
def test_tenant_at_its_limit_evicts_its_own_blocks_only(policy: str):
    tenants = Tenants(policy)
    tenants.as_("free").put("xyz")
    for letter in "abcdefgh":
        assert tenants.as_("chat").put(letter) == [STORED]
    assert len(tenants.has("chat")) == 4
    assert tenants.has("free") == "xyz"
    assert set(tenants.left.causes.values()) == {Cause.QUOTA}
    assert tenants.store.tenants["chat"].evicted_blocks == 4


def test_tenant_with_lru_evicts_its_least_recently_used():
    tenants = Tenants()
    tenants.as_("free").put("old")
    for letter in "abcd":
        tenants.as_("chat").put(letter)
    tenants.touch("a")
    tenants.put("e")
    assert tenants.has("chat") == "acde"
    assert tenants.has("free") == "dlo", "older, and not the tenant's"


def test_full_tier_evicts_whoever_was_used_least_recently():
    tenants = Tenants(capacity_pages=4)
    tenants.as_("free").put("x")
    tenants.as_("chat").put("a")
    tenants.as_("batch").put("b")
    tenants.as_("free").put("y")
    tenants.as_("batch").put("c")
    assert (tenants.has("free"), tenants.has("chat"), tenants.has("batch")) == ("y", "a", "bc")
    tenants.as_("free").put("z")
    assert (tenants.has("free"), tenants.has("chat"), tenants.has("batch")) == ("yz", "", "bc")
    assert set(tenants.left.causes.values()) == {Cause.EVICTED}


def test_pools_of_lru_evict_as_one_lru_would():
    pooled, alone = Tenants(capacity_pages=6, chat=6, batch=6), SmallStore(6, 8)
    spaces = {name: alone.join(Namespace(name=name)) for name in ("chat", "batch", "free")}
    for step in range(200):
        name = ("chat", "batch", "free")[step * 7 % 3]
        letter = "abcdefg"[step * 5 % 7]
        alone.namespace = spaces[name]
        for store in (pooled.as_(name), alone):
            if key_of(letter) in store.namespace.blocks:
                store.touch(letter)
            else:
                store.put(letter)
        assert pooled.has(name) == alone.resident()


def test_chain_longer_than_the_quota_keeps_its_beginning():
    tenants = Tenants()
    assert tenants.as_("chat").put("abcdef", access=7) == [STORED] * 4 + [OVER_QUOTA] * 2
    assert tenants.has("chat") == "abcd"
    assert tenants.store.tenants["chat"].refused_puts == 2
    assert tenants.as_("free").put("wxyz") == [STORED] * 4


def test_record_larger_than_the_quota_gets_no_slot():
    tenants = Tenants()
    refused = Refuse(PutStatus.REJECTED, Reason.QUOTA)
    assert tenants.want("batch", pages=3) == refused
    assert isinstance(tenants.want("free", pages=3), Record)


def test_slot_of_a_full_tier_for_a_tenant_at_its_limit_costs_nobody_else_anything():
    tenants = Tenants(capacity_pages=4)
    tenants.as_("free").put("xy")
    tenants.as_("batch").put("a")
    tenants.put("b")
    # The first ones take what is free; then its own blocks leave, and then nothing does.
    while isinstance(granted := tenants.want("batch", access=9), Record):
        assert tenants.has("free") == "xy"
    assert granted.status is PutStatus.THROTTLED
    assert tenants.has("free") == "xy"


def test_slot_is_made_of_the_tenants_own_blocks_where_it_is_at_its_limit():
    tenants = Tenants(capacity_pages=8, chat=2)
    tenants.as_("free").put("uvwxyz")
    tenants.as_("chat").put("a")
    tenants.put("b")
    # All slots of the arena are lent or hold something: the next one has to come from somebody.
    while isinstance(tenants.executor.want_slot_ahead(SESSION, PAGE_BYTES - 1), Record):
        pass
    tenants.store.limits = StoreLimits(
        capacity_bytes=8 * PAGE_BYTES, grant_bytes=64 * PAGE_BYTES, grant_bytes_per_session=64 * PAGE_BYTES
    )
    assert isinstance(tenants.want("chat", access=5), Record)
    assert (tenants.has("free"), tenants.has("chat")) == ("uvwxyz", "b")
    assert tenants.left.causes == {"a": Cause.QUOTA}
    assert isinstance(tenants.want("chat", access=5), Record)
    assert (tenants.has("free"), tenants.has("chat")) == ("uvwxyz", "")
    assert tenants.want("chat", access=5) == Refuse(PutStatus.THROTTLED, Reason.GRANT_LIMIT), "what it was lent counts"
    assert tenants.has("free") == "uvwxyz"


def test_quota_with_leased_blocks_is_throttled_not_rejected():
    tenants = Tenants()
    tenants.as_("batch").put("a")
    tenants.put("b")
    lease = tenants.lease("ab")
    assert tenants.put("c") == [(PutStatus.THROTTLED, Reason.ALL_HELD)]
    tenants.executor.apply(LeaseReleased(SESSION, lease))
    assert tenants.put("c") == [STORED]
    assert tenants.has("batch") == "bc"


def test_orphan_gets_room_that_is_free_and_evicts_nothing_for_it():
    tenants = Tenants()
    tenants.as_("batch").put("a")
    assert tenants.put("x", at="nobody") == [STORED]
    assert tenants.put("y", at="nobody") == [OVER_QUOTA]
    assert tenants.has("batch") == "ax"


def test_better_record_that_is_larger_counts_with_what_it_grows():
    tenants = Tenants()
    tenants.spaces["batch"] = tenants.join(Namespace(name="batch", codec="kivi4"))
    space = tenants.as_("batch")
    assert space.put("a", fidelity=85) == [STORED]
    assert space.put("b", fidelity=85) == [STORED]
    assert space.put("b", fidelity=255, pages=2) == [STORED]
    assert tenants.has("batch") == "b"
    assert space.put("b", fidelity=255, pages=2) == [(PutStatus.EXISTS, Reason.NONE)]


def test_quota_is_of_all_namespaces_of_a_name_and_outlives_generations():
    tenants = Tenants()
    first, second = tenants.join(Namespace(name="batch", model="m")), tenants.join(Namespace(name="batch", model="n"))
    tenants.namespace = first
    assert tenants.put("a") == [STORED]
    tenants.namespace = second
    assert tenants.put("b") == [STORED]
    assert tenants.put("c") == [STORED]
    assert not first.blocks, "the oldest of all its namespaces"
    answer = tenants.executor.apply(InvalidateWanted(second.id, SESSION))
    assert isinstance(answer, Namespaced)
    assert tenants.store.tenants["batch"].slot_bytes == 0
    tenants.namespace = answer.namespace
    assert tenants.put("def", access=3) == [STORED, STORED, OVER_QUOTA]
    validate_state(tenants.store)


def test_displaced_for_its_place_in_the_index_counts_out():
    tenants = Tenants()
    tenants.as_("batch").put("a")
    slots = [record.slot for record in tenants.blocks("a")[0].parts.values()]
    tenants.as_("free").put("x")
    (own,) = [record.slot for record in tenants.blocks("x")[0].parts.values()]
    del tenants.executor.index[tenants.namespace.id, key_of("x"), 0]
    del tenants.executor._entries[own]
    tenants.executor.apply(Displaced(own, slots))
    assert tenants.store.tenants["batch"].slot_bytes == 0
    validate_state(tenants.store)


@every_policy
def test_another_policy_takes_over_the_blocks_of_all_tenants(policy: str):
    tenants = Tenants()
    for name, letters in (("free", "xyz"), ("chat", "abcd"), ("batch", "m")):
        for letter in letters:
            assert tenants.as_(name).put(letter) == [STORED]
    store = tenants.as_("chat").store
    tenants.executor.apply(RetainWanted(tenants.namespace.id, [key_of("a")], 90))
    tenants.lease("b")
    context = PolicyContext(store.limits.capacity_bytes, lambda: 0)
    other = pooled(partial(make_policy, policy), context, store.tenants.values())
    tenants.executor.apply(PolicyChanged(other))
    validate_state(store)
    assert store.policy.name == policy
    for letter in "ef":
        assert tenants.put(letter) == [STORED]
    assert tenants.has("chat") == "abef"
    assert tenants.has("free") == "xyz"
