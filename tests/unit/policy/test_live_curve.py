from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fakes.chains import SLOT_BYTES, Chains, Link, Space, ask, chat_load, lru_hit_rate

from kvstore.policy.curve import LiveCurve
from kvstore.policy.stack_distance import StackDistances, StackEntry

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.5, 5.6, 8.0)
Load = Sequence[tuple[float, Sequence[int]]]


def seeded(seed: int) -> Callable[[bytes], int]:
    """A hash that is the same in each run."""
    salt = random.Random(seed).getrandbits(64)
    return lambda key: int.from_bytes(key[:8]) ^ salt


def watched(
    load: Load, capacity_blocks: int, *, seed: int = 1, told: int | None = None, sampled: int = 8192
) -> LiveCurve:
    now_ns = 0
    curve = LiveCurve(
        capacity_blocks * SLOT_BYTES,
        lambda: now_ns,
        sampled_blocks=sampled,
        key_hash=seeded(seed),
        half_life_s=1e9,
    )
    chains = Chains()
    for access, (at_s, ids) in enumerate(load, 1):
        now_ns = int(at_s * 1e9)
        ask(curve, chains, ids, access, told)
    return curve


def mean_error(curve: LiveCurve, load: Load, capacity_blocks: int) -> float:
    """Mean absolute error against the exact simulation, in points."""
    wanted = [int(factor * capacity_blocks) for factor in FACTORS]
    exact = [lru_hit_rate(load, blocks) for blocks in wanted]
    found = curve.hit_rates([blocks * SLOT_BYTES for blocks in wanted])
    return 100 * sum(abs(one - other) for one, other in zip(found, exact, strict=True)) / len(wanted)


@pytest.fixture(scope="module")
def load() -> Load:
    return list(chat_load(4500, seed=7))


def test_curve_of_a_sample_that_holds_everything_is_exact_but_for_bins(load: Load) -> None:
    curve = watched(load[:600], 400)
    assert curve.sampling_rate == 1.0
    assert mean_error(curve, load[:600], 400) < 0.2


@pytest.mark.parametrize("seed", [1, 2])
def test_curve_of_a_tenth_of_the_blocks_is_within_a_point_of_the_exact_one(load: Load, seed: int) -> None:
    # Of 4,000 blocks eight times that are of interest, a tenth of which is to be kept.
    curve = watched(load, 4000, seed=seed, sampled=3200)
    assert 0.05 <= curve.sampling_rate <= 0.2
    assert curve.sampled_blocks <= 3200
    assert curve.hot_blocks == 32
    assert mean_error(curve, load, 4000) <= 1.0


def test_curve_learns_from_puts_what_a_match_does_not_name(load: Load) -> None:
    told, named = watched(load[:2000], 1000), watched(load[:2000], 1000, told=1)
    capacities = [int(factor * 1000) * SLOT_BYTES for factor in FACTORS]
    assert named.hit_rates(capacities) == pytest.approx(told.hit_rates(capacities), abs=0.01)
    assert named.accesses == pytest.approx(told.accesses, rel=0.01)


def test_curve_counts_a_request_once_whatever_carries_it(load: Load) -> None:
    now_ns = 0
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: now_ns, key_hash=seeded(1))
    chains = Chains()
    links = chains.links([1, 2, 3, 4])
    for access in (1, 2):
        curve.accessed(1, access, [(links[-1], 4)], 4, [])
        for link in links:
            curve.accessed(1, access, [(link, 1)], 1, [])
            curve.stored(link, access, promoted=False)
    assert curve.accesses == pytest.approx(8)
    assert curve.hit_rates([1000 * SLOT_BYTES]) == [pytest.approx(0.5)]


def test_curve_knows_that_promotions_are_nobodys_access() -> None:
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: 0, key_hash=seeded(1))
    for link in Chains().links([1, 2, 3]):
        curve.stored(link, 1, promoted=True)
    assert curve.accesses == 0
    assert curve.sampled_blocks == 0


def test_curve_of_blocks_that_were_removed_does_not_count_them_as_near() -> None:
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: 0, key_hash=seeded(1))
    links = Chains().links([1, 2])
    curve.accessed(1, 1, [(links[1], 2)], 2, [])
    curve.left(links[0], "evicted")
    curve.left(links[1], "removed")
    curve.accessed(1, 2, [(links[1], 2)], 2, [])
    assert curve.hit_rates([1000 * SLOT_BYTES]) == [pytest.approx(1 / 4)]


def test_curve_tells_equal_keys_of_two_namespaces_apart() -> None:
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: 0, key_hash=seeded(1))
    link = Link(b"k" * 32, 0, None)
    other = Link(b"k" * 32, 0, None, namespace=Space(2))
    curve.accessed(1, 1, [(link, 1)], 1, [])
    curve.accessed(2, 2, [(other, 1)], 1, [])
    assert curve.hit_rates([1000 * SLOT_BYTES]) == [0.0]


def test_curve_weighs_blocks_by_their_bytes() -> None:
    curve = LiveCurve(100 * SLOT_BYTES, lambda: 0, key_hash=seeded(1))
    small, large = Link(b"s" * 32, 0, None), Link(b"l" * 32, 0, None, 20 * SLOT_BYTES)
    for access, link in enumerate((small, large) * 50, 1):
        curve.accessed(1, access, [(link, 1)], 1, [])
    rates = curve.hit_rates([10 * SLOT_BYTES, 40 * SLOT_BYTES])
    assert rates == [0.0, pytest.approx(0.98)]


