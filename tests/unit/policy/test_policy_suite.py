"""What ``kvstore.policy.base`` demands of every eviction policy; runs over the whole registry."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest
from fakes.prefix_tree import FakeBlock, PrefixTree
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.errors import InvalidArgument
from kvstore.policy.base import BEFORE_ALL, EvictionPolicy, PolicyContext
from kvstore.policy.ghosts import GHOST_BYTES
from kvstore.policy.handover import hand_over
from kvstore.policy.ranking import MOST_KEPT
from kvstore.policy.registry import POLICIES, SIMULATED, make_policy, make_simulated
from kvstore.policy.remembered import GHOSTS_AT_LEAST, SEGMENTS_AT_LEAST
from kvstore.policy.segments import KEY_BYTES, SEGMENT_BYTES

CONTEXT = PolicyContext(64 * 4096, lambda: 0)
every_policy = pytest.mark.parametrize("make", [partial(make, CONTEXT) for make in SIMULATED.values()], ids=SIMULATED)
WEIGHTS = {"_small_bytes", "_once_bytes", "_often_bytes", "_window_bytes", "_main_bytes", "_protected_bytes"}
"""What policies with lists weighed by bytes count."""
WITHOUT_GHOSTS = {"lru", "clock", "sieve", "fifo", "lfu", "gdsf", "length-aware"}
MOST_GHOST_BYTES = {
    **dict.fromkeys(WITHOUT_GHOSTS, 0),
    "s3fifo": 58 * GHOST_BYTES,
    "arc": 64 * GHOST_BYTES,
    "adaptive": GHOSTS_AT_LEAST * KEY_BYTES + SEGMENTS_AT_LEAST * SEGMENT_BYTES,
}
"""At the capacity of ``CONTEXT``."""
REMEMBER_REMOVED = {"adaptive"}
"""What it knows of prefixes is of those that nobody can reach too."""
TURN_AWAY = {"w-tinylfu"}
"""Rather than to give a block for a path that is being stored; only policies that no daemon runs may."""
Make = Callable[[], EvictionPolicy]
NAMES = st.integers(0, 23)
SIZES = st.sampled_from([512, 4096, 65_536])


class PolicySuite(RuleBasedStateMachine):
    """Random trees and uses. Victims are leaves without leases, condemned ones first; there is one while one may go."""

    make: Make

    @initialize()
    def start(self) -> None:
        self.tree = PrefixTree(self.make())
        self.access = 0
        self.condemned: set[FakeBlock] = set()

    def _access(self, back: int) -> int:
        """A new access number, or one of a request that began earlier."""
        if back and self.access > back:
            return self.access - back
        self.access += 1
        return self.access

    def _pick(self, name: int) -> FakeBlock | None:
        blocks = self.tree.blocks
        return blocks[sorted(blocks)[name % len(blocks)]] if blocks else None

    @rule(name=NAMES, parent=st.none() | NAMES, back=st.integers(0, 3), slot_bytes=SIZES)
    def insert(self, name: int, parent: int | None, back: int, slot_bytes: int) -> None:
        if parent is not None and parent >= name:
            # Parents have smaller names: no circles, and any order of arrival.
            parent = None if not name else parent % name
        if name not in self.tree.blocks:
            self.tree.insert(name, parent, self._access(back), slot_bytes)

    @rule(name=NAMES, slot_bytes=SIZES)
    def resize(self, name: int, slot_bytes: int) -> None:
        if block := self._pick(name):
            self.tree.resize(block, slot_bytes)

    @rule(name=NAMES, back=st.integers(0, 3), hits=st.integers(1, 24))
    def touch(self, name: int, back: int, hits: int) -> None:
        if block := self._pick(name):
            hits = min(hits, 1 + len(list(block.ancestors())))
            self.tree.policy.touch(block, hits, self._access(back))
            self.condemned -= {block, *block.ancestors()}

    @rule(name=NAMES)
    def lease(self, name: int) -> None:
        if block := self._pick(name):
            block.leases += 1

    @rule(name=NAMES)
    def release(self, name: int) -> None:
        leased = [block for block in self.tree.blocks.values() if block.leases]
        if leased:
            self.tree.release(leased[name % len(leased)])

    @rule(name=NAMES)
    def remove_and_condemn(self, name: int) -> None:
        if block := self._pick(name):
            below = sorted(block.descendants(), key=lambda other: other.depth)
            self._removed(block)
            self.tree.remove(block)
            if below:
                self.tree.policy.condemn(below)
                self.condemned.update(below)

    @rule(name=NAMES)
    def drop(self, name: int) -> None:
        if block := self._pick(name):
            self._removed(block)
            self.tree.remove(block)

    @precondition(lambda self: self.tree.blocks)
    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        policy = self.tree.policy
        for _ in range(count):
            # Only here, and not after every step: a policy may settle its order when it is asked.
            victim = policy.next_victim()
            evictable = self.tree.evictable()
            assert (victim is None) == (not evictable), f"{victim} of {evictable}"
            if victim is None:
                return
            assert isinstance(victim, FakeBlock)
            assert any(victim is block for block in evictable), f"{victim} is no leaf without leases"
            assert policy.next_victim() is victim, "the victim changes without a change in between"
            first = self.condemned.intersection(evictable)
            assert not first or victim in first, f"{victim} goes before the condemned {first}"
            self._removed(victim)
            self.tree.remove(victim, evicted=True)

    @precondition(lambda self: self.tree.blocks)
    @rule(back=st.integers(-1, 9), leaves=st.booleans())
    def evict_before(self, back: int, leaves: bool) -> None:
        policy, before = self.tree.policy, max(self.access - back, BEFORE_ALL)
        victim = policy.next_victim(before)
        may_leave = [block for block in self.tree.evictable() if policy.used(block) < before]
        assert (victim is None) == (not may_leave), f"{victim} of {may_leave} for request {before}"
        if victim is None:
            return
        assert isinstance(victim, FakeBlock)
        assert any(victim is block for block in may_leave), f"{victim} was used by request {before}, or is held"
        assert policy.next_victim(before) is victim, "the victim changes without a change in between"
        if leaves:
            self._removed(victim)
            self.tree.remove(victim, evicted=True)

    def _removed(self, block: FakeBlock) -> None:
        # A condemned block that had another child in the meantime counts as used with it: either order is right.
        if block not in self.condemned:
            self.condemned -= set(block.ancestors())
        self.condemned.discard(block)

    @invariant()
    def every_block_is_held(self) -> None:
        assert self.tree.policy.held() == len(self.tree.blocks)

    def teardown(self) -> None:
        for block in self.tree.blocks.values():
            while block.leases:
                self.tree.release(block)
        left = len(self.tree.blocks)
        assert len(self.tree.evict_all()) == left
        assert self.tree.policy.held() == 0
        assert self.tree.policy.next_victim() is None
        for attribute, value in vars(self.tree.policy).items():
            if attribute in WEIGHTS:
                assert value == 0, f"an empty policy says {attribute} = {value}"


@every_policy
def test_policy_random_use_gives_leaves_without_leases_only(make: Make):
    class Suite(PolicySuite):
        pass

    Suite.make = staticmethod(make)
    examples = 60 if make().name in POLICIES else 30
    run_state_machine_as_test(Suite, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))


@every_policy
def test_policy_empty_has_no_victim(make: Make):
    policy = make()
    assert policy.next_victim() is None
    assert policy.held() == 0


@every_policy
def test_policy_name_is_its_registry_key(make: partial[EvictionPolicy]):
    assert SIMULATED[make().name] is make.func


@every_policy
def test_policy_all_leaves_leased_gives_none_until_released(make: Make):
    tree = PrefixTree(make())
    chain = tree.chain(5, 1)
    chain[-1].leases = 1
    assert tree.policy.next_victim() is None
    tree.release(chain[-1])
    assert tree.evict_all() == chain[::-1]


@every_policy
def test_policy_lease_taken_twice_holds_until_both_are_released(make: Make):
    tree = PrefixTree(make())
    (block,) = tree.chain(1, 1)
    block.leases = 2
    assert tree.policy.next_victim() is None
    tree.release(block)
    assert tree.policy.next_victim() is None
    tree.release(block)
    assert tree.policy.next_victim() is block


@every_policy
def test_policy_chain_put_in_reverse_leaves_tail_first(make: Make):
    tree = PrefixTree(make())
    for name in reversed(range(20)):
        tree.insert(name, name - 1 if name else None, 1)
    assert [victim.name for victim in tree.evict_all()] == list(reversed(range(20)))


@every_policy
def test_policy_parent_arriving_over_parked_children_is_not_chosen(make: Make):
    tree = PrefixTree(make())
    child = tree.insert(1, 0, 1)
    child.leases = 1
    assert tree.policy.next_victim() is None
    parent = tree.insert(0, None, 2)
    assert tree.policy.next_victim() is None
    tree.release(child)
    assert tree.evict_all() == [child, parent]


@every_policy
def test_policy_condemned_leave_first_until_touched(make: Make):
    tree = PrefixTree(make())
    old = tree.chain(3, 1, first=100)
    tree.insert(0, None, 2)
    below = tree.chain(6, 2, first=1, parent=0)
    tree.remove(tree.blocks[0])
    tree.policy.condemn(below)
    tree.policy.condemn(below)
    assert tree.policy.next_victim() is below[-1]
    tree.policy.touch(below[-1], 1, 9)
    assert tree.policy.next_victim() in (old[-1], *below[:-1])
    assert len(tree.evict_all()) == 9


@every_policy
def test_policy_blocks_of_the_running_request_are_passed_over_at_no_cost_the_next_time(make: Make):
    tree = PrefixTree(make())
    old, leased = (tree.insert(name, None, 4) for name in (1000, 2000))
    leased.leases = 1
    for name in range(200):
        tree.insert(name, None, 5)
    assert tree.policy.next_victim(BEFORE_ALL) is None
    assert tree.policy.next_victim(4) is None
    assert tree.policy.next_victim(5) is (None if tree.policy.name in TURN_AWAY else old)
    tree.remove(old, evicted=True)
    assert tree.policy.next_victim(5) is None
    assert _lines_run(lambda: [tree.policy.next_victim(5) for _ in range(100)]) < 4_000
    tree.release(leased)
    assert tree.policy.next_victim(5) is (None if tree.policy.name in TURN_AWAY else leased)
    assert tree.policy.next_victim(6) is not None
    assert len(tree.evict_all()) == 201


def test_policy_of_a_daemon_turns_nothing_away():
    assert not TURN_AWAY & POLICIES.keys()


@every_policy
def test_policy_passed_over_blocks_that_are_used_extended_or_removed_stay_right(make: Make):
    tree = PrefixTree(make())
    blocks = [tree.insert(name, None, 5) for name in range(6)]
    assert tree.policy.next_victim(5) is None
    tree.policy.touch(blocks[0], 1, 6)
    tree.insert(10, 1, 6)
    tree.remove(blocks[2])
    blocks[3].leases += 1
    tree.resize(blocks[4], 8192)
    assert tree.policy.next_victim(5) is None
    tree.remove(tree.blocks[10])
    tree.release(blocks[3])
    assert tree.policy.next_victim(5) is None
    left = tree.evict_all()
    assert sorted(block.name for block in left) == [0, 1, 3, 4, 5]


@every_policy
def test_policy_blocks_of_another_policy_are_taken_over_in_order_of_their_use(make: Make):
    source = PrefixTree(make_policy("lru", CONTEXT))
    rng = random.Random(7)
    for request in range(1, 60):
        path = [100 * request + index for index in range(rng.randint(1, 8))]
        source.insert(path[0], rng.choice([*source.blocks, None]), request)
        for above, name in itertools.pairwise(path):
            source.insert(name, above, request)
        source.policy.touch(rng.choice(list(source.blocks.values())), 2, request)
    below = list(source.blocks[500].descendants()) if source.blocks[500].children else []
    source.remove(source.blocks[500])
    source.policy.condemn(below)
    tree = PrefixTree(make(), source.blocks, source.orphans)
    hand_over(source.policy, tree.policy, source.blocks.values())
    count = len(source.blocks)
    assert tree.policy.held() == count
    victims = tree.evict_all()
    assert set(victims[: len(below)]) == set(below)
    assert len(victims) == count
    assert tree.policy.held() == 0


@every_policy
def test_policy_ghosts_are_of_evicted_blocks_only_and_bounded(make: Make):
    tree = PrefixTree(make())
    for name in range(300):
        tree.remove(tree.insert(name, None, name + 1))
    assert tree.policy.ghost_bytes() == 0 or tree.policy.name in REMEMBER_REMOVED
    most_bytes = 0
    for access in range(301, 4_001):
        newest = tree.insert(access, None, access)
        if not access % 3:
            tree.policy.touch(newest, 1, access + 1)
        if len(tree.blocks) > 64:
            victim = tree.policy.next_victim()
            assert isinstance(victim, FakeBlock)
            tree.remove(victim, evicted=True)
        most_bytes = max(most_bytes, tree.policy.ghost_bytes())
    assert most_bytes <= MOST_GHOST_BYTES.get(tree.policy.name, MOST_KEPT * GHOST_BYTES)
    assert most_bytes or tree.policy.name in WITHOUT_GHOSTS


@every_policy
def test_policy_match_and_get_of_one_request_are_one_use(make: Make):
    def victims(told: int) -> list[int]:
        tree = PrefixTree(make())
        rng = random.Random(3)
        left = []
        for access in range(1, 1_500):
            path = [int(rng.expovariate(0.05)) + 1]
            path = [path[0] * 1000 + depth for depth in range(rng.randint(1, 5))]
            found = sum(1 for _ in itertools.takewhile(tree.blocks.__contains__, path))
            for _ in range(told if found else 0):
                tree.policy.touch(tree.blocks[path[found - 1]], found, access)
            for depth in range(found, len(path)):
                parent = tree.blocks.get(path[depth - 1]) if depth else None
                if parent is not None:
                    parent.leases = 1
                while len(tree.blocks) >= 64:
                    victim = tree.policy.next_victim()
                    assert isinstance(victim, FakeBlock)
                    tree.remove(victim, evicted=True)
                    left.append(victim.name)
                if parent is not None:
                    tree.release(parent)
                tree.insert(path[depth], None if parent is None else parent.name, access)
        return left

    assert victims(1) == victims(2)


@every_policy
def test_policy_sizes_scaled_with_the_capacity_give_the_same_victims(make: partial[EvictionPolicy]):
    def victims(slot_bytes: int) -> list[int]:
        tree = PrefixTree(make.func(PolicyContext(64 * slot_bytes, lambda: 0)))
        rng = random.Random(11)
        left = []
        for access in range(1, 2_000):
            name = int(rng.expovariate(0.02))
            block = tree.blocks.get(name)
            if block is not None:
                tree.policy.touch(block, 2, access)
                continue
            while len(tree.blocks) >= 64:
                victim = tree.policy.next_victim()
                assert isinstance(victim, FakeBlock)
                tree.remove(victim, evicted=True)
                left.append(victim.name)
            tree.insert(name, name // 8 - 1 if name >= 8 and name // 8 - 1 in tree.blocks else None, access, slot_bytes)
        return left

    assert victims(4096) == victims(262_144)


@every_policy
def test_policy_hot_block_touched_often_takes_no_more_memory(make: Make):
    tree = PrefixTree(make())
    chain = tree.chain(64, 1)
    others = [tree.insert(name, None, name) for name in range(1000, 1064)]
    policy = tree.policy
    access = 10_000
    for _ in range(2_000):
        access += 1
        policy.touch(chain[-1], 64, access)
    gc.collect()
    tracemalloc.start()
    for index in range(3_000):
        access += 1
        policy.touch(chain[-1 - index % 3], 4, access)
        if not index % 20:
            policy.touch(others[index // 20 % 64], 1, access)
    grown_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown_bytes < 100_000, f"{grown_bytes} bytes more after 3,000 touches of {policy.held()} blocks"


@every_policy
def test_policy_turnover_keeps_no_departed_blocks(make: Make):
    policy = make()
    gc.collect()
    before = sum(type(thing) is FakeBlock for thing in gc.get_objects())
    tree = PrefixTree(policy)
    rng = random.Random(5)
    for turn in range(300):
        # Requests of 30 blocks of which one stays in use: stale entries must not keep the others.
        chain = tree.chain(1, turn + 1, first=turn * 100)
        wide = [tree.insert(turn * 100 + 1 + index, chain[0].name, turn + 1) for index in range(29)]
        policy.touch(rng.choice(wide), 2, turn + 2)
        while policy.held() > 200:
            victim = policy.next_victim()
            assert isinstance(victim, FakeBlock)
            tree.remove(victim)
    del chain, wide, victim
    gc.collect()
    alive = sum(type(thing) is FakeBlock for thing in gc.get_objects()) - before
    assert alive <= 4 * policy.held(), f"{alive} blocks alive of {policy.held()} held"


def _chain_used_in_steps(tree: PrefixTree, length: int, step: int) -> None:
    for name in range(length):
        tree.insert(name, name - 1 if name else None, 1 + name // step)
    assert [victim.name for victim in tree.evict_all()] == list(reversed(range(length)))


def _leaves_under_a_leased_chain(tree: PrefixTree, length: int, step: int) -> None:
    chain = tree.chain(length, 1)
    chain[-1].leases = 1
    for index in range(length):
        leaf = tree.insert(length + index, length - 1, 2 + index // step)
        assert tree.policy.next_victim() is leaf
        tree.remove(leaf)


def _growing_chain_among_others(tree: PrefixTree, length: int, step: int) -> None:
    for index in range(length):
        tree.insert(index, index - 1 if index else None, 1 + 2 * (index // step))
        tree.insert(length + index, None, 2 + 2 * (index // step))
        if index > 2:
            victim = tree.policy.next_victim()
            assert isinstance(victim, FakeBlock)
            tree.remove(victim)


def _lines_run(action: Callable[[], None]) -> int:
    """Lines of Python that run for it: what it costs, whatever else the machine does."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return lines


