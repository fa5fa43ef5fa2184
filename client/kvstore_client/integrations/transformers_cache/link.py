"""A store that may be away: what fails because of that is left out, said once, and tried again after a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from kvstore.errors import ForkedClient, InvalidArgument, KVStoreError, Throttled
from kvstore_client.tensors import TensorStore

__all__ = ["PAUSE_S", "StoreLink"]

PAUSE_S: Final = 5.0
"""So long nothing is asked of a daemon that could not be reached: generation goes on at full speed."""

_log: Final = logging.getLogger("kvstore_client")
T = TypeVar("T")


class StoreLink:
    """The store of tensors, as long as there is one. Thread-safe.

    Args:
        connect: makes it.
        required: whether it must be there now.

    Attributes:
        store: None as long as none was reached.
        missed: pieces of work that were left out.

    Raises:
        InvalidArgument: what ``connect`` says is wrong.
        KVStoreError: it cannot be reached, and is required.
    """

    def __init__(self, connect: Callable[[], TensorStore], *, required: bool) -> None:
        self.store: TensorStore | None = None
        self.missed = 0
        self._connect = connect
        self._lock = threading.Lock()
        self._away_until = 0.0
        self._away = False
        try:
            self.store = connect()
        except (InvalidArgument, ForkedClient):
            raise
        except KVStoreError as error:
            if required:
                raise
            self._lost(error)

    def reach(self) -> TensorStore:
        """The store, connected to now where it was not yet.

        Raises:
            KVStoreError: it cannot be reached.
        """
        with self._lock:
            if self.store is None:
                self.store = self._connect()
            return self.store

    def attempt(self, work: Callable[[TensorStore], T]) -> T | None:
        """Do something with the store; None where that cannot be now.

        Raises:
            InvalidArgument, ForkedClient: the work is wrong, whether the store is there or not.
        """
        if time.monotonic() >= self._away_until:
            try:
                done = work(self.reach())
            except (InvalidArgument, ForkedClient):
                raise
            except Throttled as error:
                _log.info("the store is busy: %s", str(error))
            except KVStoreError as error:
                self._lost(error)
            else:
                self._found()
                return done
        with self._lock:
            self.missed += 1
        return None

    def close(self) -> None:
        """Close the connection."""
        if self.store is not None:
            self.store.close()

    def _lost(self, error: KVStoreError) -> None:
        with self._lock:
            said, self._away = self._away, True
            self._away_until = time.monotonic() + PAUSE_S
        if not said:
            # As text: a record that is kept would keep the error, its frames, and with them the memory that was mapped.
            _log.warning("going on without the store, which is tried again after %g s: %s", PAUSE_S, str(error))

    def _found(self) -> None:
        with self._lock:
            said, self._away = self._away, False
        if said:
            _log.warning("the store is there again")
