"""Connections to the daemon by place, made when they are first used, and whether the daemon is there."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvstore.errors import ConnectionLost, InvalidArgument, Throttled
from kvstore_client.client import Client
from kvstore_client.integrations.absence import Absence
from kvstore_client.integrations.l2_adapter.places import PIECE_BYTES, Place
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings
from kvstore_client.integrations.reachable import AWAY
from kvstore_client.tensors import TensorStore

__all__ = ["Session", "Sessions", "StoreAway", "connect"]

R = TypeVar("R")

_log: Final = logging.getLogger("kvstore_client")

_AWAY: Final = tuple(error for error in AWAY if error is not Throttled)
"""What a daemon that cannot serve raises. A wrong argument is no absence, nor is a daemon that is busy now."""


class StoreAway(Exception):
    """The daemon cannot be asked now; it was said in the log."""


@dataclass(frozen=True, slots=True)
class Session:
    """A connection in a namespace: with tensors where a codec stores them, else without."""

    client: Client
    tensors: TensorStore | None = None

    def close(self) -> None:
        """End it; may be called again."""
        self.client.close()


def connect(place: Place, settings: AdapterSettings) -> Session:
    """Connect to a place.

    Raises:
        DaemonUnavailable, and what ``Client`` raises: why not.
        InvalidArgument: the model has no revision and must have one.
    """
    namespace = place.namespace
    if settings.unknown_revision == "refuse" and not namespace.revision:
        raise InvalidArgument(
            f"model {namespace.model!r} has no revision of its weights, and unknown_revision is 'refuse': set revision "
            "in adapter_params to a commit or a checksum"
        )
    if place.layout is None:
        client = Client(
            settings.endpoint,
            namespace=namespace,
            mapped=settings.mapped,
            timeout=settings.timeout_s,
            payload_bytes=(min(place.object_bytes, PIECE_BYTES),) if place.object_bytes else (),
            unknown_revision="ignore",
            directory=settings.directory,
        )
        return Session(client)
    store = TensorStore(
        place.layout,
        settings.codec,
        model=namespace.model,
        revision=namespace.revision,
        name=namespace.name,
        least_block_tokens=1,
        threads=settings.codec_threads,
        endpoint=settings.endpoint,
        mapped=settings.mapped,
        timeout=settings.timeout_s,
        unknown_revision="ignore",
        directory=settings.directory,
    )
    return Session(store.client, store)


@dataclass(slots=True)
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)
    session: Session | None = None
    users: int = 0


class Sessions:
    """Open connections, the least recently used of which is closed where there are too many.

    Thread-safe. Stores have connections of their own: their copies keep no lookup waiting. After an error that says
    that the daemon is not there nobody asks it for ``retry_s``, see ``Absence``.

    Args:
        settings: of the adapter.
        connect: makes a connection.

    Attributes:
        failures: operations that it did not answer.
        skipped: operations that were not tried, because it had just failed.
    """

    def __init__(
        self, settings: AdapterSettings, connect: Callable[[Place, AdapterSettings], Session] = connect
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._lock = threading.Lock()
        self._slots: OrderedDict[tuple[Place, bool], _Slot] = OrderedDict()
        self._warned: set[str] = set()
        self._absence = Absence(
            settings.retry_s,
            _log,
            lost="kvstore L2 adapter: no store, LMCache goes on without it and tries again every "
            f"{settings.retry_s:g} s",
            back="kvstore L2 adapter: the store is there again",
        )
        self._closed = False
        self.failures = self.skipped = 0

    @property
    def away(self) -> bool:
        """Whether the daemon did not answer when it was asked last."""
        return self._absence.away

    @property
    def losses(self) -> int:
        """Times that it was lost."""
        return self._absence.losses

    def use(self, place: Place, work: Callable[[Session], R], *, writes: bool = False) -> R:
        """Do something in a session.

        Raises:
            StoreAway: the daemon cannot be asked now.
            InvalidArgument, Throttled: of the work, or of connecting.
        """
        slot, idle = self._take(place, writes)
        for session in idle:
            session.close()
        try:
            if self._absence.resting() or self._closed:
                self.skipped += 1
                raise StoreAway
            result = work(self._session(slot, place))
        except _AWAY as error:
            self._failed(error)
            raise StoreAway from error
        finally:
            with self._lock:
                slot.users -= 1
        self._absence.found()
        return result

    def connected(self) -> list[tuple[Place, Session]]:
        """Open sessions for reads, with their places."""
        with self._lock:
            return [
                (place, slot.session)
                for (place, writes), slot in self._slots.items()
                if not writes and slot.session is not None
            ]

    def close(self) -> None:
        """Close all sessions; none is opened again."""
        with self._lock:
            self._closed = True
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            with slot.lock:
                session, slot.session = slot.session, None
            if session is not None:
                session.close()

    def _take(self, place: Place, writes: bool) -> tuple[_Slot, list[Session]]:
        """The slot of a place, with one more user; and sessions that have to be closed for it."""
        idle: list[Session] = []
        with self._lock:
            slot = self._slots.setdefault((place, writes), _Slot())
            self._slots.move_to_end((place, writes))
            slot.users += 1
            for which, other in list(self._slots.items()):
                if len(self._slots) <= 2 * self._settings.layouts:
                    break
                if not other.users:
                    del self._slots[which]
                    if other.session is not None:
                        idle.append(other.session)
        return slot, idle

    def _session(self, slot: _Slot, place: Place) -> Session:
        with slot.lock:
            if self._closed:
                raise ConnectionLost("the adapter is closed")
            if slot.session is None:
                if self._absence.resting():
                    # Others waited here for a connection that was not made.
                    self.skipped += 1
                    raise StoreAway
                self._warn_of_revision(place)
                try:
                    slot.session = self._connect(place, self._settings)
                except _AWAY as error:
                    self._failed(error)
                    raise StoreAway from error
            return slot.session

    def _warn_of_revision(self, place: Place) -> None:
        model = place.namespace.model
        with self._lock:
            if self._settings.unknown_revision != "warn" or place.namespace.revision or model in self._warned:
                return
            self._warned.add(model)
        _log.warning(
            "kvstore L2 adapter: nobody says the revision of the weights of %s: KV of other weights of that name would "
            "be taken for right; set revision in adapter_params",
            model,
        )

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.failures += 1
        if not self._closed:
            self._absence.lost(error)
