"""Stores of an engine that must go on when the daemon does not answer: away for a while, and used again by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from kvstore.errors import (
    ConnectionLost,
    DaemonUnavailable,
    DeadlineExceeded,
    PermissionRefused,
    ProtocolMismatch,
    RemoteError,
    Throttled,
)

__all__ = ["AWAY", "Reachable"]

AWAY = (
    ConnectionLost,
    DaemonUnavailable,
    DeadlineExceeded,
    PermissionRefused,
    ProtocolMismatch,
    RemoteError,
    Throttled,
)
"""What a daemon that cannot serve now raises. An argument that is wrong is not among them: it must be seen."""


class Closes(Protocol):
    """What can be closed, more than once."""

    def close(self) -> None:
        """Give everything back."""


S = TypeVar("S", bound=Closes)
R = TypeVar("R")


class Reachable(Generic[S]):
    """A store that is opened when it is first used, and left alone for a while after it failed.

    Thread-safe. One line is logged when the daemon is lost and one when it is there again, whatever happens between.

    Args:
        name: for the log, for example ``"vLLM connector, scheduler"``.
        open_store: makes the store; may raise one of ``AWAY``.
        retry_s: seconds without a try after one that failed: what an engine waits for a dead daemon is one timeout in
            that time.
        log: of the integration.

    Attributes:
        failures: calls that the daemon did not serve.
        skipped: calls that were not tried, since the daemon had just failed.
    """

    def __init__(self, name: str, open_store: Callable[[], S], *, retry_s: float, log: logging.Logger) -> None:
        self._name = name
        self._open = open_store
        self._retry_s = retry_s
        self._log = log
        self._lock = threading.Lock()
        self._store: S | None = None
        self._not_before = 0.0
        self._away = False
        self._closed = False
        self.failures = 0
        self.skipped = 0

    def call(self, use: Callable[[S], R], otherwise: R) -> R:
        """What ``use`` gives for the store, or ``otherwise`` where the daemon cannot be asked.

        Raises:
            InvalidArgument: of ``use``; a mistake is no absence.
        """
        if time.monotonic() < self._not_before:
            self.skipped += 1
            return otherwise
        try:
            result = use(self._opened())
        except AWAY as error:
            # Not now, but it is there: neither a reason to stop asking nor one to say that it is lost.
            self._failed(error, away=not isinstance(error, Throttled))
            return otherwise
        if self._away:
            self._back()
        return result

    @property
    def store(self) -> S | None:
        """The store, if it was opened; nothing is tried."""
        return self._store

    def close(self) -> None:
        """Close the store; it is not opened again."""
        with self._lock:
            self._closed = True
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def _opened(self) -> S:
        with self._lock:
            if self._closed:
                raise ConnectionLost(f"{self._name} is shut down")
            if self._store is None:
                self._store = self._open()
            return self._store

    def _failed(self, error: Exception, *, away: bool) -> None:
        with self._lock:
            self.failures += 1
            if not away or self._closed:
                return
            self._not_before = time.monotonic() + self._retry_s
            first, self._away = not self._away, True
        if first:
            self._log.warning(
                "%s goes on without the store, and tries again every %g s: %s", self._name, self._retry_s, error
            )

    def _back(self) -> None:
        with self._lock:
            first, self._away = self._away, False
        if first:
            self._log.warning("%s uses the store again", self._name)
