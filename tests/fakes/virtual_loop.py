"""An event loop whose clock jumps: what waits for a time goes on at once, in the same order in every run.

Nothing from outside may be waited for: where no task can go on and no timer runs, ``NothingWillHappen`` is raised in
place of a hang.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any


class NothingWillHappen(AssertionError):
    """Every task waits for another one, for ever."""


class _Jumps(selectors.BaseSelector):
    """A selector without files: in place of waiting it moves the clock on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise NothingWillHappen("no task can go on and no timer runs")
        self.now_s += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._jumps = _Jumps()
        super().__init__(self._jumps)
        # The clock's resolution, or a timer could be due and not run.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._jumps.now_s

    def forget(self) -> None:
        """Run nothing of what was to be run: the process that wanted it is dead."""
        for handle in [*self._ready, *self._scheduled]:
            handle.cancel()
        self._ready.clear()
        self._scheduled.clear()
