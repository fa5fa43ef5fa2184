"""How likely a segment is to be asked for again, by what is known of it and by its age; learned as requests come.

A segment (``kvstore.policy.segments``) has a *cell*: a group, a stratum of that, and a few coarse features. Per cell
and age bin the table keeps the returns seen and the seconds that segments were at risk, whether their blocks were
resident or not; a segment that is forgotten before it returned is censored: it adds the seconds it was seen, and no
return. The rate of a cell is the product of its group's rates by age, factors of its stratum for each of a few bands of
ages (how the ages differ at which this kind returns), one factor for each feature, and one of its own; all are drawn
towards 1 while there is little data. It is a Poisson regression, fitted by a few sweeps of proportional fitting that
start at the last result. Old data fades: all counts are halved every two hours.

Ages are seconds. A segment's rank, ``rank + bin``, says where it stands in ``Hazards.index``: the Gittins index of its
stratum, at the level of its other factors when it was last used, in its age bin.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log2
from typing import Final

import numpy as np

from kvstore.policy.gittins import Floats, gittins_index
from kvstore.policy.segments import Segment

BIN_STARTS: Final = (
    0.0, 1.0, 3.0, 6.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0, 360.0, 480.0, 720.0, 960.0, 1440.0,
    2880.0, 5760.0,
)  # fmt: skip
"""Ages at which bins start; the last has no end, and counts as being as wide as its start."""
BINS: Final = len(BIN_STARTS)
LEVELS: Final = 17
_LEVELS_PER_OCTAVE: Final = 2
_MIDDLE: Final = LEVELS // 2
STRATA: Final = 16
"""Of a group, at most."""
_STRATUM_RANKS: Final = LEVELS * BINS

_BAND_STARTS: Final = (0.0, 3.0, 10.0, 30.0, 60.0, 120.0, 240.0, 480.0)

_WIDTHS: Final = np.array([*(end - start for start, end in pairwise(BIN_STARTS)), BIN_STARTS[-1]])
_STARTS: Final = np.array(BIN_STARTS)
_WIDTHS_S: Final = tuple(_WIDTHS.tolist())
_ENDS: Final = (*BIN_STARTS[1:], float("inf"))
_FALLS_FROM: Final = bisect_left(BIN_STARTS, 90.0)
"""From this bin on rates only fall: what comes back later than that has no rhythm that could be known."""
_BAND_OF_BIN: Final = np.array([bisect_right(_BAND_STARTS, start) - 1 for start in BIN_STARTS])
_IN_BAND: Final = (_BAND_OF_BIN[:, None] == np.arange(len(_BAND_STARTS))).astype(np.float64)
_MULTIPLIERS: Final = 2.0 ** ((np.arange(LEVELS) - _MIDDLE) / _LEVELS_PER_OCTAVE)

MOST_CELLS: Final = 2048
"""Once there are so many, a new one is counted with all others of its stratum: so a fit takes some milliseconds."""
_NOTHING: Final = array("d", [0.0] * BINS)

_HALF_LIFE_S: Final = 7200.0
_FADE_AFTER_S: Final = 60.0
_SWEEPS: Final = 3
_FIRST_RATE: Final = 0.1
_PRIOR_SEGMENTS: Final = 5.0
"""Lives of segments by which a bin of the whole is drawn to the bin before it."""
_GROUP_PRIOR_SEGMENTS: Final = 20.0
_FACTOR_PRIOR_RETURNS: Final = 20.0
_BAND_PRIOR_RETURNS: Final = 10.0
_CELL_PRIOR_RETURNS: Final = 60.0
_MOVES_A_BIN: Final = 32

Cell = tuple[int, ...]
"""Group, stratum, then one code for each of the group's features; all from 0 on."""


