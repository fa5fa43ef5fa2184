from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from fakes.prefix_tree import FakeBlock, PrefixTree
from fakes.workloads import WORKLOADS

from kvstore.policy import hazards, remembered, shadow
from kvstore.policy.adaptive import Adaptive
from kvstore.policy.base import EvictionPolicy, PolicyContext, following
from kvstore.policy.lru import Lru
from kvstore.policy.segments import KEY_BYTES, SEGMENT_BYTES
from kvstore.simulator.arrivals import Arrival, Outcome
from kvstore.simulator.block import TraceClock
from kvstore.simulator.prefix import PrefixCache, simulate

NS = 1_000_000_000


def arrivals(workload: str, requests: int, seed: int = 1) -> list[Arrival]:
    return [Arrival(int(at_s * NS), path) for at_s, path in WORKLOADS[workload](seed, requests)]


def rate(outcome: Outcome) -> float:
    return outcome.hit_rate


class Cache:
    """A policy and the cache it works for, request by request."""

    def __init__(self, capacity_blocks: int) -> None:
        self.clock = TraceClock()
        self.policy = Adaptive(PolicyContext(capacity_blocks, self.clock))
        self.cache = PrefixCache(self.policy, capacity_blocks)
        self.access = 0

    def request(self, arrival: Arrival) -> int:
        self.access += 1
        self.clock.now_ns = arrival.time_ns
        return self.cache.request(arrival.ids, self.access)


def test_adaptive_without_a_lead_is_lru_to_the_last_hit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shadow, "_LEAD", 2.0)
    for workload in ("chat", "branches"):
        stream = arrivals(workload, 1500)
        for capacity in (40, 300, 1500):
            assert simulate(stream, "adaptive", capacity).hits == simulate(stream, "lru", capacity).hits


def leads(contest: shadow.Contest, mean: float, requests: int, draw: random.Random, spread: float = 10.0) -> list[bool]:
    """Which order is followed after each of some requests for 20 blocks, where the one by index hits more or less."""
    followed = []
    for _ in range(requests):
        difference = round(draw.gauss(mean, spread))
        contest.note(max(0, -difference), max(0, difference), 20, 2000)
        followed.append(contest.ranked)
    return followed


@pytest.mark.parametrize("seed", range(5))
def test_contest_leaves_an_order_whose_load_is_over_soon(seed: int):
    """However long and however much it won before: what another load was worth says nothing of this one."""
    draw = random.Random(seed)
    for won in (500, 5000):
        contest = shadow.Contest()
        assert leads(contest, 4.0, won, draw)[-1]
        followed = leads(contest, -3.0, 400, draw)
        assert followed.index(False) < 150
        assert not any(followed[150:])
        assert leads(contest, 4.0, 800, draw)[-1]


@pytest.mark.parametrize("seed", range(5))
def test_contest_keeps_to_an_order_through_losses_that_are_chance(seed: int):
    draw = random.Random(seed)
    contest = shadow.Contest()
    leads(contest, 2.0, 1000, draw)
    assert all(leads(contest, 2.0, 5000, draw))


def test_contest_follows_nothing_on_little_evidence():
    contest = shadow.Contest()
    followed = leads(contest, 5.0, 100, random.Random(1), spread=0.0)
    assert followed.index(True) * 20 >= 900


@pytest.mark.parametrize("workload", ["chat", "reversals"])
def test_adaptive_shadows_hit_what_the_policies_hit(workload: str, monkeypatch: pytest.MonkeyPatch):
    """From the first eviction on, as the capacity is not known before."""
    noted: list[tuple[int, int]] = []

    def note(self: shadow.Contest, lru_hits: int, ranked_hits: int, asked: int, capacity_blocks: int) -> None:
        noted.append((lru_hits, ranked_hits))
        self.ranked = True

    monkeypatch.setattr(shadow.Contest, "note", note)
    stream = arrivals(workload, 2000)
    # A request of none of these blocks finishes the last one.
    flush = Arrival(stream[-1].time_ns, (-1,))
    real = simulate([*stream, flush], "adaptive", 400).hits
    lru = simulate([*stream, flush], "lru", 400).hits
    tail = 1500
    assert sum(lru_hits for lru_hits, _ in noted[-tail - 1 : -1]) == sum(lru[-tail - 1 : -1])
    ranked = sum(ranked_hits for _, ranked_hits in noted[-tail - 1 : -1])
    # It followed LRU for a while at first.
    assert ranked == pytest.approx(sum(real[-tail - 1 : -1]), rel=0.01)


def test_adaptive_finds_who_returns():
    stream = arrivals("reversals", 3000)
    lru, own = simulate(stream, "lru", 600), simulate(stream, "adaptive", 600)
    assert rate(own) > rate(lru) + 0.05


ROBUST = {
    "chat": (400, 3000),
    "chat_fast": (300,),
    "agents": (300,),
    "documents": (500,),
    "scans": (1500,),
    "circles": (1200,),
    "shifts": (800,),
    "branches": (500,),
    "untimed": (400,),
}


@pytest.mark.parametrize(("workload", "capacity"), [(name, size) for name, sizes in ROBUST.items() for size in sizes])
def test_adaptive_is_not_below_lru(workload: str, capacity: int):
    stream = arrivals(workload, 2000, seed=2)
    lru, own = simulate(stream, "lru", capacity), simulate(stream, "adaptive", capacity)
    assert rate(own) >= rate(lru) - 0.005
    assert own.hit_rate_second_half >= lru.hit_rate_second_half - 0.01


