"""What to set, and why: in sentences that also say what it would not do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.cli import render
from kvstore.cli.codec_slots import RAW, WHAT_IF_CODEC
from kvstore.cli.quality.measured import measured
from kvstore.cli.tune.costs import CostModel
from kvstore.cli.tune.grid import Grid
from kvstore.cli.tune.report import Recommendation, TuneRow
from kvstore.cli.tune.runs import LRU
from kvstore.policy.registry import POLICIES
from kvstore.simulator.clairvoyant import CLAIRVOYANT
from kvstore.simulator.lru_curve import LruCurve
from kvstore.simulator.sampling import Workload

__all__ = ["Question", "recommended", "starting_bytes"]

_FLAT: Final = 0.02
"""Twice the DRAM gains less: more is not worth much."""
_WORTH: Final = 0.003
"""Hit rate that a policy must win over LRU to be named; samples differ by about as much."""
_AS_FAST: Final = 1.01
_TINY: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Question:
    """What is known when a recommendation is made.

    Attributes:
        rows: of the grid.
        workload, curve: of the trace.
        grid, costs: give blocks for bytes, and times for hits.
        here_bytes: DRAM that the recommendation is for.
        given: whether somebody said so.
    """

    rows: Sequence[TuneRow]
    workload: Workload
    curve: LruCurve
    grid: Grid
    costs: CostModel
    here_bytes: int
    given: bool

    def lru(self, codec: str, dram_bytes: int) -> float:
        """Hit rate of LRU without an SSD."""
        return self.curve.hit_rates(self.grid.tiers_of(codec, dram_bytes, 0).dram_blocks).whole


def starting_bytes(grid: Grid, curve: LruCurve) -> int:
    """The smallest DRAM of the grid from which on twice as much gains little with LRU; the largest if there is none."""
    sizes = sorted({tiers.dram_bytes for tiers in grid.tiers}, reverse=True)
    found = sizes[0]
    for size in sizes:
        now, twice = (curve.hit_rates(grid.tiers_of(RAW, many, 0).dram_blocks).whole for many in (size, 2 * size))
        if twice - now >= _FLAT:
            break
        found = size
    return found


def recommended(question: Question) -> Recommendation | None:
    """The combination that is fastest at the DRAM in question, or the simplest of those that are about as fast.

    Only policies that a daemon can run; None where none of them was simulated.
    """
    here = [row for row in question.rows if row.capacity_bytes == question.here_bytes]
    possible = [row for row in here if row.policy in POLICIES]
    if not possible:
        return None
    fastest = min(row.first_token_s for row in possible)
    chosen = min(
        (row for row in possible if row.first_token_s <= fastest * _AS_FAST),
        key=lambda row: (row.codec != RAW, row.ssd_bytes, row.policy != LRU, row.first_token_s),
    )
    better = [row for row in possible if (row.codec, row.ssd_bytes) == (chosen.codec, chosen.ssd_bytes)]
    lru = next((row for row in better if row.policy == LRU), None)
    chosen = min(better, key=lambda row: row.first_token_s)
    if lru is not None and chosen.hit_rate - lru.hit_rate < _WORTH:
        chosen = chosen if lru.first_token_s > chosen.first_token_s * _AS_FAST else lru
    return Recommendation(
        policy=chosen.policy,
        codec=chosen.codec,
        capacity_blocks=chosen.capacity_blocks,
        capacity_bytes=chosen.capacity_bytes,
        ssd_bytes=chosen.ssd_bytes,
        hit_rate=chosen.hit_rate,
        first_token_s=chosen.first_token_s,
        reasons=[*_reasons(question, here, chosen)],
        settings=[*_settings(chosen)],
    )


def _reasons(question: Question, here: Sequence[TuneRow], chosen: TuneRow) -> Iterator[str]:
    size = question.here_bytes
    blocks = question.grid.tiers_of(RAW, size, 0).dram_blocks
    lru = question.lru(RAW, size)
    plain = {row.policy: row for row in here if row.codec == RAW and not row.ssd_bytes}
    bound = plain.get(CLAIRVOYANT)
    yield (
        f"{render.size(size)} of DRAM have room for {render.blocks(blocks)} uncompressed. "
        f"LRU then hits {render.percent(lru)}"
        + (f", and no policy could hit more than {render.percent(bound.hit_rate)}" if bound else "")
        + f". No amount of DRAM hits more than {render.percent(question.workload.unlimited.whole)}: "
        "the rest is asked for once."
    )
    if not question.given:
        flat = question.lru(RAW, 2 * size) - lru < _FLAT
        least = f"{_FLAT * 100:g} points"
        yield (
            f"It is the smallest of the capacities asked for from which on twice as much gains less than {least}"
            if flat
            else f"It is the largest of the capacities asked for, and twice as much would still gain {least} or more"
        ) + "; --have says what you have."
    yield from _of_policies(plain, lru, bound)
    twice = question.lru(RAW, 2 * size) - lru
    yield f"Twice the DRAM ({render.size(2 * size)}) would give {_points(twice)} with LRU."
    yield from _of_codecs(question, here, lru)
    yield from _of_ssds(question, here)
    before = question.costs.first_token_s(RAW, lru)
    if chosen.first_token_s < before * (1 - _TINY):
        yield (
            f"So set, the time to the first token falls from {render.latency(before)} (LRU, raw, no SSD) to about "
            f"{render.latency(chosen.first_token_s)}, by the cost model below."
        )


def _of_policies(plain: dict[str, TuneRow], lru: float, bound: TuneRow | None) -> Iterator[str]:
    tried = [row for row in plain.values() if row.policy in POLICIES and row.policy != LRU]
    best = max(tried, key=lambda row: row.hit_rate, default=None)
    gain = 0.0 if best is None else best.hit_rate - lru
    if best is not None and gain < _WORTH:
        names = ", ".join(row.policy for row in tried)
        none = f"None of {names} hits" if len(tried) > 1 else f"{names} does not hit"
        yield f"{none} noticeably more than LRU here (best: {best.policy}, {_points(gain)})."
    elif best is not None:
        gap = 0.0 if bound is None else bound.hit_rate - lru
        share = f", {render.percent(gain / gap)} of what lies between LRU and the bound" if gap > _TINY else ""
        yield f"{best.policy} gives {_points(gain)} over LRU with raw blocks, without a byte more{share}."
    simulated = [row for row in plain.values() if row.policy not in (*POLICIES, CLAIRVOYANT)]
    other = max(simulated, key=lambda row: row.hit_rate, default=None)
    if other is not None and other.hit_rate - lru - max(gain, 0.0) >= _WORTH:
        yield f"{other.policy} would give {_points(other.hit_rate - lru)}, but runs in simulations only."


def _of_codecs(question: Question, here: Sequence[TuneRow], lru: float) -> Iterator[str]:
    asked = [codec for codec in dict.fromkeys(row.codec for row in here) if codec != RAW]
    slots = question.costs.sizes.slot_bytes
    for codec in asked or [WHAT_IF_CODEC]:
        if codec not in slots:
            continue
        gain = question.lru(codec, question.here_bytes) - lru
        quality = measured()[codec]
        if quality.exact:
            cost = "It is exact."
        else:
            cost = (
                f"It is lossy: attention was off by {render.percent(quality.attention_error)} on a small model; see "
                "'kvstore quality'."
            )
        decode_s = question.costs.block_decode_s(codec)
        load_s = slots[codec] / (question.costs.dram_gb_per_s * 1e9)
        slow = (
            f" Here decoding a block takes {render.latency(decode_s)} and loading it {render.latency(load_s)}: that is "
            "this machine's CPU; --decode-gb-per-s says what your GPU does."
            if decode_s > load_s
            else ""
        )
        yield (
            f"{codec} in the same bytes holds {slots[RAW] / slots[codec]:.2f} times as many blocks: {_points(gain)} "
            f"with LRU. {cost}{slow}"
        )


def _of_ssds(question: Question, here: Sequence[TuneRow]) -> Iterator[str]:
    costs = question.costs
    without = {(row.policy, row.codec): row.hit_rate for row in here if not row.ssd_bytes}
    told = set()
    for row in here:
        if not row.ssd_bytes or row.policy == CLAIRVOYANT or (row.codec, row.ssd_bytes) in told:
            continue
        told.add((row.codec, row.ssd_bytes))
        load, compute = costs.block_load_s(row.codec, costs.ssd_gb_per_s), costs.block_prefill_s
        before = without.get((row.policy, row.codec))
        if before is None and row.policy == LRU:
            before = question.lru(row.codec, row.capacity_bytes)
        gain = "" if before is None else f" gives {_points(row.hit_rate - before)} with {row.policy}"
        refused = "" if costs.ssd_pays(row.codec) else ": such loads are refused, as slower than computing"
        yield (
            f"An SSD of {render.size(row.ssd_bytes)}{gain} ({row.codec}), for {render.size(row.ssd_written_bytes)} of "
            f"writes over the trace; to load a block takes {render.latency(load)}, to compute it "
            f"{render.latency(compute)}{refused}."
        )


def _settings(chosen: TuneRow) -> Iterator[str]:
    yield "[dram]"
    yield f"capacity_bytes = {_setting(chosen.capacity_bytes)} # {render.blocks(chosen.capacity_blocks)}"
    if chosen.ssd_bytes:
        yield "[ssd]"
        yield f"capacity_bytes = {_setting(chosen.ssd_bytes)}"
    yield "[eviction]"
    yield f'policy = "{chosen.policy}"'
    if chosen.ssd_bytes:
        yield f'ssd_policy = "{chosen.policy}"'
    if chosen.codec != RAW:
        yield f'# The codec is the clients\' to choose: TensorStore(layout, "{chosen.codec}", ...)'


def _setting(size_bytes: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if size_bytes % unit == 0:
            return f'"{size_bytes // unit}{name}"'
    return str(size_bytes)


def _points(gain: float) -> str:
    shown = f"{gain * 100:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
    return f"{shown} points"
