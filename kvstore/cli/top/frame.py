"""What panels draw from: one snapshot, what came before it, and what the person at the keyboard chose. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from kvstore.cli.top.history import History
from kvstore.cli.top.rates import Rates
from kvstore.protocol.statistics import DaemonStats, SessionStats

__all__ = ["MINUTE_S", "TEN_S", "Frame", "Order"]

TEN_S: Final = 10.0
MINUTE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """Which column a table is sorted by: by its own order (usually the largest first), or the other way round."""

    column: str
    reverse: bool = False


@dataclass(frozen=True)
class Frame:
    """One state of everything on the screen.

    Attributes:
        stats: the snapshot.
        history: what came before it, this snapshot included.
        interval_s: between polls, by setting.
        took_s: how long the daemon took to answer.
        own_pid: this process, which is left out of the clients.
        needle: what rows of tables must contain, in lower case; "" for all rows.
        orders: by panel, where somebody chose one.
        charts: whether there is a past to draw.
    """

    stats: DaemonStats
    history: History
    interval_s: float = 1.0
    took_s: float = 0.0
    own_pid: int = 0
    needle: str = ""
    orders: Mapping[str, Order] = field(default_factory=dict)
    charts: bool = True

    @cached_property
    def now(self) -> Rates | None:
        """Over the last interval."""
        return self.history.latest()

    @cached_property
    def ten(self) -> Rates | None:
        """Over the last ten seconds."""
        return self.history.over(TEN_S)

    @cached_property
    def minute(self) -> Rates | None:
        """Over the last minute."""
        return self.history.over(MINUTE_S)

    @cached_property
    def clients(self) -> list[SessionStats]:
        """Sessions of others."""
        return [one for one in self.stats.sessions if one.pid != self.own_pid]

    @cached_property
    def requests_per_s(self) -> Mapping[int, float]:
        """By session, of those that were there before."""
        return self.history.requests_per_s(self.clients)
