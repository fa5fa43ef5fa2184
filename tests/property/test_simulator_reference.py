"""The simulator against what is known: plain models, another simulator, and published hit rates of a real trace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from doc_tables import tables
from synthetic_trace import lru_hits, synthetic_requests

from kvstore.errors import InvalidArgument
from kvstore.policy.registry import SIMULATED
from kvstore.simulator.arrivals import Arrival, full_block_arrivals
from kvstore.simulator.clairvoyant import simulate_clairvoyant
from kvstore.simulator.prefix import simulate
from kvstore.simulator.trace import read_trace

TRACE = os.environ.get("KVSTORE_TRACE", "")
needs_trace = pytest.mark.skipif(
    not TRACE, reason="KVSTORE_TRACE does not name a trace (Mooncake's conversation_trace.jsonl)"
)
CAPACITIES = (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


@cache
def conversation() -> list[Arrival]:
    return full_block_arrivals(read_trace(Path(TRACE)))


def clairvoyant_hits(paths: Sequence[tuple[int, ...]], capacity_blocks: int) -> list[int]:
    """Belady with bypass as it is defined, looking ahead at every step."""
    resident: dict[int, int] = {}
    hits = []
    for now, path in enumerate(paths):
        hits.append(sum(1 for _ in takewhile(resident.__contains__, path)))
        resident.update((block, depth) for depth, block in enumerate(path))
        ahead = paths[now + 1 :]
        next_use = {block: next((n for n, later in enumerate(ahead) if block in later), -1) for block in resident}
        for block in [block for block, use in next_use.items() if use < 0]:
            del resident[block]
        while len(resident) > capacity_blocks:
            del resident[max(resident, key=lambda block: (next_use[block], resident[block]))]
    return hits


@pytest.mark.parametrize("capacity_blocks", [1, 7, 60, 200, 100_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_simulate_lru_hits_are_those_of_a_plain_model(seed: int, capacity_blocks: int):
    requests = synthetic_requests(300, seed=seed)
    outcome = simulate(full_block_arrivals(requests), "lru", capacity_blocks)
    assert outcome.hits == lru_hits(requests, capacity_blocks)
    assert outcome.asked == [len(request.full_blocks) for request in requests]


@pytest.mark.parametrize("capacity_blocks", [1, 7, 60, 100_000])
def test_simulate_clairvoyant_hits_are_those_of_looking_ahead(capacity_blocks: int):
    requests = synthetic_requests(150, seed=3)
    outcome = simulate_clairvoyant(full_block_arrivals(requests), capacity_blocks)
    assert outcome.hits == clairvoyant_hits([request.full_blocks for request in requests], capacity_blocks)


@pytest.mark.parametrize("policy", SIMULATED)
def test_simulate_no_policy_hits_more_than_the_clairvoyant_bound(policy: str):
    arrivals = full_block_arrivals(synthetic_requests(400, seed=4))
    everything = simulate_clairvoyant(arrivals, 100_000).hit_rate
    for capacity_blocks in (5, 40, 150):
        assert simulate(arrivals, policy, capacity_blocks).hit_rate <= (
            simulate_clairvoyant(arrivals, capacity_blocks).hit_rate
        )
    assert simulate(arrivals, policy, 100_000).hit_rate == everything


def test_simulate_progress_tells_how_many_requests_are_done():
    told: list[int] = []
    simulate(full_block_arrivals(synthetic_requests(600)), "lru", 50, progress=told.append)
    assert told == [256, 512, 600]


def test_simulate_without_capacity_or_policy_is_refused():
    with pytest.raises(InvalidArgument, match="capacity_blocks must be at least 1, got 0"):
        simulate([], "lru", 0)
    with pytest.raises(InvalidArgument, match="capacity_blocks must be at least 1, got 0"):
        simulate_clairvoyant([], 0)
    with pytest.raises(InvalidArgument, match="unknown eviction policy 'mru'"):
        simulate([], "mru", 10)


@needs_trace
@pytest.mark.parametrize(("capacity_blocks", "expected"), [(1000, 2266), (2000, 2673), (5000, 6765)])
def test_simulate_lru_on_the_beginning_of_the_conversation_trace_has_the_known_hits(
    capacity_blocks: int, expected: int
):
    assert sum(simulate(conversation()[:2000], "lru", capacity_blocks).hits) == expected


REFERENCE = {
    "opt": (19.88, 26.59, 35.57, 38.19, 38.19, 38.19, 38.19),
    "lru": (4.70, 5.77, 12.37, 22.43, 30.63, 37.15, 37.95),
    "clock": (4.71, 5.85, 12.44, 23.01, 30.92, 37.04, 37.92),
    "sieve": (5.02, 6.40, 9.70, 13.76, 22.00, 36.05, 37.92),
    "s3fifo": (5.84, 8.08, 14.72, 20.67, 26.67, 36.69, 37.82),
    "arc": (5.56, 7.56, 12.56, 23.52, 30.51, 36.09, 37.92),
    "lfu": (5.02, 6.40, 9.70, 13.76, 22.00, 36.05, 37.92),
    "lfu-kept": (8.45, 10.64, 14.85, 19.63, 26.09, 36.03, 37.92),
    "lrfu-300": (8.91, 11.85, 18.18, 23.93, 31.78, 37.16, 37.95),
    "w-tinylfu": (6.91, 9.72, 14.47, 18.04, 21.94, 27.81, 32.27),
    "gdsf": (4.72, 6.04, 12.97, 23.22, 31.09, 37.04, 37.92),
    "gdsf-kept": (5.73, 7.84, 14.70, 24.52, 31.49, 37.09, 37.92),
    "length-aware": (5.27, 6.18, 8.55, 12.19, 17.87, 27.91, 35.39),
}
"""Percent of the blocks asked for, by capacity. All but the first two are of blocks that leave in any order, parents
before their children too; ours leave tail first."""
EXACT = ("opt", "lru")
POINTS = 0.4


SYNTHETIC_HITS = {
    "opt": (5687, 6456, 6456),
    "lru": (4196, 6303, 6456),
    "clock": (4210, 6235, 6447),
    "sieve": (4008, 5682, 6135),
    "s3fifo": (3832, 4972, 5568),
    "arc": (4179, 6176, 6374),
    "fifo": (4185, 6319, 6456),
    "lfu": (3416, 3783, 4431),
    "lfu-kept": (3166, 3680, 4612),
    "lrfu-300": (3223, 4113, 5314),
    "gdsf": (4293, 6065, 6425),
    "gdsf-kept": (4185, 6030, 6428),
    "w-tinylfu": (3252, 3587, 3795),
    "length-aware": (3393, 3732, 4386),
}
"""Blocks hit of the synthetic requests below at 50, 200 and 500 blocks, noted when the conversation trace had the hit
rates in docs/eviction.md."""


@pytest.mark.parametrize("policy", SYNTHETIC_HITS)
def test_simulate_synthetic_requests_hit_as_when_the_conversation_trace_was_measured(policy: str):
    arrivals = full_block_arrivals(synthetic_requests(1000, seed=9))
    for capacity_blocks, hits in zip((50, 200, 500), SYNTHETIC_HITS[policy], strict=True):
        if policy == "opt":
            outcome = simulate_clairvoyant(arrivals, capacity_blocks)
        else:
            outcome = simulate(arrivals, policy, capacity_blocks)
        assert sum(outcome.hits) == hits


@cache
def documented() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The two tables of docs/eviction.md: of the whole trace, and of its second half."""
    whole, second_half = (table for table in tables("eviction.md") if table.heading == "Measured")
    assert [int(column.replace(",", "")) for column in whole.columns[1:]] == list(CAPACITIES)
    assert whole.columns == second_half.columns
    by_policy = [
        {row["capacity"].strip("`*"): tuple(row[column] for column in table.columns[1:]) for row in table.rows}
        for table in (whole, second_half)
    ]
    return by_policy[0], by_policy[1]


