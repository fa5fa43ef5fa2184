"""The Gittins index: the most hits per block and second that keeping a block may still bring.

A block is kept until some age, or until its segment is asked for again, whichever is first. Over all ages at which one
may stop, the best ratio of expected hits to expected time is the index at the age it has now; what has the lowest
leaves first. Gittins, "Bandit processes and dynamic allocation indices" (1979).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_SUREST: Final = 0.95
"""A return within one bin is never taken as surer than that."""

Floats = NDArray[np.float64]


def gittins_index(rates: Floats, widths: Floats) -> Floats:
    """Index by age bin, in hits per second, for rows of hazard rates.

    Args:
        rates: returns per second; a row for each class, a column for each age bin.
        widths: seconds that each bin is wide.

    Returns:
        As ``rates``. Cost: quadratic in the bins.
    """
    hazards = np.minimum(_SUREST, 1.0 - np.exp(-rates.T * widths[:, None]))
    stays = 1.0 - hazards
    # One that returns within a bin was kept for half of it.
    seconds = (1.0 - hazards / 2.0) * widths[:, None]
    # By the last bin to keep, from the one that is looked at on.
    hits, kept = np.zeros_like(hazards), np.zeros_like(hazards)
    index = np.empty_like(hazards)
    for first in range(len(hazards) - 1, -1, -1):
        for sums, here in ((hits, hazards), (kept, seconds)):
            sums[first:] *= stays[first]
            sums[first:] += here[first]
        index[first] = (hits[first:] / kept[first:]).max(axis=0)
    return index.T