class Hazards:
    """The table, and the segments that are at risk. Times never go back.

    Attributes:
        index: Gittins index, hits per block and second, by rank. Another list after ``refit``.
    """

    def __init__(self, groups: int, moved: Callable[[Segment], None], *, pooled: Sequence[int]) -> None:
        """An empty table: until the first ``refit`` what is older ranks lower.

        Args:
            groups: groups are numbered from 0 on.
            moved: told of each segment in an order that came to another age bin.
            pooled: groups whose rates, taken together, new and rare groups are drawn to.
        """
        self._moved = moved
        self._pooled = frozenset(pooled)
        self._firsts: dict[Cell, int] = {}
        self._cells: list[Cell] = []
        # A cell's bins after each other. ``array`` because numpy can look into it.
        self._returns = array("d")
        self._at_risk_s = array("d")
        self._alive = array("d")
        self._used_s = array("d")
        # Segments and when they were used; of the last bin none leaves. Entries of other uses are passed over, which is
        # when they would have left: there are at most about as many as others.
        self._by_bin: list[deque[tuple[Segment, float]]] = [deque() for _ in range(BINS - 1)]
        self._factors: dict[tuple[int, int, int], float] = {}
        self._own: dict[Cell, float] = {}
        self._levels: dict[Cell, int] = {}
        self._base: dict[int, Floats] = {}
        self._bands: dict[int, Floats] = {}
        self._faded_s: float | None = None
        first = np.outer(_MULTIPLIERS, 1.0 / (1.0 + _STARTS)).ravel().tolist()
        self.index: list[float] = first * (STRATA * groups)

    def enter(self, segment: Segment, cell: Cell, now_s: float) -> None:
        """A segment was used just now, and is at risk from here on."""
        first = self._firsts.get(cell)
        if first is None and len(self._cells) >= MOST_CELLS:
            cell = (*cell[:2], *(0 for _ in cell[2:]))
            first = self._firsts.get(cell)
        if first is None:
            first = self._new_cell(cell)
        level = self._levels.get(cell)
        if level is None:
            level = self._levels[cell] = self._level_of(self._product(cell))
        segment.cell = first
        segment.bin = 0
        segment.rank = ((cell[0] * STRATA + cell[1]) * LEVELS + level) * BINS
        segment.used_s = now_s
        self._alive[first] += 1
        self._used_s[first] += now_s
        self._by_bin[0].append((segment, now_s))

    def leave(self, segment: Segment, now_s: float, returned: float) -> None:
        """A segment is no longer at risk.

        Args:
            segment: one that entered.
            now_s: the time.
            returned: share of it that was asked for; 0 if it is forgotten, or cut for a reason of its own.
        """
        at = segment.bin
        place = segment.cell + at
        used_s = segment.used_s
        self._alive[place] -= 1
        self._used_s[place] -= used_s
        seen_s = now_s - used_s - BIN_STARTS[at]
        if seen_s > 0.0:
            self._at_risk_s[place] += seen_s
        if returned:
            self._returns[place] += returned
        segment.cell = -1

    def advance(self, now_s: float) -> None:
        """Move segments on to the age bins they have come to, at most some of each bin a call."""
        by_bin, at_risk_s, alive, used = self._by_bin, self._at_risk_s, self._alive, self._used_s
        moved = self._moved
        for at in range(BINS - 2, -1, -1):
            waiting = by_bin[at]
            if not waiting:
                continue
            oldest_s = now_s - BIN_STARTS[at + 1]
            moves = 0
            while waiting[0][1] <= oldest_s:
                entry = waiting.popleft()
                segment, used_s = entry
                if segment.used_s == used_s and segment.bin == at and segment.cell >= 0:
                    cell, to = segment.cell, at + 1
                    place = cell + at
                    at_risk_s[place] += _WIDTHS_S[at]
                    alive[place] -= 1.0
                    used[place] -= used_s
                    age = now_s - used_s
                    while age >= _ENDS[to]:
                        at_risk_s[cell + to] += _WIDTHS_S[to]
                        to += 1
                    place = cell + to
                    alive[place] += 1.0
                    used[place] += used_s
                    segment.bin = to
                    if to < BINS - 1:
                        by_bin[to].append(entry)
                    if segment.orders:
                        moved(segment)
                    moves += 1
                    if moves >= _MOVES_A_BIN:
                        break
                if not waiting:
                    break

    def rates(self, cell: Cell) -> Floats:
        """Returns per second by age bin as of the last ``refit``; for reports and tests."""
        of_age: Floats = self._base[cell[0]] * self._bands[cell[0]][cell[1], _BAND_OF_BIN]
        rates: Floats = of_age * self._own.get(cell, self._product(cell))
        return rates

    def exposure(self, now_s: float) -> tuple[list[Cell], Floats, Floats]:
        """Cells, and by cell and age bin the returns and the seconds at risk, those that are at risk now included."""
        returns, at_risk_s, alive, used_s = (
            np.array(counts).reshape(-1, BINS) for counts in (self._returns, self._at_risk_s, self._alive, self._used_s)
        )
        return self._cells, returns, at_risk_s + np.maximum(0.0, alive * (now_s - _STARTS) - used_s)

    def refit(self, now_s: float) -> None:
        """Compute factors and ``index`` anew, and let old data fade. Cost: cells times bins, a few milliseconds."""
        if not self._cells:
            return
        self._fade(now_s)
        cells, returns, at_risk_s = self.exposure(now_s)
        rows: dict[int, list[int]] = {}
        for number, cell in enumerate(cells):
            rows.setdefault(cell[0], []).append(number)
        pooled = [number for group in sorted(self._pooled & rows.keys()) for number in rows[group]]
        if not pooled:
            return
        whole = _rates(returns[pooled].sum(0), at_risk_s[pooled].sum(0), None, _PRIOR_SEGMENTS)
        for group, numbers in rows.items():
            group_cells = [cells[number] for number in numbers]
            self._fit_group(group, group_cells, returns[numbers], at_risk_s[numbers], whole)
        self._rank()

    def _rank(self) -> None:
        used = sorted({cell[:2] for cell in self._cells if cell[0] in self._base})
        of_age = np.array([self._base[group] * self._bands[group][stratum, _BAND_OF_BIN] for group, stratum in used])
        rates = (of_age[:, None, :] * _MULTIPLIERS[:, None]).reshape(-1, BINS)
        indices = gittins_index(rates, _WIDTHS).ravel().tolist()
        for place, (group, stratum) in enumerate(used):
            first = (group * STRATA + stratum) * _STRATUM_RANKS
            self.index[first : first + _STRATUM_RANKS] = indices[place * _STRATUM_RANKS : (place + 1) * _STRATUM_RANKS]

    def _fit_group(self, group: int, cells: list[Cell], returns: Floats, at_risk_s: Floats, whole: Floats) -> None:
        """Set the group's rates by age and factors, and its cells' levels."""
        seen = returns.sum(1)
        prior = whole * ((seen.sum() + 3.0) / ((at_risk_s @ whole).sum() + 3.0))
        table = np.array(cells, dtype=np.intp)
        stratum, codes = table[:, 1], table[:, 2:].T
        in_stratum = (np.arange(STRATA)[:, None] == stratum).astype(np.float64)
        bands = self._bands.get(group)
        if bands is None:
            bands = np.ones((STRATA, len(_BAND_STARTS)))
        factors = [
            np.array([self._factors.get((group, place, code), 1.0) for code in range(int(column.max()) + 1)])
            for place, column in enumerate(codes)
        ]
        product = np.ones(len(cells))
        for column, factor in zip(codes, factors, strict=True):
            product *= factor[column]
        by_age = returns.sum(0)
        by_band = in_stratum @ returns @ _IN_BAND
        base: Floats = prior
        expected: Floats = seen
        for _ in range(_SWEEPS):
            # Seconds at risk, each as good as so many of a segment with all factors 1.
            at_risk = (in_stratum * product) @ at_risk_s
            base = _rates(by_age, (at_risk * bands[:, _BAND_OF_BIN]).sum(0), prior, _GROUP_PRIOR_SEGMENTS)
            bands = (by_band + _BAND_PRIOR_RETURNS) / ((at_risk * base) @ _IN_BAND + _BAND_PRIOR_RETURNS)
            expected = (at_risk_s * bands[stratum][:, _BAND_OF_BIN]) @ base
            for place, column in enumerate(codes):
                factor = factors[place]
                size = len(factor)
                without = np.bincount(column, expected * product / factor[column], size)
                factors[place] = (np.bincount(column, seen, size) + _FACTOR_PRIOR_RETURNS) / (
                    without + _FACTOR_PRIOR_RETURNS
                )
                product *= factors[place][column] / factor[column]
        self._base[group], self._bands[group] = base, bands
        for place, factor in enumerate(factors):
            for code, value in enumerate(factor.tolist()):
                self._factors[group, place, code] = value
        own = product * (seen + _CELL_PRIOR_RETURNS) / (expected * product + _CELL_PRIOR_RETURNS)
        for cell, value in zip(cells, own.tolist(), strict=True):
            self._own[cell] = value
            self._levels[cell] = self._level_of(value)

    def _fade(self, now_s: float) -> None:
        if self._faded_s is None:
            self._faded_s = now_s
        elif now_s - self._faded_s >= _FADE_AFTER_S:
            kept = 2.0 ** ((self._faded_s - now_s) / _HALF_LIFE_S)
            self._faded_s = now_s
            for counts in (self._returns, self._at_risk_s):
                view = np.frombuffer(counts)
                view *= kept

    def _new_cell(self, cell: Cell) -> int:
        first = self._firsts[cell] = len(self._returns)
        self._cells.append(cell)
        for counts in (self._returns, self._at_risk_s, self._alive, self._used_s):
            counts.extend(_NOTHING)
        return first

    def _product(self, cell: Cell) -> float:
        product = 1.0
        for place, code in enumerate(cell[2:]):
            product *= self._factors.get((cell[0], place, code), 1.0)
        return product

    @staticmethod
    def _level_of(product: float) -> int:
        return min(LEVELS - 1, max(0, round(_MIDDLE + _LEVELS_PER_OCTAVE * log2(product))))