def test_curve_forgets_the_load_of_hours_ago() -> None:
    now_ns = 0
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: now_ns, key_hash=seeded(1), half_life_s=3600)
    link = Link(b"k" * 32, 0, None)
    for access in range(1, 101):
        curve.accessed(1, access, [(link, 1)], 1, [])
    assert curve.hit_rates([1000 * SLOT_BYTES])[0] > 0.98
    # So long that weights have to be scaled down on the way.
    for access in range(101, 201):
        now_ns += 3600 * 10**9
        curve.accessed(1, access, [], 1, [access.to_bytes(32)])
    assert curve.hit_rates([1000 * SLOT_BYTES])[0] < 0.001
    assert curve.accesses == pytest.approx(2.0)


def test_curve_cools_blocks_that_are_asked_for_no_more() -> None:
    now_ns = 0
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: now_ns, sampled_blocks=512, key_hash=seeded(1), half_life_s=600)
    chains = Chains()
    for access in range(1, 3001):
        now_ns += 5 * 10**9
        ids = [1, 1000 + access] if access <= 1000 else [2, 1000 + access]
        ask(curve, chains, ids, access)
        if access == 1000:
            assert (curve.hot_blocks, curve.hot_bytes) == (1, SLOT_BYTES)
        if access == 1500:
            assert (curve.hot_blocks, curve.hot_bytes) == (2, 2 * SLOT_BYTES)
    assert (curve.hot_blocks, curve.hot_bytes) == (1, SLOT_BYTES)
    assert curve.hit_rates([8 * SLOT_BYTES])[0] == pytest.approx(0.5, abs=0.1)


def test_curve_takes_less_of_a_load_that_is_too_fast() -> None:
    now_ns = 0
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: now_ns, key_hash=seeded(1))
    chains = Chains()
    for access in range(1, 5001):
        now_ns += 100_000
        ask(curve, chains, [10 * access + one for one in range(8)], access)
    assert 700 <= curve.sampled_blocks <= 1500


def test_curve_stays_within_the_memory_it_states() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        now_ns = 0
        curve = LiveCurve(10**6 * SLOT_BYTES, lambda: now_ns, key_hash=seeded(1), sampled_blocks=2048)
        for access in range(1, 3001):
            now_ns += 10**8
            curve.accessed(1, access, [], 24, [(access << 20 | one).to_bytes(32) for one in range(16)])
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used <= curve.memory_bytes
    assert curve.sampled_blocks <= 2048


def test_curve_knows_how_long_unused_blocks_stay() -> None:
    now_ns = 0
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: now_ns, key_hash=lambda key: key[0])
    # Of those that are evicted one in four is looked at.
    links = [Link(number.to_bytes(32, "little"), 0, None) for number in (0, 0)]
    assert curve.residence_s is None
    curve.accessed(1, 1, [(links[1], 1)], 1, [])
    now_ns = 20 * 10**9
    curve.left(links[1], "evicted")
    assert curve.residence_s == 20.0
    curve.stored(links[1], 1, promoted=True)
    now_ns = 25 * 10**9
    for _ in range(200):
        curve.left(links[1], "evicted")
    assert curve.residence_s == pytest.approx(5.0, abs=0.1)


def test_curve_of_nothing_is_nothing() -> None:
    curve = LiveCurve(1000 * SLOT_BYTES, lambda: 0)
    assert curve.hit_rates([0, 1, 1 << 60]) == [0.0, 0.0, 0.0]
    assert (curve.accesses, curve.hot_share) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_curve_of_the_conversation_trace_is_within_a_point_of_the_exact_one(seed: int) -> None:
    path = os.environ.get("KVSTORE_TRACE")
    if not path:
        pytest.skip("KVSTORE_TRACE names no trace")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    load = [(row["timestamp"] / 1000, row["hash_ids"][: row["input_length"] // 512]) for row in rows]
    load = [one for one in load if one[1]]
    curve = watched(load, 10_000, seed=seed, told=16)
    assert 0.08 <= curve.sampling_rate <= 0.12
    assert mean_error(curve, load, 10_000) <= 1.0


@pytest.mark.parametrize("seed", [1, 2])
def test_stack_distances_equal_a_plain_lists(seed: int) -> None:
    rng = random.Random(seed)
    stack: StackDistances[int] = StackDistances(40)
    entries: dict[int, StackEntry[int]] = {}
    order: list[int] = []
    for _ in range(3000):
        number = rng.randrange(60)
        entry = entries.get(number)
        if entry is None:
            if len(entries) == 40:
                lowest = stack.lowest()
                assert lowest is not None
                assert lowest.ident == order[0]
                stack.remove(lowest)
                del entries[order.pop(0)]
            entry = entries[number] = StackEntry(number, 0, rng.randrange(1, 9), 0)
        else:
            above = order[order.index(number) + 1 :]
            assert stack.bytes_above(entry) == sum(entries[one].slot_bytes for one in above)
            order.remove(number)
            if rng.random() < 0.2:
                stack.resize(entry, rng.randrange(1, 9))
        order.append(number)
        stack.push(entry)
        assert [one.ident for one in stack] == order
        assert len(stack) == len(order)
        assert stack.total_bytes == sum(one.slot_bytes for one in entries.values())