def test_eviction_doc_has_all_policies_near_the_reference():
    whole, second_half = documented()
    assert whole.keys() == second_half.keys()
    assert whole.keys() - {"adaptive"} == {*SIMULATED, "opt"} - {"adaptive"}
    for policy, expected in REFERENCE.items():
        for percent, reference in zip(whole[policy], expected, strict=True):
            if policy in EXACT:
                assert percent == f"{reference:.2f}"
            else:
                assert float(percent) == pytest.approx(reference, abs=POINTS)


@needs_trace
@pytest.mark.slow
@pytest.mark.parametrize("policy", [*REFERENCE, "fifo"])
def test_simulate_conversation_trace_has_the_hit_rates_of_docs_and_reference(policy: str):
    reference = REFERENCE.get(policy, (None,) * len(CAPACITIES))
    for place, (capacity_blocks, expected) in enumerate(zip(CAPACITIES, reference, strict=True)):
        if policy == "opt":
            outcome = simulate_clairvoyant(conversation(), capacity_blocks)
        else:
            outcome = simulate(conversation(), policy, capacity_blocks)
        percent = 100 * outcome.hit_rate
        assert f"{percent:.2f}" == documented()[0][policy][place]
        assert f"{100 * outcome.hit_rate_second_half:.2f}" == documented()[1][policy][place]
        if expected is None:
            continue
        if policy in EXACT:
            assert f"{percent:.2f}" == f"{expected:.2f}"
        else:
            assert percent == pytest.approx(expected, abs=POINTS), f"at {capacity_blocks} blocks"
        assert outcome.policy == policy
        if policy == "lru" and capacity_blocks in (5000, 10_000):
            assert sum(outcome.hits) == {5000: 34_193, 10_000: 62_005}[capacity_blocks]
