"""Stores of an engine that must go on when the daemon does not answer: away for a while, and used again by itself."""

from __future__ import annotations

import logging
import threading
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
from kvstore_client.integrations.absence import Absence

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

    Thread-safe; see ``Absence``.

    Args:
        name: for the log, for example ``"vLLM connector, scheduler"``.
        open_store: makes the store; may raise one of ``AWAY``.
        retry_s: seconds without a try after one that failed.
        log: of the integration.

    Attributes:
        failures: calls that the daemon did not serve.
        skipped: calls that were not tried, since the daemon had just failed.
    """

    def __init__(self, name: str, open_store: Callable[[], S], *, retry_s: float, log: logging.Logger) -> None:
        self._name = name
        self._open = open_store
        self._absence = Absence(
            retry_s,
            log,
            lost=f"{name} goes on without the store, and tries again every {retry_s:g} s",
            back=f"{name} uses the store again",
        )
        self._lock = threading.Lock()
        self._store: S | None = None
        self._closed = False
        self.failures = 0
        self.skipped = 0

    def call(self, use: Callable[[S], R], otherwise: R) -> R:
        """What ``use`` gives for the store, or ``otherwise`` where the daemon cannot be asked.

        Raises:
            InvalidArgument: of ``use``; a mistake is no absence.
        """
        if self._absence.resting():
            self.skipped += 1
            return otherwise
        try:
            result = use(self._opened())
        except AWAY as error:
            with self._lock:
                self.failures += 1
            # One that is busy is there: neither a reason to stop asking nor one to say that it is lost.
            if not isinstance(error, Throttled) and not self._closed:
                self._absence.lost(error)
            return otherwise
        self._absence.found()
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
