"""What ``adaptive`` keeps stays consistent: requests mixed with each other, late, cut short, at any time."""

from __future__ import annotations

import random

import pytest
from fakes.prefix_tree import FakeBlock, PrefixTree

from kvstore.policy import adaptive, remembered, shadow
from kvstore.policy.adaptive import Adaptive
from kvstore.policy.base import PolicyContext


def check(tree: PrefixTree, policy: Adaptive) -> None:
    segments = policy._segments
    known = list(segments._by_number.values())
    assert policy.held() == len(tree.blocks) == sum(len(segment.blocks) for segment in known)
    for segment in known:
        for place, block in enumerate(segment.blocks):
            assert segments.holds(block)
            assert block.key == segment.keys[place]
            assert not place or block.parent is segment.blocks[place - 1]
        if segment.parent is not None:
            assert segment.parent.children is not None
            assert segment.parent.children[segment.keys[0]] is segment
        children = (segment.children or {}).values()
        assert segment.ranked_children == sum(child.ranked > 0 for child in children)
        assert max(segment.lru, segment.ranked) <= len(segment.keys)
    assert policy._lru._blocks == sum(segment.lru for segment in known)
    assert policy._ranked._blocks == sum(segment.ranked for segment in known)
    request = policy._request
    at_risk = sum(segment.cell >= 0 for segment in known)
    assert sum(policy._hazards._alive) == at_risk >= len(known) - (len(request.path) if request else 0)
    assert sum(len(segment.keys) for segment in known) == segments.known_keys + (request.fresh if request else 0)


class Traffic:
    """Requests along paths of one tree, several at a time, in a cache of few blocks; with leases and removals."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_ns = 0
        self.policy = Adaptive(PolicyContext(4096 * 64, lambda: self.now_ns))
        self.tree = PrefixTree(self.policy)
        self.capacity = self.rng.choice((10, 40, 100))
        self.access = 0
        self.requests: list[tuple[int, list[int]]] = []

    def step(self) -> None:
        rng = self.rng
        self.now_ns += int(rng.choice((0, 1e6, 1e9, 2e10, 3e11)) * rng.random())
        if rng.random() < 0.55 or not self.requests:
            self.begin()
        access, path = rng.choice(self.requests)
        if rng.random() < 0.3 and (found := self.found(path)):
            self.policy.touch(self.tree.blocks[path[found - 1]], found, access)
        for _ in range(rng.randint(0, 4)):
            self.put(access, path)
        self.disturb()
        self.requests = self.requests[-6:]

    def begin(self) -> None:
        self.access += 1
        name, path = 0, []
        for _ in range(self.rng.randint(1, 8)):
            name = name * 3 + 1 + self.rng.choice((0, 0, 0, 1, 2))
            path.append(name)
        self.requests.append((self.access, path))
        if found := self.found(path):
            self.policy.touch(self.tree.blocks[path[found - 1]], found, self.access)

    def found(self, path: list[int]) -> int:
        return next((place for place, name in enumerate(path) if name not in self.tree.blocks), len(path))

    def put(self, access: int, path: list[int]) -> None:
        place = self.found(path)
        if self.rng.random() < 0.1:
            place = self.rng.randint(place, len(path))
        if place == len(path) or path[place] in self.tree.blocks:
            return
        if len(self.tree.blocks) >= self.capacity:
            victim = self.policy.next_victim(access) or self.policy.next_victim()
            if victim is None:
                return
            assert isinstance(victim, FakeBlock)
            self.tree.remove(victim, evicted=True)
        self.tree.insert(path[place], path[place - 1] if place else None, access)

    def disturb(self) -> None:
        what = self.rng.random()
        blocks = self.tree.blocks
        if not blocks or what > 0.3:
            return
        block = blocks[self.rng.choice(sorted(blocks))]
        leased = [other for other in blocks.values() if other.leases]
        if what < 0.05:
            block.leases += 1
        elif what < 0.1 and leased:
            self.tree.release(self.rng.choice(leased))
        elif what < 0.13 and not block.leases:
            below = sorted(block.descendants(), key=lambda other: other.depth)
            self.tree.remove(block)
            if below:
                self.policy.condemn(below)
        elif what > 0.13:
            victim = self.policy.next_victim()
            evictable = self.tree.evictable()
            assert (victim is None) == (not evictable)
            if victim is not None:
                assert victim in evictable
                assert isinstance(victim, FakeBlock)
                self.tree.remove(victim, evicted=True)


@pytest.mark.parametrize("first_seed", range(0, 40, 10))
def test_adaptive_state_is_consistent(first_seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adaptive, "_REFIT_AFTER", 3)
    monkeypatch.setattr(adaptive, "_REFIT_AFTER_AT_MOST", 5)
    monkeypatch.setattr(remembered, "GHOSTS_AT_LEAST", 30)
    monkeypatch.setattr(remembered, "GHOSTS_PER_BLOCK", 1)
    monkeypatch.setattr(remembered, "SEGMENTS_AT_LEAST", 10)
    for seed in range(first_seed, first_seed + 10):
        choice = random.Random(seed)

        def now_and_then(contest: shadow.Contest, *hits: int, choice: random.Random = choice) -> None:
            contest.ranked ^= choice.random() < 0.05

        monkeypatch.setattr(shadow.Contest, "note", now_and_then)
        traffic = Traffic(seed)
        for _ in range(250):
            traffic.step()
            check(traffic.tree, traffic.policy)


def test_adaptive_block_whose_last_child_leaves_while_the_segment_is_in_use_may_leave():
    policy = Adaptive(PolicyContext(4096 * 64, lambda: 0))
    policy._contest.ranked = True
    tree = PrefixTree(policy)
    tree.chain(2, 1)
    tree.insert(2, 1, 2)
    tree.insert(3, 1, 3)
    tree.remove(tree.blocks[3], evicted=True)
    policy.touch(tree.blocks[0], 1, 4)
    tree.remove(tree.blocks[2], evicted=True)
    # Here the segment of blocks 0 and 1 is cut.
    tree.insert(9, 0, 4)
    assert {victim.name for victim in tree.evict_all()} == {0, 1, 9}
