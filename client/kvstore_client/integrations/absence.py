"""Whether the daemon is away: after it failed it is left alone for a while, and each change is said once."""

from __future__ import annotations

import logging
import threading
import time

__all__ = ["Absence"]


class Absence:
    """A daemon as those see it that go on without it. Thread-safe.

    What an engine waits for a dead daemon is one timeout in ``retry_s``. One line is logged when it is lost and one
    when it is there again, whatever happens between.

    Args:
        retry_s: seconds without a try after one that failed.
        log: of the integration.
        lost: the line when it is lost; what was wrong is added.
        back: the line when it is there again.

    Attributes:
        away: whether it did not answer when it was asked last.
        losses: times that it was lost.
    """

    def __init__(self, retry_s: float, log: logging.Logger, *, lost: str, back: str) -> None:
        self.away = False
        self.losses = 0
        self._retry_s = retry_s
        self._log = log
        self._lost_line = lost
        self._back_line = back
        self._lock = threading.Lock()
        self._not_before = 0.0

    def resting(self) -> bool:
        """Whether it failed so lately that it is not asked now."""
        return time.monotonic() < self._not_before

    def lost(self, error: BaseException) -> None:
        """It did not answer."""
        with self._lock:
            self._not_before = time.monotonic() + self._retry_s
            first, self.away = not self.away, True
            self.losses += first
        if first:
            # As text: a record that is kept would keep the error, its frames, and with them the memory that was mapped.
            self._log.warning("%s: %s", self._lost_line, str(error))

    def found(self) -> None:
        """It answered."""
        if not self.away:
            return
        with self._lock:
            first, self.away = self.away, False
        if first:
            self._log.warning("%s", self._back_line)
