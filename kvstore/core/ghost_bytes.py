"""How many bytes left after a given departure and are still out: sums over the last departures, in a ring.

A Fenwick tree with wide nodes: three levels of 64 numbers each in place of one level a bit, because in CPython adding
up 64 numbers of an array takes as long as three steps of a loop. Departures are written many at a time; what comes
back, or is asked for, costs O(log n) with base 64.
"""

from __future__ import annotations

from typing import Final

import numpy as np

WIDTH: Final = 64
"""Numbers under one of the next level."""

SPAN: Final = WIDTH * WIDTH
"""Places under one number of the highest level; rings have a multiple of it."""


Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]
"""A vector."""


class GhostBytes:
    """Bytes by place in a ring that is written place after place.

    Args:
        places: of the ring, a multiple of ``SPAN``.

    Attributes:
        out: bytes of each place.
    """

    __slots__ = ("_all", "_nodes", "_nodes_array", "_places", "_tops", "_tops_array", "out")

    def __init__(self, places: int) -> None:
        self._places = places
        self._all = np.zeros(places, np.int64)
        self._nodes_array = np.zeros(places // WIDTH, np.int64)
        self._tops_array = np.zeros(places // SPAN, np.int64)
        # The same memory: single numbers are read and written faster in this way.
        self.out: Final = self._all.data
        self._nodes = self._nodes_array.data
        self._tops = self._tops_array.data

    def write(self, place: int, out_bytes: Numbers) -> None:
        """Take the next places, from this one on."""
        end = place + len(out_bytes)
        self._all[place:end] = out_bytes
        # A number is right from the moment on when all under it are written.
        first, last = place // WIDTH, end // WIDTH
        if first < last:
            under = self._all[first * WIDTH : last * WIDTH]
            self._nodes_array[first:last] = under.reshape(-1, WIDTH).sum(1)
            first, last = first // WIDTH, last // WIDTH
            if first < last:
                under = self._nodes_array[first * WIDTH : last * WIDTH]
                self._tops_array[first:last] = under.reshape(-1, WIDTH).sum(1)

    def write_one(self, place: int, out_bytes: int) -> None:
        """Take the next place: cheaper than ``write`` for a few."""
        self.out[place] = out_bytes
        end = place + 1
        if not end % WIDTH:
            self._nodes[place // WIDTH] = sum(self.out[end - WIDTH : end].tolist())
            end //= WIDTH
            if not end % WIDTH:
                self._tops[place // SPAN] = sum(self._nodes[end - WIDTH : end].tolist())

    def clear(self, place: int) -> None:
        """What left there is back, or need not be counted any more."""
        gone_bytes = self.out[place]
        if gone_bytes:
            self.out[place] = 0
            # What is not written to its end is summed up anew when it is.
            self._nodes[place // WIDTH] -= gone_bytes
            self._tops[place // SPAN] -= gone_bytes

    def between(self, begin: int, end: int) -> int:
        """Bytes of a few places, one after the other."""
        return sum(self.out[begin:end].tolist())

    def since(self, place: int, end: int) -> int:
        """Bytes from a place on, itself included, up to the one before ``end``, which is written next."""
        if place < end:
            return self._sum(place, end)
        return self._sum(place, self._places) + self._sum(0, end)

    def _sum(self, begin: int, end: int) -> int:
        if end - begin <= 2 * WIDTH:
            return sum(self.out[begin:end].tolist())
        first, last = -(-begin // WIDTH), end // WIDTH
        total = sum(self.out[begin : first * WIDTH].tolist()) + sum(self.out[last * WIDTH : end].tolist())
        if last - first <= 2 * WIDTH:
            return total + sum(self._nodes[first:last].tolist())
        first_top, last_top = -(-first // WIDTH), last // WIDTH
        total += sum(self._nodes[first : first_top * WIDTH].tolist())
        total += sum(self._nodes[last_top * WIDTH : last].tolist())
        return total + sum(self._tops[first_top:last_top].tolist())
