"""All combinations of policies, capacities, codecs and tiers, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvstore.cli.tune.costs import CostModel
from kvstore.cli.tune.options import Capacity
from kvstore.cli.tune.report import TuneRow
from kvstore.cli.tune.runs import LRU, Rates, Run
from kvstore.cli.tune.sizes import BlockSizes
from kvstore.simulator.clairvoyant import CLAIRVOYANT
from kvstore.simulator.lru_curve import LruCurve
from kvstore.simulator.sampling import HitRates, Workload

__all__ = ["Grid", "Tiers", "grid_rows"]

_NOTHING = HitRates(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Tiers:
    """What holds blocks of one codec."""

    codec: str
    dram_bytes: int
    dram_blocks: int
    ssd_bytes: int = 0
    ssd_blocks: int = 0


class Grid:
    """The tiers that were asked for.

    Args:
        sizes: of blocks, for all codecs.
        capacities: of DRAM.
        codecs: names.
        ssd: capacities of the SSD; 0 for none.

    Raises:
        InvalidArgument: a capacity holds no block.
    """

    def __init__(
        self, sizes: BlockSizes, capacities: Sequence[Capacity], codecs: Sequence[str], ssd: Sequence[Capacity]
    ) -> None:
        self._sizes = sizes
        self.tiers = [self._tiers(codec, dram, below) for below in ssd for codec in codecs for dram in capacities]

    def tiers_of(self, codec: str, dram_bytes: int, ssd_bytes: int) -> Tiers:
        """What bytes hold of blocks of a codec."""
        slot = self._sizes.slot_bytes[codec]
        return Tiers(codec, dram_bytes, dram_bytes // slot, ssd_bytes, ssd_bytes // slot)

    def _tiers(self, codec: str, dram: Capacity, ssd: Capacity) -> Tiers:
        made = self.tiers_of(codec, self._sizes.bytes_of(dram), self._sizes.bytes_of(ssd))
        for held, given, option in (
            (made.dram_blocks, made.dram_bytes, "--capacities"),
            (made.ssd_blocks, made.ssd_bytes, "--ssd"),
        ):
            if given and not held:
                raise self._sizes.too_small(option, given, codec)
        return made


def grid_rows(
    tiers: Sequence[Tiers],
    policies: Sequence[str],
    workload: Workload,
    curve: LruCurve,
    curve_rate: float,
    runs: Mapping[tuple[str, int, int], Run],
    results: Mapping[Run, Rates],
    costs: CostModel,
) -> Iterator[TuneRow]:
    """One row for each policy in each tier.

    Args:
        tiers: in the order of the rows.
        policies: names.
        workload: of the trace.
        curve: of LRU.
        curve_rate: share of the blocks that it rests on.
        runs: what ``planned`` gave for the same tiers and policies.
        results: of the runs.
        costs: estimate times.
    """
    for held in tiers:
        for policy in policies:
            ssd, written, rate = _NOTHING, 0, 1.0
            run = _run_of(runs, policy, held)
            if run is not None:
                (both, ssd, written), rate = results[run], run.rate
            elif policy == LRU and held.dram_blocks < workload.distinct_blocks:
                both, rate = curve.hit_rates(held.dram_blocks), curve_rate
            else:
                both = workload.unlimited
            if policy == CLAIRVOYANT and held.ssd_blocks:
                above = _run_of(runs, policy, Tiers(held.codec, 0, held.dram_blocks))
                dram = workload.unlimited if above is None else results[above].both
                ssd = HitRates(*(of - part for of, part in zip(both, dram, strict=True)))
            yield TuneRow(
                policy=policy,
                codec=held.codec,
                capacity_blocks=held.dram_blocks,
                capacity_bytes=held.dram_bytes,
                ssd_blocks=held.ssd_blocks,
                ssd_bytes=held.ssd_bytes,
                hit_rate=both.whole,
                hit_rate_second_half=both.second_half,
                ssd_hit_rate=ssd.whole,
                ssd_written_bytes=written * costs.sizes.slot_bytes[held.codec],
                first_token_s=costs.first_token_s(held.codec, both.whole - ssd.whole, ssd.whole),
                rate=rate,
            )


def _run_of(runs: Mapping[tuple[str, int, int], Run], policy: str, held: Tiers) -> Run | None:
    if policy == CLAIRVOYANT:
        return runs.get((policy, held.dram_blocks + held.ssd_blocks, 0))
    return runs.get((policy, held.dram_blocks, held.ssd_blocks))