@every_policy
@pytest.mark.parametrize("step", [1, 3, 10])
@pytest.mark.parametrize(
    "use",
    [_chain_used_in_steps, _leaves_under_a_leased_chain, _growing_chain_among_others],
    ids=lambda use: use.__name__,
)
def test_policy_long_chains_cost_in_proportion_to_their_length(make: Make, use: Callable[..., None], step: int):
    # Eight times the length: linear work takes 8 times as many steps, quadratic work 64 times.
    small, large = (_lines_run(partial(use, PrefixTree(make()), length, step)) for length in (50, 400))
    assert large < 16 * small, f"{large / small:.1f} times as many steps for 8 times the chain"


def test_make_policy_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InvalidArgument, match=r"unknown eviction policy 'mru'; there are: .*lru"):
        make_policy("mru", CONTEXT)
    with pytest.raises(InvalidArgument, match=r"unknown eviction policy 'mru'; there are: .*fifo.*lru"):
        make_simulated("mru", CONTEXT)


def test_make_policy_of_the_simulator_is_refused_for_a_daemon():
    with pytest.raises(InvalidArgument, match=r"eviction policy 'fifo' is for simulations only; there are: .*lru"):
        make_policy("fifo", CONTEXT)


def test_registry_every_policy_of_the_daemon_is_simulated_too():
    assert POLICIES.items() <= SIMULATED.items()
