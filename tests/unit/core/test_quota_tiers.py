"""Quotas of DRAM over an SSD: what a tenant writes below before it leaves, and its quota there."""

from __future__ import annotations

from fakes.small_store import PAGE_BYTES, SESSION, key_of
from fakes.two_tiers import TwoTiers

from kvstore.core.block import Record
from kvstore.core.events import PersistWanted, SsdChanged
from kvstore.core.instructions import Refuse
from kvstore.core.invariants import validate_state
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace

STORED = (PutStatus.STORED, Reason.NONE)
DEMOTING = Refuse(PutStatus.THROTTLED, Reason.DEMOTING)


def patient_put(tiers: TwoTiers, letters: str, at: str = "") -> list[tuple[PutStatus, Reason]]:
    """As the daemon does it with one record after the other: a slot for it behind its parent, then its commit."""
    answers = []
    for letter in letters:
        parent = key_of(at) if at else bytes(32)
        for _ in range(5):
            granted = tiers.executor.want_slot(SESSION, PAGE_BYTES - 1, 0, tiers.namespace.id, parent)
            if granted != DEMOTING:
                break
            tiers.settle()
        if isinstance(granted, Refuse):
            answers.append((granted.status, granted.reason))
            continue
        answers += tiers.commit(tiers.record(letter, at, slot=granted.slot))
        at = letter
    validate_state(tiers.store)
    return answers


def test_tenant_at_its_limit_writes_its_blocks_below_before_they_leave():
    tiers = TwoTiers(16, 4, quotas={"small": 4})
    other = tiers.join(Namespace(name="other"))
    own, tiers.namespace = tiers.namespace, other
    assert patient_put(tiers, "xyz") == [STORED] * 3
    tiers.namespace = own
    for letter in "abcdefgh":
        assert patient_put(tiers, letter) == [STORED]
    tiers.settle()
    assert tiers.store.counters.dropped_blocks == 0, "nothing was lost for want of a copy"
    assert len(tiers.resident()) == 4
    assert {*tiers.resident(), *tiers.below()} == set("abcdefgh")
    assert len(other.blocks) == 3


def test_slot_is_refused_while_what_must_leave_for_it_is_written():
    tiers = TwoTiers(16, 4, quotas={"small": 2})
    tiers.put("a")
    tiers.put("b")
    assert tiers.want() == DEMOTING
    assert tiers.retired(clean=False) == "a", "its oldest block is on its way, and no more than is needed"
    assert tiers.want() == DEMOTING
    assert tiers.retired(clean=False) == "a"
    tiers.settle()
    assert isinstance(tiers.want(), Record)
    validate_state(tiers.store)


def test_what_a_tenant_was_lent_has_its_room_kept():
    tiers = TwoTiers(16, 4, quotas={"small": 2})
    tiers.put("ab")
    assert tiers.want() == DEMOTING
    tiers.settle()
    granted = tiers.want()
    assert isinstance(granted, Record)
    assert tiers.retired(clean=True) == "b"
    tiers.touch("ab")
    assert tiers.retired(clean=True) == "b", "it was used, but its room is promised"
    tiers.executor.apply(SsdChanged(writable=False))
    validate_state(tiers.store)


# ---------------------------------------------------------------- on the SSD


def persist(tiers: TwoTiers, letters: str) -> None:
    tiers.executor.apply(PersistWanted(tiers.namespace.id, [key_of(letter) for letter in letters]))
    tiers.settle()


def test_tenant_at_its_limit_below_evicts_its_own_copies():
    tiers = TwoTiers(32, 8, ssd_quotas={"small": 3})
    other = tiers.join(Namespace(name="other"))
    own, tiers.namespace = tiers.namespace, other
    tiers.put("vwxyz")
    persist(tiers, "vwxyz")
    tiers.namespace = own
    for letter in "abcdef":
        tiers.put(letter)
        persist(tiers, letter)
    assert tiers.below() == "def"
    tiers.namespace = other
    assert tiers.below() == "vwxyz"
    assert tiers.twin.ssd.tenants["small"].evicted_blocks == 3


def test_chain_longer_than_the_quota_below_keeps_its_beginning_and_the_rest_is_given_up():
    tiers = TwoTiers(32, 8, ssd_quotas={"small": 3})
    tiers.put("abcdef")
    persist(tiers, "abcdef")
    assert tiers.below() == "abc"
    assert tiers.hits("abcdef") == 6, "DRAM has the rest"
    assert not tiers.twin.queue, "nobody waits for what gets no room"


def test_lower_quota_after_a_restart_is_kept_at_once():
    tiers = TwoTiers(32, 8, ssd_quotas={"small": 5})
    tiers.put("abcde")
    persist(tiers, "abcde")
    tiers.twin.quotas = {"small": 2 * PAGE_BYTES}
    ssd = tiers.twin.crash(0)
    assert ssd.tenants["small"].slot_bytes == 5 * PAGE_BYTES
    ssd.keep_quotas()
    assert ssd.tenants["small"].slot_bytes == 2 * PAGE_BYTES
    (namespace,) = ssd.namespaces.values()
    assert sorted(key[:1] for key in namespace.tree.blocks) == [b"a", b"b"]
