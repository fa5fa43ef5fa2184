"""What a journal says of single changes; ``tests/property/test_store_model.py`` has all of them at random."""

from __future__ import annotations

from fakes.small_store import SmallStore, key_of

from kvstore.core.invariants import validate_state
from kvstore.core.journal import Change, Journal
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace


def journaled(**options: object) -> tuple[SmallStore, Journal, list[int]]:
    """A store with a journal, and one number for each time that it woke somebody."""
    small = SmallStore(**options)  # type: ignore[arg-type]
    woken: list[int] = []
    journal = Journal(lambda: woken.append(1))
    small.store.journal = journal
    return small, journal, woken


def drained(journal: Journal, count: int = 1000) -> str:
    """Changes as text: ``+a -b 0``."""
    signs = {Change.STORED: "+", Change.REMOVED: "-", Change.CLEARED: "0"}
    return " ".join(
        signs[entry.change] + ("" if entry.block is None else entry.block.key.rstrip(b"_").decode())
        for entry in journal.drain(count)
    )


def test_blocks_are_told_in_order_and_once() -> None:
    small, journal, woken = journaled()
    small.put("abc")
    assert len(woken) == 1, "woken for each change"
    assert drained(journal, 2) == "+a +b"
    assert drained(journal) == "+c"
    assert drained(journal) == ""
    small.put("abc")
    assert journal.waiting == 0
    small.touch("abc")
    assert journal.waiting == 0
    validate_state(small.store)


def test_eviction_is_told_before_what_it_made_room_for() -> None:
    small, journal, _ = journaled(capacity_pages=2)
    small.put("ab")
    drained(journal)
    small.put("x")
    assert set(drained(journal).split()) == {"-b", "+x"}


def test_what_nobody_was_told_of_leaves_no_trace() -> None:
    small, journal, woken = journaled()
    small.put("ab")
    small.clear_all()
    assert (journal.waiting, len(journal)) == (0, 0)
    assert drained(journal) == ""
    small.put("c")
    assert len(woken) == 2
    assert drained(journal) == "+c"


def test_removed_and_put_again_between_two_drains_is_both() -> None:
    small, journal, _ = journaled()
    small.put("ab")
    drained(journal)
    small.remove("a")
    small.put("a", at="x")
    assert drained(journal) == "-a +a"
    small.remove("b")
    assert drained(journal) == "-b"


def test_better_record_is_no_event() -> None:
    small, journal, _ = journaled(namespace=Namespace(name="lossy", codec="kivi4"))
    small.commit(small.record("a", fidelity=34, codec=5))
    drained(journal)
    assert small.commit(small.record("a", fidelity=255, codec=2)) == [(PutStatus.STORED, Reason.NONE)]
    assert drained(journal) == ""


def test_moved_record_is_no_event() -> None:
    small, journal, _ = journaled(capacity_pages=64, grant_pages=16, slab_pages=8)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?"
    for letter in letters:
        small.put(letter)
    small.remove(letters[::2])
    drained(journal)
    for letter in "#$%&":
        small.put(letter, pages=8)
    assert small.store.counters.moved_records, "nothing moved; the sizes of this test are wrong"
    assert drained(journal) == "+# +$ +% +&"
    validate_state(small.store)


def test_block_is_told_when_its_last_part_is_there() -> None:
    small, journal, woken = journaled(parts=2)
    small.commit(small.record("a", part=1))
    assert not woken
    assert drained(journal) == ""
    small.commit(small.record("a", part=0))
    assert drained(journal) == "+a"
    small.remove("a")
    assert drained(journal) == "-a"


def test_part_that_found_no_room_was_never_there() -> None:
    small, journal, _ = journaled(capacity_pages=2, parts=2)
    small.commit(small.record("a", part=0), small.record("b", part=0))
    small.lease("ab")
    assert small.commit(small.record("a", part=1)) == [(PutStatus.THROTTLED, Reason.ALL_HELD)]
    assert drained(journal) == ""
    validate_state(small.store)


def test_clearing_everything_is_one_change() -> None:
    small, journal, _ = journaled()
    small.put("abc")
    drained(journal)
    small.clear_all()
    small.put("d")
    assert drained(journal) == "0 +d"
    assert len(journal) == 1
    small.remove("d")
    assert drained(journal) == "-d", "a removed block is not everything cleared"


def test_clear_while_another_namespace_has_blocks_is_removals() -> None:
    small, journal, _ = journaled()
    small.put("a")
    first = small.namespace
    small.namespace = small.join(Namespace(name="other"))
    small.put("b")
    drained(journal)
    small.clear_all()
    assert drained(journal) == "-b"
    small.namespace = first
    small.clear_all()
    assert drained(journal) == "0"


def test_pages_see_every_block_that_was_there_all_the_time() -> None:
    small, journal, _ = journaled(capacity_pages=20, grant_pages=4)
    small.put("abcd")
    small.put("efgh", at="d")
    drained(journal)
    blocks, cursor = journal.page(0, 3)
    seen = [block.key for block in blocks]
    # Places that become free are taken again: by blocks that a reader of pages is told of.
    small.remove("bg")
    small.put("xyz")
    drained(journal)
    while cursor is not None:
        blocks, cursor = journal.page(cursor, 3)
        seen += [block.key for block in blocks]
    assert {key_of(letter) for letter in "acdefh"} <= set(seen)
    assert len(set(seen)) == len(seen)
    assert journal.page(1 << 62, 3) == ([], None)
    assert journal.page(-5, 3)[0] == journal.page(0, 3)[0]
