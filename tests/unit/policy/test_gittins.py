from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policy.gittins import gittins_index

BINS = 6


def best_by_trying_all(rates: list[float], widths: list[float], first: int) -> float:
    """Every age at which one may stop, one after the other."""
    best = 0.0
    for last in range(first, len(rates)):
        alive, hits, seconds = 1.0, 0.0, 0.0
        for rate, width in zip(rates[first : last + 1], widths[first : last + 1], strict=True):
            hazard = min(0.95, 1.0 - float(np.exp(-rate * width)))
            hits += alive * hazard
            seconds += alive * ((1.0 - hazard) * width + hazard * width / 2.0)
            alive *= 1.0 - hazard
        best = max(best, hits / seconds)
    return best


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.floats(0.0, 5.0), min_size=BINS, max_size=BINS),
    widths=st.lists(st.floats(0.1, 1000.0), min_size=BINS, max_size=BINS),
)
def test_gittins_is_the_best_of_all_times_to_stop(rates: list[float], widths: list[float]):
    index = gittins_index(np.array([rates, rates[::-1]]), np.array(widths))
    for row, row_rates in enumerate((rates, rates[::-1])):
        for first in range(BINS):
            assert index[row, first] == pytest.approx(best_by_trying_all(row_rates, widths, first), rel=1e-9)


def test_gittins_of_a_rate_that_only_falls_falls():
    index = gittins_index(np.array([[0.3, 0.2, 0.1, 0.05]]), np.array([1.0, 1.0, 1.0, 1.0]))[0]
    assert all(before > after for before, after in pairwise(index.tolist()))


def test_gittins_waits_for_what_comes_later():
    """Nothing returns at once and nearly all a little later: young ones are worth more than those that missed it."""
    index = gittins_index(np.array([[0.0, 3.0, 0.001]]), np.array([10.0, 10.0, 1000.0]))[0]
    assert index[1] > index[0] > 10 * index[2]
