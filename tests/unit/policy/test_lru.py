"""LRU against a plain, slow model of what its docstring says."""

from __future__ import annotations

import random

import pytest
from fakes.prefix_tree import FakeBlock, PrefixTree
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvstore.policy.lru import Lru

NAMES = st.integers(0, 30)


class LruModel:
    """Every block's number in a dict; the victim is found by looking at all of them."""

    def __init__(self) -> None:
        self.numbers: dict[FakeBlock, int] = {}

    def use(self, block: FakeBlock, access: int) -> None:
        self.numbers[block] = max(self.numbers.get(block, 0), access)

    def leave(self, block: FakeBlock) -> None:
        number = self.numbers.pop(block)
        if block.parent is not None:
            self.use(block.parent, number)

    def victims(self, tree: PrefixTree) -> list[FakeBlock]:
        """Those that may be chosen: equal in age and depth."""

        def rank(block: FakeBlock) -> tuple[int, int]:
            return self.numbers[block], -block.depth

        leaves = tree.evictable()
        first = min(map(rank, leaves), default=None)
        return [block for block in leaves if rank(block) == first]


class LruAgainstModel(RuleBasedStateMachine):
    """Any order of puts, uses, leases, removals and evictions gives the model's victims exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree(Lru())
        self.model = LruModel()
        self.access = 0

    def _access(self, back: int) -> int:
        if back and self.access > back:
            return self.access - back
        self.access += 1
        return self.access

    def _pick(self, name: int) -> FakeBlock | None:
        blocks = list(self.tree.blocks.values())
        return blocks[name % len(blocks)] if blocks else None

    @rule(first=NAMES, length=st.integers(1, 5), parent=st.none() | NAMES, back=st.integers(0, 4), order=st.booleans())
    def put(self, first: int, length: int, parent: int | None, back: int, order: bool) -> None:
        """A chain, in order or in reverse, as far as it is not there."""
        access = self._access(back)
        links = [(name, name - 1 if name > first else parent) for name in range(first, first + length)]
        if parent is not None and parent >= first:
            links[0] = (first, None)
        for name, above in links if order else links[::-1]:
            if name not in self.tree.blocks:
                self.model.use(self.tree.insert(name, above, access), access)

    @rule(name=NAMES, back=st.integers(0, 4))
    def touch(self, name: int, back: int) -> None:
        if block := self._pick(name):
            access = self._access(back)
            self.tree.policy.touch(block, 1 + len(list(block.ancestors())), access)
            self.model.use(block, access)

    @rule(name=NAMES)
    def lease(self, name: int) -> None:
        if block := self._pick(name):
            block.leases += 1

    @rule(name=NAMES)
    def release(self, name: int) -> None:
        leased = [block for block in self.tree.blocks.values() if block.leases]
        if leased:
            self.tree.release(leased[name % len(leased)])

    @rule(name=NAMES, condemn=st.booleans())
    def remove(self, name: int, condemn: bool) -> None:
        if block := self._pick(name):
            below = list(block.descendants())
            self.model.leave(block)
            self.tree.remove(block)
            if condemn:
                self.tree.policy.condemn(below)
                self.model.numbers.update(dict.fromkeys(below, 0))

    @precondition(lambda self: self.tree.blocks)
    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        for _ in range(count):
            victim = self.tree.policy.next_victim()
            expected = self.model.victims(self.tree)
            if victim is None:
                assert not expected
                return
            assert isinstance(victim, FakeBlock)
            assert any(victim is block for block in expected), f"{victim} leaves, expected were {expected}"
            self.model.leave(victim)
            self.tree.remove(victim)

    def teardown(self) -> None:
        for block in self.tree.blocks.values():
            while block.leases:
                self.tree.release(block)
        self.evict(count=1 << 30)
        assert not self.tree.blocks


LruAgainstModel.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestLruAgainstModel = LruAgainstModel.TestCase


@pytest.mark.parametrize("seed", range(20))
def test_lru_evictions_alone_equal_touching_every_ancestor(seed: int):
    """One touch of the deepest block gives the victims of an order in which every ancestor is touched too."""
    rng = random.Random(seed)
    tree = PrefixTree(Lru())
    newest: dict[FakeBlock, int] = {}
    name = 0
    for access in range(1, 400):
        blocks = list(tree.blocks.values())
        deepest = rng.choice(blocks) if blocks and rng.random() < 0.8 else None
        if deepest is not None:
            tree.policy.touch(deepest, 1, access)
        for _ in range(rng.choice([0, 1, 1, 3])):
            deepest = tree.insert(name, None if deepest is None else deepest.name, access)
            name += 1
        if deepest is not None:
            newest.update(dict.fromkeys([deepest, *deepest.ancestors()], access))
        while len(tree.blocks) > 25:
            victim = tree.policy.next_victim()
            assert isinstance(victim, FakeBlock)
            ranks = {block: (newest[block], -block.depth) for block in tree.evictable()}
            assert ranks[victim] == min(ranks.values())
            tree.remove(victim)


def test_lru_same_request_branches_leave_deepest_first():
    tree = PrefixTree(Lru())
    tree.chain(4, 1)
    tree.insert(10, 1, 1)
    tree.insert(20, None, 1)
    depths = [victim.depth for victim in tree.evict_all()]
    assert depths == sorted(depths, reverse=True)


def test_lru_block_that_became_deeper_after_it_was_put_leaves_before_shallower_ones():
    tree = PrefixTree(Lru())
    tree.insert(2, 1, 1)
    tree.insert(50, 49, 1)
    assert tree.policy.next_victim() is not None
    tree.insert(1, 0, 2)
    tree.insert(0, None, 2)
    assert [victim.name for victim in tree.evict_all()] == [2, 50, 1, 0]


def test_lru_old_request_id_used_again_does_not_make_a_block_younger():
    tree = PrefixTree(Lru())
    old = tree.insert(1, None, 5)
    tree.policy.touch(old, 1, 3)
    new = tree.insert(2, None, 4)
    assert tree.evict_all() == [new, old]


def test_lru_use_of_a_departed_child_counts_for_its_parent():
    tree = PrefixTree(Lru())
    parent = tree.insert(1, None, 1)
    child = tree.insert(2, 1, 1)
    other = tree.insert(3, None, 2)
    tree.policy.touch(child, 2, 3)
    tree.remove(child)
    assert tree.evict_all() == [other, parent]


def test_lru_release_of_a_lease_keeps_the_age_of_the_block():
    tree = PrefixTree(Lru())
    old, new = tree.insert(1, None, 1), tree.insert(2, None, 2)
    old.leases = 1
    assert tree.policy.next_victim() is new
    tree.release(old)
    assert tree.evict_all() == [old, new]
