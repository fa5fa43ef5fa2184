"""LMCache's L2 in a kvstore daemon: ``--l2-adapter`` of type ``plugin``, class ``KVStoreL2Adapter``.

Covers what LMCache sees: tasks, event descriptors, bitmaps, listeners. What is done, and how, is in ``l2_adapter``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument, KVStoreError, Throttled
from kvstore.protocol.keys import BlockKey
from kvstore_client.client import Match
from kvstore_client.integrations.l2_adapter import lookups, transfers
from kvstore_client.integrations.l2_adapter.keys import Chains, Named, named
from kvstore_client.integrations.l2_adapter.locks import Locks
from kvstore_client.integrations.l2_adapter.places import ObjectLayout, Place, Places
from kvstore_client.integrations.l2_adapter.sessions import Session, Sessions, StoreAway
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings
from kvstore_client.integrations.l2_adapter.transfers import Loaded, Stored, Transfer
from kvstore_client.integrations.l2_adapter.workers import Results, Workers
from kvstore_client.integrations.versions import require

require("the LMCache L2 adapter", ("lmcache", "lmcache-cpu"), at_least="0.5.6", below="0.5.7")

from lmcache.lmcache_native import Bitmap  # noqa: E402
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.internal_api import L2StoreResult  # noqa: E402
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface  # noqa: E402
from lmcache.v1.memory_management import MemoryFormat, MemoryObj  # noqa: E402
from lmcache.v1.platform import create_event_notifier  # noqa: E402

__all__ = ["KVStoreL2Adapter"]

_log: Final = logging.getLogger("kvstore_client")

_QUEUED_BYTES: Final = 1 << 30
_LOG_EVERY_S: Final = 60.0
_MOST_TEXTS: Final = 64
_MOST_SIZES: Final = 1 << 18
"""Objects of which it is remembered that they were stored here, and how large they were."""

_SHAPED: Final = (MemoryFormat.KV_2LTD, MemoryFormat.KV_MLA_FMT, MemoryFormat.UNDEFINED)
"""Formats whose shape says what is where. Lookups are told shapes and no format, and take these for granted."""


class KVStoreL2Adapter(L2AdapterInterface):
    """Chunks of LMCache in a kvstore daemon.

    Thread-safe. No ``submit``, ``query`` or ``pop`` waits for the store; ``delete`` and ``close`` do, for a bounded
    time. A daemon that is not there costs misses and failed stores, never an error.

    Args:
        params: ``adapter_params``, see ``AdapterSettings``.
        l1_memory_desc: LMCache's own memory; its size bounds the stores that wait.

    Raises:
        InvalidArgument: a setting that is unknown or wrong.
    """

    def __init__(self, params: Mapping[str, Any] | AdapterSettings, l1_memory_desc: Any = None) -> None:
        super().__init__()
        settings = params if isinstance(params, AdapterSettings) else AdapterSettings.parse(params)
        self._settings = settings
        if settings.mapped is not False:
            # Compiled on a machine's first use, for half a minute: now, and not in a request.
            with contextlib.suppress(ImportError):
                import kvstore_client.mapped_session  # noqa: F401
        self._places = Places(settings, self._say)
        self._sessions = Sessions(settings)
        self._chains = Chains()
        self._locks = Locks()
        self._tasks = itertools.count(1)
        self._guard = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._said: dict[str, float] = {}
        self._sizes: OrderedDict[BlockKey, int] = OrderedDict()
        self._waiting_bytes = 0
        size = getattr(l1_memory_desc, "size", 0) or 0
        self._most_waiting = settings.queued_bytes or size // 4 or _QUEUED_BYTES
        self._notifiers = [create_event_notifier() for _ in range(3)]
        store, lookup, load = self._notifiers
        self._store_results: Results[Any] = Results(store.notify)
        self._lookup_results: Results[Any] = Results(lookup.notify)
        self._load_results: Results[Any] = Results(load.notify)
        self._stores = Workers("store", 1, settings.task_timeout_s)
        self._lookups = Workers("lookup", 1, settings.timeout_s)
        self._loads = Workers("load", settings.load_threads, settings.task_timeout_s)
        self._closed = False
        _log.info("kvstore L2 adapter: codec %s, namespace %s", settings.codec, settings.name)

    # -------------------------------------------------------------- event descriptors

    def get_store_event_fd(self) -> int:
        """Readable when a store ended."""
        return int(self._notifiers[0].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup ended."""
        return int(self._notifiers[1].fileno())

    def get_load_event_fd(self) -> int:
        """Readable when a load ended."""
        return int(self._notifiers[2].fileno())

    # -------------------------------------------------------------- stores

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Store objects; they must not change before the task ended. Fails at once where too much waits already."""
        task = next(self._tasks)
        size = sum(each.get_size() for each in objects)
        with self._guard:
            taken = not self._waiting_bytes or self._waiting_bytes + size <= self._most_waiting
            self._waiting_bytes += size if taken else 0
        if not taken:
            self._count("store_refused", len(keys))
            self._store_results.put(task, L2StoreResult(False, 0))
            self._say("stores come faster than they can be done, and some are left out")
        elif not self._stores.submit(partial(self._store, task, list(keys), list(objects), size)):
            self._store_results.put(task, L2StoreResult(False, 0))
        return task

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        """Stores that ended since the last time. One succeeded where all its objects are in the store now."""
        return self._store_results.take_all()

    def _store(
        self, task: int, keys: list[ObjectKey], objects: list[MemoryObj], size: int, ended: Callable[[], bool]
    ) -> None:
        done = Stored()
        sizes: dict[int, int] = {}
        names: list[Named] = []
        try:
            names = [named(key) for key in keys]
            for place, some in self._placed(names, objects, done.failed).items():
                sizes.update((each.position, each.data.nbytes) for each in some)
                work = partial(transfers.store, place=place, objects=some, chains=self._chains, ended=ended, done=done)
                self._attempt(place, work, some, done.failed, (done.stored, done.exists), writes=True)
        finally:
            complete = bool(names) and len(done.stored) + len(done.exists) == len(keys)
            self._count("stored", len(done.stored))
            self._count("exists", len(done.exists))
            self._count_failed("store", done.failed)
            written = sum(sizes[position] for position in done.stored)
            with self._guard:
                self._waiting_bytes -= size
                self._counts["stored_bytes"] += done.stored_bytes
                for position in done.stored:
                    self._sizes[names[position].key] = sizes[position]
                while len(self._sizes) > _MOST_SIZES:
                    self._sizes.popitem(last=False)
            try:
                if done.stored:
                    self._notify_keys_stored(
                        [keys[position] for position in done.stored], [sizes[position] for position in done.stored]
                    )
            finally:
                self._store_results.put(task, L2StoreResult(complete, written))

    # -------------------------------------------------------------- lookups

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Find objects and lease those that are there, any of them."""
        task = next(self._tasks)
        layouts = {
            group: tuple((tuple(shape), _dtype(dtype)) for shape, dtype in zip(desc.shapes, desc.dtypes, strict=True))
            for group, desc in group_layout_descs.items()
        }
        if not self._lookups.submit(partial(self._lookup, task, list(keys), layouts)):
            self._lookup_results.put(task, Bitmap(len(keys)))
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        """Which objects are there; given once."""
        return self._lookup_results.take(task_id)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Give leases back whose objects are all unlocked. Never fails: one that is not given back ends by its time."""
        matches = self._locks.unlock([named(key).key for key in keys])
        if matches:
            self._lookups.submit(partial(self._release, matches))

    def _lookup(
        self, task: int, keys: list[ObjectKey], layouts: dict[int, ObjectLayout], ended: Callable[[], bool]
    ) -> None:
        bitmap = Bitmap(len(keys))
        try:
            names = [named(key) for key in keys]
            found, sure = self._find(names, layouts, ended)
            for position in np.flatnonzero(found).tolist():
                bitmap.set(position)
            self._chains.learn(names, found)
            self._count("found", sum(found))
            self._count("missed", len(found) - sum(found))
            self._note_gone(keys, names, [at for at in range(len(keys)) if sure[at] and not found[at]])
        finally:
            self._lookup_results.put(task, bitmap)

    def _find(
        self, names: Sequence[Named], layouts: Mapping[int, ObjectLayout], ended: Callable[[], bool]
    ) -> tuple[list[bool], list[bool]]:
        """Whether each object is there, and whether the store said so."""
        found, sure = [False] * len(names), [False] * len(names)
        groups: dict[tuple[str, int], list[int]] = {}
        for position, name in enumerate(names):
            groups.setdefault((name.model, name.group), []).append(position)
        for (model, group), left in groups.items():
            for place in self._candidates(model, layouts.get(group, ())):
                if ended() or not left:
                    break
                work = partial(_find_in, [names[at].key for at in left], self._settings.lease_s, self._locks)
                try:
                    there, unlocked = self._sessions.use(place, work)
                except StoreAway:
                    self._count("lookup_unavailable", len(left))
                    break
                except Throttled:
                    self._count("lookup_throttled", len(left))
                    break
                except InvalidArgument as error:
                    self._say(str(error))
                    break
                self._count("unlocked", unlocked)
                for at, is_there in zip(left, there, strict=True):
                    found[at] = is_there
                left = [at for at, is_there in zip(left, there, strict=True) if not is_there]
            else:
                for at in groups[model, group]:
                    sure[at] = True
        return found, sure

    def _candidates(self, model: str, layout: ObjectLayout) -> list[Place]:
        """Where objects may lie: as their layout says, and flat, if LMCache serialised them; all where it says none."""
        flat = self._places.of(model, ())
        if not layout:
            return [flat, *(place for place in self._places.known(model) if place != flat)]
        place = self._places.of(model, layout)
        return [place] if place == flat else [place, flat]

    def _release(self, matches: Sequence[Match], ended: Callable[[], bool]) -> None:
        for match in matches:
            if self._sessions.away or ended():
                # Leases end with their session, or by their time.
                return
            with contextlib.suppress(KVStoreError):
                match.release()

    # -------------------------------------------------------------- loads

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Load objects into their memory, which must stay as it is until the task ended."""
        task = next(self._tasks)
        if not self._loads.submit(partial(self._load, task, list(keys), list(objects))):
            self._load_results.put(task, Bitmap(len(keys)))
        return task

    def query_load_result(self, task_id: int) -> Bitmap | None:
        """Which objects were loaded; given once. What stands in the memory of the others is unspecified."""
        return self._load_results.take(task_id)

    def _load(self, task: int, keys: list[ObjectKey], objects: list[MemoryObj], ended: Callable[[], bool]) -> None:
        bitmap = Bitmap(len(keys))
        done = Loaded()
        try:
            names = [named(key) for key in keys]
            for place, some in self._placed(names, objects, done.failed).items():
                request = self._locks.request(some[0].key)
                work = partial(transfers.load, place=place, objects=some, request=request, ended=ended, done=done)
                self._attempt(place, work, some, done.failed, (done.lengths,))
            for position, length in done.lengths.items():
                if length < objects[position].get_size():
                    objects[position].set_used_size(length)
                bitmap.set(position)
            if done.lengths:
                self._notify_keys_accessed([keys[position] for position in sorted(done.lengths)])
            self._note_gone(keys, names, [at for at, why in done.failed.items() if why == "miss"])
        finally:
            self._count("loaded", len(done.lengths))
            self._count("loaded_bytes", done.stored_bytes)
            self._count_failed("load", done.failed)
            self._load_results.put(task, bitmap)

    # -------------------------------------------------------------- what stores and loads share

    def _placed(
        self, names: Sequence[Named], objects: Sequence[MemoryObj], failed: dict[int, str]
    ) -> dict[Place, list[Transfer]]:
        """Objects by place, in their order."""
        placed: dict[Place, list[Transfer]] = {}
        if len(names) != len(objects):
            raise InvalidArgument(f"kvstore L2 adapter: {len(names)} keys but {len(objects)} objects")
        for position, (name, each) in enumerate(zip(names, objects, strict=True)):
            try:
                data = _bytes_of(each)
                place = self._places.of(name.model, _layout_of(each))
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                failed[position] = "memory"
                self._say(f"objects of {type(each).__name__} cannot be read as host memory: {error!r}")
                continue
            if place.object_bytes not in (0, data.nbytes):
                place = self._places.of(name.model, ())
            placed.setdefault(place, []).append(Transfer(position, name.key, data))
        return placed

    def _attempt(
        self,
        place: Place,
        work: Callable[[Session], None],
        some: Sequence[Transfer],
        failed: dict[int, str],
        good: Sequence[Any],
        *,
        writes: bool = False,
    ) -> None:
        """Do something for objects; what it did not come to has failed."""
        why = ""
        try:
            self._sessions.use(place, work, writes=writes)
        except StoreAway:
            why = "unavailable"
        except Throttled:
            why = "throttled"
        except InvalidArgument as error:
            why = "refused"
            self._say(str(error))
        if why:
            settled = {*failed, *itertools.chain.from_iterable(good)}
            failed.update((each.position, why) for each in some if each.position not in settled)

    def _note_gone(self, keys: Sequence[ObjectKey], names: Sequence[Named], missing: Sequence[int]) -> None:
        """Tell listeners of objects that were stored here, and that the daemon does not have any more."""
        with self._guard:
            gone = [(at, self._sizes.pop(names[at].key)) for at in missing if names[at].key in self._sizes]
        if gone:
            self._count("gone", len(gone))
            self._notify_keys_deleted([keys[at] for at, _ in gone], [size for _, size in gone])

    # -------------------------------------------------------------- the rest

    def delete(self, keys: list[ObjectKey]) -> None:
        """Remove objects, of any layout that this process has seen. Waits for the store."""
        names = [named(key) for key in keys]
        deleted: set[int] = set()
        for model in dict.fromkeys(name.model for name in names):
            at = [position for position, name in enumerate(names) if name.model == model]
            wanted = [names[position].key for position in at]
            for place in self._places.known(model):
                with contextlib.suppress(StoreAway, Throttled, InvalidArgument):
                    there = self._sessions.use(place, partial(_remove, wanted), writes=True)
                    deleted.update(position for position, was in zip(at, there, strict=True) if was)
        if deleted:
            with self._guard:
                sizes = {position: self._sizes.pop(names[position].key, 0) for position in sorted(deleted)}
            self._notify_keys_deleted([keys[position] for position in sizes], list(sizes.values()))

    def report_status(self) -> dict[str, Any]:
        """How it is; asks nobody."""
        sessions = self._sessions.connected()
        with self._guard:
            counts, waiting = dict(self._counts), self._waiting_bytes
        return {
            "is_healthy": not (self._sessions.away or self._closed),
            "type": type(self).__name__,
            "codec": self._settings.codec,
            "endpoint": sessions[0][1].client.endpoint if sessions else self._settings.endpoint,
            "mapped": all(session.client.mapped for _, session in sessions) if sessions else None,
            "unmapped": next((session.client.unmapped for _, session in sessions if session.client.unmapped), ""),
            "layouts": [
                {
                    "model": place.namespace.model,
                    "layout": place.namespace.layout,
                    "codec": self._settings.codec if place.layout is not None else "raw",
                    "not_encoded_because": place.reason,
                }
                for place, _ in sessions
            ],
            "locked_key_count": len(self._locks),
            "waiting_store_bytes": waiting,
            "losses": self._sessions.losses,
            "unanswered": self._sessions.failures,
            "not_asked": self._sessions.skipped,
            **counts,
        }

    def close(self) -> None:
        """End all tasks and connections; may be called again. Waits for what is under way, each for a bounded time."""
        if self._closed:
            return
        self._closed = True
        for workers in (self._stores, self._loads, self._lookups):
            workers.close()
        self._sessions.close()
        for notifier in self._notifiers:
            notifier.close()

    def _count(self, what: str, by: int) -> None:
        if by:
            with self._guard:
                self._counts[what] += by

    def _count_failed(self, kind: str, failed: Mapping[int, str]) -> None:
        for why, objects in Counter(failed.values()).items():
            self._count(f"{kind}_{why}", objects)

    def _say(self, text: str) -> None:
        """A line in the log, the same one now and then only."""
        now = time.monotonic()
        with self._guard:
            if now - self._said.get(text, -_LOG_EVERY_S) < _LOG_EVERY_S:
                return
            if len(self._said) >= _MOST_TEXTS:
                self._said.clear()
            self._said[text] = now
        _log.warning("kvstore L2 adapter: %s", text)


def _find_in(keys: list[BlockKey], lease_s: float, locks: Locks, session: Session) -> tuple[list[bool], int]:
    return lookups.find(session.client, keys, lease_s, locks.take)


def _remove(keys: list[BlockKey], session: Session) -> list[bool]:
    there = session.client.exists(keys)
    session.client.remove([key for key, is_there in zip(keys, there, strict=True) if is_there])
    return there


def _layout_of(each: MemoryObj) -> ObjectLayout:
    """Shapes and dtypes of an object, none where its shape does not say what is where."""
    meta = each.metadata
    if meta.fmt not in _SHAPED:
        return ()
    shapes, dtypes = meta.shapes or [meta.shape], meta.dtypes or [meta.dtype]
    return tuple((tuple(shape), _dtype(dtype)) for shape, dtype in zip(shapes, dtypes, strict=True))


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_of(each: MemoryObj) -> npt.NDArray[np.uint8]:
    """An object's own memory."""
    return np.frombuffer(each.byte_array, np.uint8)