def _rates(returns: Floats, at_risk_s: Floats, prior: Floats | None, segments: float) -> Floats:
    """Rates by age, drawn to ``prior`` or each to the one before it by so many segments' lives; falling late."""
    rates = []
    before = _FIRST_RATE
    for at, (seen, risk, width) in enumerate(zip(returns.tolist(), at_risk_s.tolist(), _WIDTHS.tolist(), strict=True)):
        drawn_to = before if prior is None else float(prior[at])
        before = (seen + segments * drawn_to * width) / (risk + segments * width)
        rates.append(before)
    return np.array(rates[:_FALLS_FROM] + falling(rates[_FALLS_FROM:], (at_risk_s[_FALLS_FROM:] + 1.0).tolist()))


def falling(rates: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises, by weighted squares (pool adjacent violators; Ayer and others, 1955)."""
    pools: list[list[float]] = []
    for rate, weight in zip(rates, weights, strict=True):
        pool = [rate, weight, 1]
        while pools and pools[-1][0] < pool[0]:
            other = pools.pop()
            total = other[1] + pool[1]
            pool = [(other[0] * other[1] + pool[0] * pool[1]) / total, total, other[2] + pool[2]]
        pools.append(pool)
    return [rate for rate, _, count in pools for _ in range(int(count))]