def test_adaptive_falls_back_where_its_order_loses(monkeypatch: pytest.MonkeyPatch):
    """An order by index turned upside down must be noticed, and not followed."""
    stream = arrivals("chat_fast", 3000)
    lru = simulate(stream, "lru", 500)
    cache = Cache(500)
    table = cache.policy._hazards
    monkeypatch.setattr(table, "refit", lambda now_s: None)
    table.index = [-score for score in table.index]
    hits = []
    for number, arrival in enumerate(stream):
        if number == 500:
            cache.policy._contest.ranked = True
            assert following(cache.policy) == "learned"
        hits.append(cache.request(arrival))
    assert not cache.policy.ranked
    assert following(cache.policy) == "lru"
    assert sum(hits) > 0.97 * sum(lru.hits)


def test_adaptive_ghosts_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "GHOSTS_AT_LEAST", 1000)
    monkeypatch.setattr(remembered, "GHOSTS_PER_BLOCK", 2)
    cache = Cache(800)
    rng = random.Random(3)
    largest = 0
    for number in range(4000):
        path = tuple(range(number * 100, number * 100 + rng.randint(1, 30)))
        cache.request(Arrival(number * NS // 10, path))
        if number > 200:
            largest = max(largest, cache.policy._remembered.keys(cache.policy.held()))
    assert 1000 < largest <= 1600 + 60
    segments = cache.policy._segments
    bound = (1600 + 60) * (KEY_BYTES + SEGMENT_BYTES)
    assert 0 < cache.policy.ghost_bytes() < bound
    assert len(segments) <= cache.policy._remembered.keys(cache.policy.held()) + cache.policy.held()
    # The last request is not finished.
    assert len(cache.policy._remembered) + 1 == len(segments)


def test_adaptive_ghosts_of_one_block_each_are_bounded_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "SEGMENTS_AT_LEAST", 300)
    cache = Cache(50)
    for number in range(2000):
        cache.request(Arrival(number * NS // 10, (number,)))
    assert 250 < len(cache.policy._remembered) <= 300 + 50 + 2


def test_adaptive_ghosts_are_forgotten_with_age():
    cache = Cache(20)
    for number in range(50):
        cache.request(Arrival(number * NS, tuple(range(number * 100, number * 100 + 10))))
    assert cache.policy._remembered.keys(cache.policy.held()) == 470
    for number in range(50):
        cache.request(Arrival((10_000 + number) * NS, (5,)))
    assert cache.policy._remembered.keys(cache.policy.held()) < 20


def test_adaptive_tree_without_requests_is_forgotten_whole():
    tree = PrefixTree(Adaptive(PolicyContext(4096 * 64, lambda: 0)))
    for first in range(0, 400, 40):
        tree.chain(30, 1 + first, first=first)
    assert len(tree.evict_all()) == 300
    policy = tree.policy
    assert isinstance(policy, Adaptive)
    assert policy.held() == 0
    assert policy._remembered.keys(0) == 300
    assert len(policy._orders.recency) == 0


def test_adaptive_ghosts_that_return_count(monkeypatch: pytest.MonkeyPatch):
    """A session that always comes back after its blocks left is known to return."""
    monkeypatch.setattr(hazards, "_HALF_LIFE_S", 1e12)
    cache = Cache(60)
    sessions = [tuple(range(number * 1000, number * 1000 + 20)) for number in range(10)]
    for turn in range(30):
        for number, path in enumerate(sessions):
            assert cache.request(Arrival((turn * 100 + number * 10) * NS, path)) == 0 or cache.policy.ranked
    _, returns, _ = cache.policy._hazards.exposure(3000.0)
    assert returns.sum() == pytest.approx(29 * 10 - 1, abs=2)


def used_tree(policy: EvictionPolicy) -> PrefixTree:
    rng = random.Random(4)
    tree = PrefixTree(policy)
    for number in range(120):
        parent = rng.choice(sorted(tree.blocks)) if tree.blocks and rng.random() < 0.8 else None
        tree.chain(rng.randint(1, 6), number + 1, first=number * 10, parent=parent)
        if rng.random() < 0.3:
            policy.touch(tree.blocks[rng.choice(sorted(tree.blocks))], 1, number + 1)
    return tree


def test_adaptive_takes_over_blocks_of_another_policy():
    """As the daemon switches: plain inserts in order of use, into a tree that is all there."""
    lru = Lru()
    tree = used_tree(lru)
    order = sorted(tree.blocks.values(), key=lambda block: (lru.used(block), -block.depth))
    used = [(block, lru.used(block)) for block in order]
    for block in order:
        lru.discard(block)
    tree.policy = Adaptive(PolicyContext(4096 * 64, lambda: 0))
    for block, access in used:
        tree.policy.insert(block, access)
    assert tree.policy.held() == len(tree.blocks)
    assert len(tree.policy._segments) < len(tree.blocks) * 0.6
    again = used_tree(Lru())
    last_used = {}
    while (victim := again.policy.next_victim()) is not None:
        assert isinstance(victim, FakeBlock)
        last_used[victim.name] = again.policy.used(victim)
        again.remove(victim, evicted=True)
    # Blocks of one request in another order: two of its paths.
    assert [last_used[victim.name] for victim in tree.evict_all()] == list(last_used.values())


SCRIPT = """
from fakes.workloads import WORKLOADS
from kvstore.simulator.arrivals import Arrival
from kvstore.simulator.block import SimulatedBlock
from kvstore.simulator.prefix import simulate
stream = [Arrival(int(at_s * 1e9), path) for at_s, path in WORKLOADS["branches"](3, 800)]
print(hash("x"), hash(tuple(simulate(stream, "adaptive", 200).hits)))
"""


def test_adaptive_does_not_depend_on_hashes():
    seen = []
    for seed in ("1", "2"):
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        seen.append(done.stdout.split())
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] == seen[1][1]
