"""Hit rates of LRU at every capacity, of a whole trace or of a sample of its blocks."""

from __future__ import annotations

from kvstore.simulator.curve import HitCurve, lru_curves
from kvstore.simulator.sampling import HitRates, Sample, Workload

__all__ = ["LruCurve"]


class LruCurve:
    """One pass over the requests; then a capacity costs nothing.

    Args:
        workload: of the trace.
        rate: share of the blocks that are sampled; 1 for all of them, which is exact.
        seed: of the sample.
    """

    def __init__(self, workload: Workload, rate: float = 1.0, seed: int = 0) -> None:
        self._sample: Sample | None = None if rate >= 1 else workload.sample(rate, seed)
        arrivals = workload.arrivals if self._sample is None else self._sample.arrivals
        self._whole: HitCurve
        self._second: HitCurve
        self._whole, self._second = lru_curves([ids for _, ids in arrivals], len(arrivals) // 2)

    def hit_rates(self, capacity_blocks: int) -> HitRates:
        """What LRU hits at a capacity."""
        if self._sample is None:
            return HitRates(self._whole.hit_rate(capacity_blocks), self._second.hit_rate(capacity_blocks))
        at = self._sample.capacity_blocks(capacity_blocks)
        return self._sample.scaled(self._whole.hits_at(at), self._second.hits_at(at))
