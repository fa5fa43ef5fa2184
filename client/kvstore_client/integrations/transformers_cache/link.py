"""A store that may be away: what fails because of that is left out, said once, and tried again after a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from kvstore.errors import ForkedClient, InvalidArgument, KVStoreError, Throttled
from kvstore_client.integrations.absence import Absence
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
        self._absence = Absence(
            PAUSE_S,
            _log,
            lost=f"going on without the store, which is tried again after {PAUSE_S:g} s",
            back="the store is there again",
        )
        try:
            self.store = connect()
        except (InvalidArgument, ForkedClient):
            raise
        except KVStoreError as error:
            if required:
                raise
            self._absence.lost(error)

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
        if not self._absence.resting():
            try:
                done = work(self.reach())
            except (InvalidArgument, ForkedClient):
                raise
            except Throttled as error:
                _log.info("the store is busy: %s", str(error))
            except KVStoreError as error:
                self._absence.lost(error)
            else:
                self._absence.found()
                return done
        with self._lock:
            self.missed += 1
        return None

    def close(self) -> None:
        """Close the connection."""
        if self.store is not None:
            self.store.close()
