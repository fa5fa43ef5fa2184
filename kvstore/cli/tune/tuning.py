"""From a trace to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Final

from kvstore.cli import render
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.tune.costs import CostModel
from kvstore.cli.tune.grid import Grid, grid_rows
from kvstore.cli.tune.options import DEFAULT_POLICIES, Capacity, capacities_around, default_capacities
from kvstore.cli.tune.recommend import Question, recommended, starting_bytes
from kvstore.cli.tune.report import Assumptions, Point, TraceFacts, TuneReport
from kvstore.cli.tune.runs import carry_out, lru_rate, planned
from kvstore.cli.tune.sizes import BlockSizes
from kvstore.errors import InvalidArgument
from kvstore.simulator.clairvoyant import CLAIRVOYANT
from kvstore.simulator.lru_curve import LruCurve
from kvstore.simulator.requests import Trace
from kvstore.simulator.sampling import Workload

__all__ = ["Asked", "tuned"]

_CURVE_POINTS: Final = 160
_CURVE_BEGIN: Final = 0.25
"""Of the smallest capacity in question: where the curve begins."""

Progress = Callable[[str, int, int], None]
"""Is given what is being done, and how much of how much is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to find out.

    Attributes:
        policies: names; None for the usual ones.
        capacities: of DRAM; None for round ones up to all blocks of the trace.
        codecs: names.
        ssd: capacities of the SSD, 0 for none.
        have: DRAM to recommend for; None for that of the daemon that recorded it, or where more gains little.
        exact: simulate all blocks.
        prefill_tokens_per_s, dram_gb_per_s, ssd_gb_per_s: see ``CostModel``.
        decode_gb_per_s: by codec, see ``CostModel``.
    """

    policies: Sequence[str] | None
    capacities: Sequence[Capacity] | None
    codecs: Sequence[str]
    ssd: Sequence[Capacity]
    have: Capacity | None
    exact: bool
    prefill_tokens_per_s: float
    dram_gb_per_s: float
    ssd_gb_per_s: float
    decode_gb_per_s: dict[str, float]


def tuned(
    trace: Trace, sizes: BlockSizes, asked: Asked, on_progress: Progress = lambda what, done, of: None
) -> TuneReport:
    """Simulate a trace and recommend a configuration.

    Args:
        trace: to simulate.
        sizes: of blocks, for all codecs in question.
        asked: what to find out.
        on_progress: is told how far it is.

    Raises:
        InvalidArgument: the trace asks for no full block, a capacity holds none, or there is no policy but the bound.
        KVStoreError: a process ended before it was done.
    """
    started = perf_counter()
    machine = machine_facts()
    workload = Workload(trace.arrivals)
    if not workload.asked.whole:
        raise InvalidArgument(f"no request of {trace.name!r} has a full block of {trace.block_tokens} tokens")
    policies = asked.policies or DEFAULT_POLICIES
    if set(policies) == {CLAIRVOYANT}:
        raise InvalidArgument(f"--policies: {CLAIRVOYANT} is a bound that no daemon can run; name a policy beside it")
    have = asked.have
    if have is None and trace.dram_bytes and asked.capacities is None:
        have = Capacity(size_bytes=trace.dram_bytes)
    grid = Grid(sizes, _capacities(asked, have, sizes, workload), asked.codecs, asked.ssd)
    curve_rate = lru_rate(workload, exact=asked.exact)
    on_progress("curve of LRU", 0, 1)
    curve = LruCurve(workload, curve_rate)
    on_progress("curve of LRU", 1, 1)
    runs = planned(workload, policies, [(held.dram_blocks, held.ssd_blocks) for held in grid.tiers], exact=asked.exact)
    distinct_runs = list(dict.fromkeys(runs.values()))
    total = len(distinct_runs) * len(workload.arrivals)
    results = carry_out(workload, distinct_runs, lambda done: on_progress("requests simulated", done, total))
    costs = CostModel(
        prefill_tokens_per_s=asked.prefill_tokens_per_s,
        dram_gb_per_s=asked.dram_gb_per_s,
        ssd_gb_per_s=asked.ssd_gb_per_s,
        decode_gb_per_s=asked.decode_gb_per_s,
        sizes=sizes,
        block_tokens=trace.block_tokens,
        input_tokens=sum(request.input_tokens for request in trace.requests) / len(trace.requests),
        asked_blocks=workload.asked.whole / len(trace.requests),
    )
    rows = list(grid_rows(grid.tiers, policies, workload, curve, curve_rate, runs, results, costs))
    here = starting_bytes(grid, curve) if have is None else sizes.bytes_of(have)
    question = Question(rows, workload, curve, grid, costs, here, have is not None)
    return TuneReport(
        machine=machine,
        trace=_facts(trace, workload),
        assumptions=Assumptions(
            block=sizes.source,
            block_bytes=sizes.block_bytes,
            slot_bytes=sizes.slot_bytes,
            prefill_tokens_per_s=asked.prefill_tokens_per_s,
            dram_gb_per_s=asked.dram_gb_per_s,
            ssd_gb_per_s=asked.ssd_gb_per_s,
            decode_gb_per_s=asked.decode_gb_per_s,
        ),
        exact=asked.exact,
        seconds=round(perf_counter() - started, 3),
        rows=rows,
        lru_curve=_points(curve, workload, [held.dram_blocks for held in grid.tiers]),
        lru_rate=curve_rate,
        recommendation=recommended(question),
    )


def _capacities(asked: Asked, have: Capacity | None, sizes: BlockSizes, workload: Workload) -> list[Capacity]:
    """What was asked for, else round ones or those around what there is; and what there is.

    Raises:
        InvalidArgument: what there is holds no block.
    """
    if have is None:
        return [*(asked.capacities or default_capacities(workload.distinct_blocks))]
    largest = max(asked.codecs, key=sizes.slot_bytes.__getitem__)
    least_bytes = sizes.slot_bytes[largest]
    if sizes.bytes_of(have) < least_bytes:
        raise sizes.too_small("--have", sizes.bytes_of(have), largest)
    around = [each for each in capacities_around(have) if sizes.bytes_of(each) >= least_bytes]
    return list(dict.fromkeys((*(asked.capacities or around), have)))


def _facts(trace: Trace, workload: Workload) -> TraceFacts:
    times_ns = [request.time_ns for request in trace.requests]
    return TraceFacts(
        name=trace.name,
        format=trace.format,
        requests=len(trace.requests),
        seconds=(max(times_ns) - min(times_ns)) / 1e9,
        block_tokens=trace.block_tokens,
        input_tokens=sum(request.input_tokens for request in trace.requests) / len(trace.requests),
        asked_blocks=workload.asked.whole,
        distinct_blocks=workload.distinct_blocks,
        hot_blocks=len(workload.hot),
        hit_rate=workload.unlimited.whole,
        hit_rate_second_half=workload.unlimited.second_half,
        notes=[*trace.notes, *_notes_on_times(times_ns)],
    )


def _notes_on_times(times_ns: Sequence[int]) -> Iterator[str]:
    earlier = sum(after < before for before, after in pairwise(times_ns))
    if earlier:
        yield f"times fall {render.count(earlier)} times: simulated in the file's order, with the latest time so far"
    elif len(times_ns) > 1 and times_ns[0] == times_ns[-1]:
        yield "all requests have one time: adaptive learns how long a return takes, and has nothing to learn from here"


def _points(curve: LruCurve, workload: Workload, capacities_blocks: Sequence[int]) -> list[Point]:
    """The curve at capacities that are evenly spaced in their logarithm, and at those asked for."""
    low = max(1.0, min(capacities_blocks) * _CURVE_BEGIN)
    high = max(low + 1, *capacities_blocks, workload.distinct_blocks)
    step = (high / low) ** (1 / (_CURVE_POINTS - 1))
    sizes = {round(low * step**number) for number in range(_CURVE_POINTS)} | set(capacities_blocks)
    return [
        Point(capacity_blocks=size, hit_rate=rates.whole, hit_rate_second_half=rates.second_half)
        for size in sorted(sizes)
        for rates in [curve.hit_rates(size)]
    ]
