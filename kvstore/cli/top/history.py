"""The last minutes of a daemon, bounded: rates over windows that end now, and series for charts. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Final

from kvstore.cli.top.rates import Rates, Sample
from kvstore.protocol.statistics import DaemonStats, SessionStats

__all__ = ["History"]

_MOST_SAMPLES: Final = 4096
_ENOUGH: Final = 0.9
"""Share of a window that samples must cover to speak for it: polls are never exactly on time."""

_SESSION_WINDOW_S: Final = 3.0
_MOST_SESSION_SAMPLES: Final = 8


class History:
    """What was seen of one endpoint, across restarts of the daemon behind it.

    Mutated by ``add`` only. The oldest samples are forgotten; 4096 of them are an hour at the usual interval.
    """

    def __init__(self, most_samples: int = _MOST_SAMPLES) -> None:
        self._samples: deque[Sample] = deque(maxlen=most_samples)
        self._sessions: deque[tuple[float, dict[int, int]]] = deque(maxlen=_MOST_SESSION_SAMPLES)

    def __len__(self) -> int:
        return len(self._samples)

    def copy(self) -> History:
        """What is known now; it stays as it is."""
        made = History()
        made._samples, made._sessions = self._samples.copy(), self._sessions.copy()
        return made

    def add(self, stats: DaemonStats, at_s: float) -> None:
        """Note a snapshot that arrived at ``at_s``; one that is no later than the last of its life is left out."""
        sample = Sample.of(stats, at_s)
        last = self._samples[-1] if self._samples else None
        if last is not None and last.incarnation == sample.incarnation and sample.uptime_s <= last.uptime_s:
            return
        if last is not None and last.incarnation != sample.incarnation:
            self._sessions.clear()
        self._samples.append(sample)
        self._sessions.append((stats.uptime_s, {one.session: one.requests for one in stats.sessions}))

    def latest(self) -> Rates | None:
        """Rates of the last interval; None until there are two samples of one life."""
        if len(self._samples) < 2:
            return None
        return Rates.between(self._samples[-2], self._samples[-1])

    def over(self, seconds: float) -> Rates | None:
        """Rates over the last ``seconds``, at least one interval; None while this life was seen for a shorter time."""
        if not self._samples:
            return None
        newest = self._samples[-1]
        found: Rates | None = None
        for sample in reversed(self._samples):
            if sample is newest:
                continue
            rates = Rates.between(sample, newest)
            if rates is None:
                break
            found = rates
            if rates.seconds >= seconds * _ENOUGH:
                return found
        return None

    def series(self, buckets: int, bucket_s: float) -> list[Rates | None]:
        """Rates of the last ``buckets`` stretches of ``bucket_s`` seconds, oldest first, None where nothing is known.

        Stretches begin at whole multiples of ``bucket_s`` on the samples' clock, so that a chart moves by whole
        columns; the last one is still going on.
        """
        series: list[Rates | None] = [None] * buckets
        if len(self._samples) < 2 or buckets < 1:
            return series
        last = math.floor(self._samples[-1].at_s / bucket_s)
        newer = self._samples[-1]
        for older in list(self._samples)[-2::-1]:
            at = buckets - 1 - (last - math.floor(newer.at_s / bucket_s))
            if at < 0:
                break
            rates = Rates.between(older, newer)
            if rates is not None:
                known = series[at]
                series[at] = rates if known is None else known + rates
            newer = older
        return series

    def requests_per_s(self, sessions: list[SessionStats]) -> Mapping[int, float]:
        """Requests a second of each session over the last seconds; without those that were not there before."""
        if len(self._sessions) < 2:
            return {}
        newest_s, newest = self._sessions[-1]
        older_s, older = self._sessions[-2]
        for earlier_s, earlier in list(self._sessions)[-2::-1]:
            older_s, older = earlier_s, earlier
            if newest_s - older_s >= _SESSION_WINDOW_S:
                break
        seconds = newest_s - older_s
        if seconds <= 0:
            return {}
        return {
            one.session: max(newest[one.session] - older[one.session], 0) / seconds
            for one in sessions
            if one.session in newest and one.session in older
        }
