"""Whether there is a store now: connected to in the background, again and again, and said once each time it changes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np

from kvstore.errors import InvalidArgument, KVStoreError, Throttled
from kvstore.protocol.keys import BlockKey
from kvstore_client.integrations.row_tier.counters import Counters

__all__ = ["CONNECTING", "DOWN", "UP", "Linked", "StoreLink"]

CONNECTING: Final = "connecting"
UP: Final = "up"
DOWN: Final = "down"

_FIRST_RETRY_S: Final = 0.05
_READY_S: Final = 0.02
_LOOK_S: Final = 1.0
"""How often an idle daemon is asked whether it is there."""

_JOIN_S: Final = 1.0
_log: Final = logging.getLogger("kvstore_client")


class Linked(Protocol):
    """What a link connects to: a ``TensorStore``, or several stores of one daemon."""

    @property
    def client(self) -> Any:
        """Asked whether the daemon is there."""

    @property
    def part(self) -> int:
        """Of a block, that this process stores."""

    def close(self) -> None:
        """End the connection."""


S = TypeVar("S", bound=Linked)


class StoreLink(Generic[S]):
    """The store of a tier, while there is one.

    A thread of its own connects, asks now and then, and connects again. Nobody else waits for a daemon that is not
    there.

    Args:
        connect: makes the store. ``InvalidArgument`` is final, anything else is tried again.
        ready: whether everything is known that ``connect`` needs; asked until it is.
        counters: ``state_changes`` are counted.
        retry_s: most seconds between attempts.
        timeout_s: of one operation.
        what: who says it, in the log.

    Attributes:
        state: ``connecting`` until the first attempt ended, ``up`` or ``down``.
    """

    def __init__(
        self,
        connect: Callable[[], S],
        counters: Counters,
        *,
        ready: Callable[[], bool] = lambda: True,
        retry_s: float = 2.0,
        timeout_s: float = 2.0,
        what: str = "kvstore tier",
    ) -> None:
        self.state = CONNECTING
        self._what = what
        self._connect, self._ready = connect, ready
        self._counters = counters
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._final = False
        self._invalidations = 0
        """That are due: nothing is served before they are done."""
        self._store: S | None = None
        self._thread = threading.Thread(target=self._run, name="kvstore-tier-link", daemon=True)
        self._thread.start()

    @property
    def store(self) -> S | None:
        """The store, None where there is none now."""
        return self._store if self.state == UP else None

    def find(self, keys: Sequence[BlockKey]) -> list[bool] | None:
        """Whether blocks are there, from mapped memory, in microseconds; None where the daemon has to be asked.

        No block that cannot be seen now (written this moment, or of another generation) is there.
        """
        store = self.store
        if store is None:
            return [False] * len(keys)
        mapped = store.client._mapped
        if mapped is None:
            return None
        from kvstore_client.mapped_batches import fidelities

        words = np.frombuffer(b"".join(keys), np.int64).reshape(-1, 4)
        return [level >= 0 for level in fidelities(mapped, words, store.part).tolist()]

    def failed(self, error: BaseException) -> None:
        """Say that an operation ended with an error; where that means that there is no store, there is none now."""
        if isinstance(error, (Throttled, InvalidArgument)):
            return
        if not isinstance(error, KVStoreError):
            _log.error("%s: a transfer failed: %r", self._what, error, exc_info=error)
            return
        self._change(DOWN, str(error))
        self._wake.set()

    def invalidate(self) -> None:
        """Move the namespace on to its next generation; until that is done there is no store."""
        with self._lock:
            self._invalidations += 1
            if self.state == UP:
                self.state = CONNECTING
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Connect no more and close the store; whether the thread ended."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._closing and not self._ready():
                time.sleep(_READY_S)
            pause_s = _FIRST_RETRY_S
            while not self._closing:
                good = self._attempt()
                pause_s = _FIRST_RETRY_S if good else min(2 * pause_s, self._retry_s)
                if self._final:
                    return
                self._wake.wait(_LOOK_S if good else pause_s)
                self._wake.clear()
        except Exception as error:
            _log.error("%s: connecting ended: %r", self._what, error, exc_info=error)
            self._change(DOWN, str(error))
        finally:
            store, self._store = self._store, None
            if store is not None:
                store.close()

    def _attempt(self) -> bool:
        """Connect, or ask whether the connection is still good."""
        try:
            if self._store is None:
                self._store = self._connect()
            else:
                self._store.client.ping()
            due = self._invalidations
            if due:
                self._store.client.invalidate()
        except Throttled:
            return self.state == UP
        except InvalidArgument as error:
            self._final = True
            self._change(DOWN, f"{error}; it is not tried again")
            return False
        except KVStoreError as error:
            self._change(DOWN, str(error))
            return False
        with self._lock:
            self._invalidations -= due
        self._change(UP, "")
        return True

    def _change(self, state: str, why: str) -> None:
        """Say it once; a store that is down has to answer a ping before it is up again."""
        with self._lock:
            if self.state == state or self._closing or (state == UP and self._invalidations):
                return
            self.state = state
        self._counters.add("state_changes", state)
        if state == UP:
            store = self._store
            how = "" if store is None or store.client.mapped else f" over the socket ({store.client.unmapped})"
            _log.warning("%s: connected to %s%s", self._what, store.client.endpoint if store else "", how)
        else:
            _log.warning("%s: no store, the engine goes on without it: %s", self._what, why)
