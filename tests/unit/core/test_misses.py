"""Each cause of a miss, on a store without I/O; those that a daemon and its SSD add are tested with them."""

from __future__ import annotations

from typing import Any

from fakes.small_ssd import SmallSsd
from fakes.small_store import PAGE_BYTES, SESSION, SmallStore, key_of

from kvstore.core.block import Block
from kvstore.core.events import Accessed, FoundCorrupt, InvalidateWanted, RetainWanted, Ticked
from kvstore.core.instructions import Namespaced
from kvstore.core.misses import Misses
from kvstore.core.ssd_record import SsdBlock
from kvstore.protocol.messages import PutStatus, Reason, TierId
from kvstore.protocol.misses import MissCause

MIB = 1 << 20


class Explained(SmallStore):
    """A small store whose misses are explained; ``ask("abc")`` matches a chain and says what is missing, and why."""

    def __init__(self, *arguments: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.misses = Misses.watch(self.store, MIB)
        self.accesses = 0

    def ask(self, letters: str, *, refused: int = 0) -> str:
        self.accesses += 1
        keys = [key_of(letter) for letter in letters]
        blocks: list[Block | SsdBlock] = [*self.store.leading_in_tiers(self.namespace.id, keys)]
        hits = len(blocks) - refused
        above = blocks[hits - 1] if hits else None
        found = self.misses.causes(self.namespace, keys[hits:], above, matched=True, refused=refused)
        before = self.misses.blocks.total()
        self.report(keys, [(blocks[hits - 1], hits)] if hits else [], keys[hits:], refused=refused)
        assert self.misses.blocks.total() - before == len(keys) - hits
        return " ".join(f"{letter}:{cause}" for letter, (cause, _) in zip(letters[hits:], found, strict=True))

    def report(self, keys: list[bytes], runs: list[Any], missing: list[bytes], **options: Any) -> None:
        options = {"namespace_id": self.namespace.id, "matched": True, **options}
        self.executor.apply(Accessed(SESSION, self.accesses, runs, len(keys), tuple(missing), **options))

    def extra_pages(self, letter: str) -> int:
        """How many more pages would have kept a block."""
        self.misses.settle()
        place = self.misses.ghosts.find(self.namespace.salt, key_of(letter))
        return self.misses.ghosts.extra_bytes(place) // PAGE_BYTES


def test_block_that_nobody_stored_is_never_seen() -> None:
    store = Explained()
    assert store.ask("ab") == "a:never_seen b:never_seen"
    assert store.misses.requests == {MissCause.NEVER_SEEN: 1}
    assert store.misses.blocks == {MissCause.NEVER_SEEN: 2}


def test_prompt_that_goes_on_behind_what_is_known_is_never_seen() -> None:
    store = Explained()
    store.put("ab")
    assert store.ask("abcd") == "c:never_seen d:never_seen"


def test_prompt_that_leaves_a_known_path_diverged() -> None:
    store = Explained()
    store.put("abcd")
    assert store.ask("abxy") == "x:diverged y:diverged"


def test_prompt_that_shares_nothing_is_never_seen() -> None:
    store = Explained()
    store.put("abcd")
    assert store.ask("xy") == "x:never_seen y:never_seen"


def test_prompt_that_leaves_a_path_whose_rest_is_gone_diverged() -> None:
    store = Explained(4)
    store.put("abc")
    store.touch("ab")
    store.put("vx")
    assert store.resident() == "abvx"
    assert store.ask("aby") == "y:diverged"


def test_prompt_that_leaves_a_path_all_of_which_is_gone_diverged() -> None:
    store = Explained(4)
    store.put("abc")
    store.put("vxyz")
    assert store.resident() == "vxyz"
    assert store.ask("abd") == "a:evicted b:evicted d:diverged"


def test_block_with_a_child_that_left_remembers_it_when_it_comes_back() -> None:
    store = Explained(2)
    store.put("ab")
    store.put("xy")
    store.put("a")
    store.touch("a")
    assert store.ask("ac") == "c:diverged"


def test_evicted_blocks_have_each_their_own_cause() -> None:
    store = Explained(4)
    store.put("abc")
    store.put("xyz")
    assert store.resident() == "axyz"
    assert store.ask("abcd") == "b:evicted c:evicted d:never_seen"
    assert store.misses.requests == {MissCause.EVICTED: 1}


def test_evicted_block_says_what_would_have_kept_it() -> None:
    store = Explained(4)
    store.put("abc")
    store.put("xyz")
    assert [store.extra_pages(letter) for letter in "bc"] == [1, 2]
    store.put("b", at="a")
    store.touch("b")
    assert store.resident() == "abxy"
    assert [store.extra_pages(letter) for letter in "zc"] == [1, 2]
    ghost = store.misses.ghosts.ghost(store.misses.ghosts.find(store.namespace.salt, key_of("c")))
    assert (ghost.cause, ghost.tier, ghost.policy, ghost.depth) == (MissCause.EVICTED, TierId.DRAM, "lru", 2)


def test_block_that_came_back_is_a_hit_and_leaves_anew() -> None:
    store = Explained(2)
    store.put("ab")
    store.put("xy")
    store.put("ab")
    assert store.ask("ab") == ""
    store.put("xy")
    assert store.ask("ab") == "a:evicted b:evicted"
    assert [store.extra_pages(letter) for letter in "ab"] == [1, 2]


def test_block_that_leaves_twice_at_once_counts_once() -> None:
    store = Explained(2)
    for letters in ("ab", "xy", "ab", "xy", "vw"):
        store.put(letters)
    assert store.resident() == "vw"
    assert [store.extra_pages(letter) for letter in "xyab"] == [1, 2, 3, 4]


def test_removed_block() -> None:
    store = Explained()
    store.put("ab")
    store.remove("b")
    assert store.ask("ab") == "b:removed"
    store.clear_all()
    assert store.ask("ab") == "a:removed b:removed"


def test_block_of_an_earlier_generation_was_invalidated() -> None:
    store = Explained()
    store.put("ab")
    before = store.namespace
    answer = store.executor.apply(InvalidateWanted(before.id, SESSION))
    assert isinstance(answer, Namespaced)
    store.namespace = answer.namespace
    assert store.ask("ab") == "a:invalidated b:invalidated"
    # A client that does not know of it yet.
    keys = [key_of("v")]
    store.accesses += 1
    store.report(keys, [], keys, namespace_id=before.id)
    assert store.misses.blocks == {MissCause.INVALIDATED: 3}


def test_corrupt_block() -> None:
    store = Explained()
    store.put("ab")
    store.executor.apply(FoundCorrupt(store.blocks("b")[0].parts[0].slot, "a bit flipped"))
    assert store.ask("ab") == "b:corrupt"


def test_block_whose_time_was_over_expired() -> None:
    store = Explained()
    store.put("ab")
    store.executor.apply(RetainWanted(store.namespace.id, [key_of("b")], 50, 100, drop=True))
    store.executor.now_ns = 200
    store.executor.apply(Ticked())
    assert store.ask("ab") == "b:expired"


def test_block_that_left_for_its_tenants_quota() -> None:
    store = Explained(8, quotas={"small": 2})
    store.put("ab")
    store.put("x")
    assert store.ask("ab") == "b:quota"
    # More room in the tier would not have kept it.
    place = store.misses.ghosts.find(store.namespace.salt, key_of("b"))
    assert store.misses.ghosts.out[place] == 0


def test_block_without_one_of_its_parts() -> None:
    store = Explained(parts=2)
    store.commit(store.record("a", part=0), store.record("a", part=1), store.record("b", "a", part=0))
    assert store.ask("abc") == "b:part_missing c:never_seen"


def test_block_whose_put_was_rejected_is_not_stored() -> None:
    store = Explained()
    store.put("a")
    answers = store.commit(store.record("b", "a", codec=77))
    assert answers == [(PutStatus.REJECTED, Reason.OTHER_CODEC)]
    assert store.ask("abc") == "b:not_stored c:never_seen"
    ghost = store.misses.ghosts.ghost(store.misses.ghosts.find(store.namespace.salt, key_of("b")))
    assert ghost.reason is Reason.OTHER_CODEC
    store.put("b", at="a")
    assert store.ask("ab") == ""


def test_block_that_was_evicted_and_then_refused_is_not_stored() -> None:
    store = Explained(2)
    store.put("ab")
    store.put("xy")
    assert store.ask("ab") == "a:evicted b:evicted"
    store.store.tell_refused(store.namespace.id, key_of("a"), Reason.OVERLOADED)
    assert store.ask("ab") == "a:not_stored b:evicted"
    assert store.extra_pages("b") == 2


def test_block_behind_which_there_was_no_slot_is_not_stored() -> None:
    store = Explained()
    store.put("a")
    store.store.tell_refused_behind(store.namespace.id, key_of("a"), Reason.DEMOTING)
    assert store.ask("abc") == "b:not_stored c:not_stored"


def test_chain_that_does_not_fit_is_not_stored() -> None:
    store = Explained(2)
    answers = store.put("abcd")
    assert [status for status, _ in answers].count(PutStatus.STORED) == 2
    assert store.ask("abcd") == "c:not_stored d:not_stored"


def test_block_behind_a_gap_misses_for_the_gap() -> None:
    store = Explained()
    store.put("abc")
    store.remove("b")
    assert store.ask("abc") == "b:removed c:removed"


def test_report_that_comes_late_says_what_was_then() -> None:
    store = Explained(2)
    store.put("ab")
    store.put("xy")
    keys = [key_of(letter) for letter in "ab"]
    store.put("ab")
    store.accesses += 1
    store.report(keys, [], keys)
    assert store.misses.blocks == {MissCause.EVICTED: 2}


def test_request_counts_once_with_its_match() -> None:
    store = Explained()
    store.put("a")
    store.ask("abc")
    keys = [key_of(letter) for letter in "bc"]
    store.report(keys, [], keys, matched=False)
    assert store.misses.blocks.total() == 2
    assert store.misses.requests.total() == 1
    store.accesses += 1
    store.report(keys, [], keys, matched=False)
    store.report(keys[:1], [], keys[:1], matched=False)
    assert store.misses.blocks == {MissCause.NEVER_SEEN: 5}
    assert store.misses.requests.total() == 2


def test_keys_that_a_mapped_client_does_not_name_count_with_the_last() -> None:
    store = Explained()
    store.put("ab")
    store.remove("b")
    keys = [key_of(letter) for letter in "abcdefgh"]
    store.accesses += 1
    store.report(keys, [(store.blocks("a")[0], 1)], keys[1:4], missed=7)
    assert store.misses.blocks == {MissCause.REMOVED: 1, MissCause.NEVER_SEEN: 6}


class Below(Explained):
    """A store with an SSD below that holds blocks of its namespace."""

    def __init__(self, *arguments: int, slabs: int = 4, **options: Any) -> None:
        self.small = SmallSsd(slabs)
        super().__init__(*arguments, ssd=self.small.ssd, **options)
        self.namespace.ssd = self.small.space
        self.small.space.state = self.namespace.id


def test_block_on_the_ssd_whose_load_was_refused_is_recomputed() -> None:
    store = Below()
    store.small.put("abc")
    assert store.ask("abcd", refused=2) == "b:recompute c:recompute d:never_seen"


def test_block_that_is_left_in_no_tier_was_evicted_from_the_ssd() -> None:
    store = Below()
    store.small.put("ab")
    store.put("ab")
    assert store.ask("ab") == ""
    store.small.ssd.evict(store.small.block("b"))
    assert store.ask("ab") == ""
    store.store.handle(Accessed(SESSION, 0, [], 0), 7)
    store.small.put("vwxyz")
    store.remove("b")
    assert store.ask("ab") == "b:removed"


def test_block_that_the_ssd_evicts_has_its_tier_and_bytes() -> None:
    store = Below()
    store.small.put("ab")
    store.small.ssd.evict(store.small.block("b"))
    assert store.ask("ab") == "b:evicted"
    ghost = store.misses.ghosts.ghost(store.misses.ghosts.find(store.namespace.salt, key_of("b")))
    assert (ghost.tier, ghost.policy, store.extra_pages("b")) == (TierId.SSD, "lru", 1)
    store.small.put("b", at="a")
    assert store.ask("ab") == ""
    assert store.ask("abc") == "c:never_seen"
    assert store.ask("ac") == "c:diverged"


def test_block_on_the_ssd_that_could_not_be_loaded() -> None:
    store = Below()
    store.small.put("ab")
    keys = [key_of("b")]
    store.accesses += 1
    store.report(keys, [], keys, matched=False)
    assert store.misses.blocks == {MissCause.FAILED_LOAD: 1}
    # A read error: it is forgotten, and nobody knows whether it is damaged.
    store.small.ssd.corrupt(store.small.block("b").parts[0])
    assert store.ask("ab") == "b:corrupt"
    store.store.tell_failed_load(store.namespace, key_of("b"))
    assert store.ask("ab") == "b:failed_load"


def test_block_that_leaves_dram_and_is_below_is_no_miss() -> None:
    store = Below(2)
    store.small.put("ab")
    store.put("ab")
    store.put("xy")
    assert store.ask("ab") == ""
    assert store.ask("ac") == "c:diverged"


def test_block_that_left_dram_without_a_copy_is_nothing_more_ssd_would_have_kept() -> None:
    store = Below(2)
    store.put("ab")
    store.put("xy")
    assert store.ask("ab") == "a:evicted b:evicted"
    assert sum(store.misses.extra) == 0
    store.small.put("m")
    store.small.ssd.evict(store.small.block("m"))
    assert store.ask("m") == "m:evicted"
    assert sum(store.misses.extra) == 1
