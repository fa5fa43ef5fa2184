from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policy import hazards as hazards_module
from kvstore.policy.hazards import BIN_STARTS, BINS, Hazards, falling
from kvstore.policy.segments import Segment

ENDS = (*BIN_STARTS[1:], float("inf"))
Life = tuple[tuple[int, ...], float, float, float]
"""Cell, begin, end, and what share returned then: 0 if it was forgotten."""


def lives(seed: int, count: int) -> list[Life]:
    rng = random.Random(seed)
    cells = [(0, 0, 0), (0, 2, 1), (1, 1)]
    return [
        (rng.choice(cells), born := rng.uniform(0, 3000), born + rng.expovariate(1 / 200), rng.choice((0.0, 0.5, 1.0)))
        for _ in range(count)
    ]


def replay(hazards: Hazards, what: list[Life], until_s: float, step_s: float = 1.0) -> None:
    """Lives in order of time, with the table advanced in between."""
    segments = [Segment(number + 1, 0) for number in range(len(what))]
    events = [(born, 0, number) for number, (_, born, _, _) in enumerate(what)]
    events += [(gone, 1, number) for number, (_, _, gone, _) in enumerate(what)]
    now_s = 0.0
    for at_s, kind, number in sorted(event for event in events if event[0] <= until_s):
        while now_s + step_s < at_s:
            now_s += step_s
            hazards.advance(now_s)
        hazards.advance(at_s)
        if kind == 0:
            hazards.enter(segments[number], what[number][0], at_s)
        else:
            hazards.leave(segments[number], at_s, what[number][3])
    hazards.advance(until_s)


@pytest.mark.parametrize("until_s", [400.0, 2000.0, 20_000.0])
def test_hazards_exposure_is_what_adding_up_all_lives_gives(until_s: float):
    what = lives(3, 300)
    hazards = Hazards(2, lambda _: None, pooled=(0, 1))
    replay(hazards, what, until_s)
    returns: dict[tuple[int, ...], list[float]] = {}
    at_risk_s: dict[tuple[int, ...], list[float]] = {}
    for cell, born, gone, share in what:
        if born > until_s:
            continue
        age = min(gone, until_s) - born
        seconds = at_risk_s.setdefault(cell, [0.0] * BINS)
        seen = returns.setdefault(cell, [0.0] * BINS)
        for at, (start, end) in enumerate(zip(BIN_STARTS, ENDS, strict=True)):
            seconds[at] += max(0.0, min(age, end) - start)
            if gone <= until_s and start <= age < end:
                seen[at] += share
    cells, seen_table, risk_table = hazards.exposure(until_s)
    assert sorted(cells) == sorted(returns)
    for number, cell in enumerate(cells):
        assert seen_table[number].tolist() == pytest.approx(returns[cell])
        assert risk_table[number].tolist() == pytest.approx(at_risk_s[cell], abs=1e-6)


def test_hazards_find_the_rates_that_returns_were_drawn_from():
    rng = random.Random(7)
    hazards = Hazards(1, lambda _: None, pooled=(0,))
    rates = {(0, 0, 0): 0.02, (0, 0, 1): 0.004}
    what: list[Life] = []
    for _ in range(6000):
        cell = rng.choice(list(rates))
        born = rng.uniform(0, 3000)
        returned = born + rng.expovariate(rates[cell])
        # Half of them are forgotten early, whatever they would have done.
        forgotten = born + (rng.uniform(0, 300) if rng.random() < 0.5 else 5000)
        what.append((cell, born, min(returned, forgotten), 1.0 if returned <= forgotten else 0.0))
    replay(hazards, what, 3600.0, step_s=0.25)
    hazards.refit(3600.0)
    for cell, rate in rates.items():
        fitted = hazards.rates(cell)[4:14]
        assert fitted.tolist() == pytest.approx([rate] * len(fitted), rel=0.25)


def test_hazards_of_what_was_forgotten_early_are_not_low():
    """Censoring: the same returns, but all that live past 60 s are forgotten then."""
    tables = []
    for forget_after_s in (60.0, 10_000.0):
        rng = random.Random(5)
        hazards = Hazards(1, lambda _: None, pooled=(0,))
        what: list[Life] = []
        for _ in range(4000):
            born = rng.uniform(0, 3000)
            lasts = rng.expovariate(0.01)
            what.append(((0, 0), born, born + min(lasts, forget_after_s), 1.0 if lasts < forget_after_s else 0.0))
        replay(hazards, what, 3600.0, step_s=0.25)
        hazards.refit(3600.0)
        tables.append(hazards.rates((0, 0)))
    until_60_s = BIN_STARTS.index(60.0)
    assert tables[0][:until_60_s].tolist() == pytest.approx(tables[1][:until_60_s].tolist(), rel=0.05)
    # Past that nothing was seen, and the last that was goes on.
    assert tables[0][until_60_s + 3] == pytest.approx(0.01, rel=0.3)


def test_hazards_old_data_fades():
    hazards = Hazards(1, lambda _: None, pooled=(0,))
    replay(hazards, [((0, 0), float(at), float(at) + 10.0, 1.0) for at in range(200)], 300.0)
    hazards.refit(300.0)
    _, before, _ = hazards.exposure(300.0)
    hazards.refit(300.0 + 7200.0)
    _, after, _ = hazards.exposure(300.0 + 7200.0)
    assert after.sum() == pytest.approx(before.sum() / 2)


def test_hazards_index_orders_a_hot_cell_above_a_cold_one():
    rng = random.Random(1)
    hazards = Hazards(1, lambda _: None, pooled=(0,))
    what: list[Life] = []
    for _ in range(2000):
        hot = rng.random() < 0.5
        born = rng.uniform(0, 3000)
        what.append(((0, 0, int(hot)), born, born + rng.uniform(5, 100) if hot else born + 2000, float(hot)))
    replay(hazards, what, 3600.0)
    hazards.refit(3600.0)
    ranks = []
    for hot in (0, 1):
        segment = Segment(9000 + hot, 0)
        hazards.enter(segment, (0, 0, hot), 3600.0)
        ranks.append(hazards.index[segment.rank])
    assert ranks[1] > 4 * ranks[0]


def test_hazards_cells_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hazards_module, "MOST_CELLS", 10)
    hazards = Hazards(2, lambda _: None, pooled=(0, 1))
    for number in range(200):
        hazards.enter(Segment(number + 1, 0), (number % 2, number % 3, number), float(number))
    cells, returns, _ = hazards.exposure(200.0)
    assert len(cells) == len(returns) <= 10 + 2 * 3
    hazards.refit(200.0)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.1, 10.0)), min_size=1, max_size=7))
def test_falling_never_rises_and_keeps_the_weighted_mean_of_each_pool(pairs: list[tuple[float, float]]):
    rates, weights = [rate for rate, _ in pairs], np.array([weight for _, weight in pairs])
    got = falling(rates, weights.tolist())
    assert all(before >= after - 1e-12 for before, after in pairwise(got))
    # The minimum by its conditions: partial sums of what was moved are never above zero, and zero where a pool ends.
    moved = np.cumsum((np.array(rates) - np.array(got)) * weights)
    assert moved.max() <= 1e-9
    for place, (before, after) in enumerate(pairwise(got)):
        if before > after + 1e-9:
            assert moved[place] == pytest.approx(0.0, abs=1e-9)
    assert moved[-1] == pytest.approx(0.0, abs=1e-9)
