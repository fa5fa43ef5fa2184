"""A storage backend of SGLang's HiCache: pages of its host pools into kvstore and back (``docs/sglang.md``).

SGLang imports this module by the name in ``--hicache-storage-backend-extra-config``, with
``--hicache-storage-backend dynamic``. Its background threads call; none of them waits for a daemon that is not there.
What needs no SGLang is in ``hicache``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from kvstore.errors import InvalidArgument, Throttled
from kvstore_client.integrations.hicache.host_pools import is_logical, page_tokens_of
from kvstore_client.integrations.hicache.identity import Identity
from kvstore_client.integrations.hicache.keys import key_of, keys_of, parent_of
from kvstore_client.integrations.hicache.page_stores import Loaded, PageStore, Saved
from kvstore_client.integrations.hicache.pool_hits import pool_hits
from kvstore_client.integrations.hicache.settings import HiCacheSettings
from kvstore_client.integrations.hicache.stores import (
    KV,
    VALUES,
    Pool,
    Stores,
    open_kv,
    open_pool,
    open_values,
    plan_kv,
    plan_pool,
)
from kvstore_client.integrations.hicache.values import Values
from kvstore_client.integrations.row_tier.counters import Counters
from kvstore_client.integrations.row_tier.link import CONNECTING, StoreLink
from kvstore_client.integrations.versions import require

_VERSION: Final = require("the kvstore HiCache backend", ("sglang",), at_least="0.5.23", below="0.5.24")

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolTransfer,
    PoolTransferResult,
)

__all__ = ["KVStoreHiCache"]

R = TypeVar("R")

_WHAT: Final = "kvstore HiCache"
_GRACE_S: Final = 2.0
_POLL_S: Final = 0.005
_SMALL_PAGE: Final = 16
_log: Final = logging.getLogger("kvstore_client")


class KVStoreHiCache(HiCacheStorage):
    """Pages of SGLang's host pools in a kvstore daemon.

    Thread-safe. No method raises but the constructor and the registration of pools, where a setting is wrong: what
    cannot be had is a miss, what cannot be stored is not, and both are counted.

    Args:
        storage_config: SGLang's.
        kwargs: SGLang's further arguments, of which there are none.

    Raises:
        InvalidArgument: a setting that is unknown or wrong, or ranks of a kind that this backend does not know.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        self._settings = settings = HiCacheSettings.parse(storage_config.extra_config)
        self._config = storage_config
        self._identity = Identity.of(storage_config, settings, _server_args(), _VERSION)
        self._writes = bool(storage_config.is_storage_writer)
        self._counters = Counters()
        self._speeds: dict[str, list[tuple[int, float]]] = {"prefetch": [], "backup": []}
        self._lock = threading.Lock()
        self._link: StoreLink[Stores] | None = None
        self._opens: dict[str, Callable[[], PageStore]] = {}
        self._pools: dict[str, Pool] = {}
        self._page_bytes: dict[str, int] = {}
        self._logical = False
        self._refused: InvalidArgument | None = None
        self._complained: set[str] = set()
        self._values = Values(self._counters)
        self._closed = False

    # -------------------------------------------------------------- host pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool of KV, and connect.

        Raises:
            InvalidArgument: the codec does not take its pages, or the daemon's namespace cannot be made of it.
        """
        super().register_mem_pool_host(mem_pool_host)
        self._logical = is_logical(mem_pool_host)
        tokens = page_tokens_of(mem_pool_host)
        described: dict[str, object] = {"class": type(mem_pool_host).__name__, "page_tokens": tokens}
        for name in ("layout", "dtype", "layer_num", "start_layer", "end_layer", "head_num", "head_dim"):
            described[name] = str(getattr(mem_pool_host, name, ""))
        self._opens[VALUES] = partial(open_values, self._identity, tokens, described)
        if not self._logical and self._settings.interface_v1:
            pool = self._pools[KV] = plan_kv(self._identity, mem_pool_host)
            self._opens[KV] = partial(open_kv, self._identity, pool)
            if tokens < _SMALL_PAGE:
                _log.warning(
                    "%s: pages of %d tokens are a record each, which costs more than it gives; start SGLang with "
                    "--page-size 64",
                    _WHAT,
                    tokens,
                )
        self._connect()

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take the host pool of a hybrid model's other state.

        Raises:
            InvalidArgument: its pages cannot be had.
        """
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = str(host_pool_name)
        if name == KV or is_logical(host_pool):
            return
        pool = plan_pool(self._identity, name, host_pool)
        if not pool.complete:
            _log.warning(
                "%s: pages of the pool %s are not stored: each tensor-parallel rank holds a part of them, and SGLang "
                "has one rank alone store them",
                _WHAT,
                name,
            )
        self._pools[name] = pool
        self._opens[name] = partial(open_pool, self._identity, pool)

    def _connect(self) -> None:
        """Begin to connect, and wait for the first attempt.

        Raises:
            InvalidArgument: it can never succeed.
        """
        if self._settings.mapped is not False:
            # On a machine's first use this compiles for half a minute: before any deadline runs.
            import kvstore_client.mapped_batches
            import kvstore_client.mapped_session  # noqa: F401
        settings = self._settings
        with self._lock:
            before, self._link = self._link, None
            if before is not None:
                before.close(settings.timeout_s + _GRACE_S)
            first = KV if KV in self._opens else VALUES
            self._opens.setdefault(VALUES, partial(open_values, self._identity, 1, {}))
            link = self._link = StoreLink(
                partial(self._open, first),
                self._counters,
                retry_s=settings.retry_s,
                timeout_s=settings.timeout_s,
                what=_WHAT,
            )
        end = time.monotonic() + settings.timeout_s + _GRACE_S
        while link.state == CONNECTING and time.monotonic() < end:
            time.sleep(_POLL_S)
        if self._refused is not None:
            raise self._refused

    def _open(self, first: str) -> Stores:
        try:
            return Stores(self._opens, first)
        except InvalidArgument as error:
            self._refused = error
            raise

    # -------------------------------------------------------------- pages of KV

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages are there, with the parts of all ranks."""
        name = KV if self._settings.interface_v1 else VALUES
        if not keys or (name == KV and self._logical):
            return 0
        hits = self._do("exists", 0, lambda stores: stores.of(name).match(keys_of(keys)))
        self._counters.add("exists", "hit", by=hits)
        self._counters.add("exists", "miss", by=len(keys) - hits)
        return hits

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Load pages into the host pool: true for leading ones that are there now."""
        if self._logical:
            return [True] * len(keys)
        return self._load(KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages of the host pool: true for those that are in the store now, or that another rank stores."""
        if self._logical or not self._writes:
            return [True] * len(keys)
        return self._save(KV, keys, host_indices, extra_info)

    def _load(self, name: str, keys: list[str], indices: Any) -> list[bool]:
        if not keys:
            return []
        begin = time.perf_counter()
        none = Loaded(0, "unavailable")
        done = self._do("load", none, lambda stores: stores.of(name).load(keys_of(keys), indices))
        self._counters.add("load", name, "pages", by=done.pages)
        self._counters.add("load", name, "stored_bytes", by=done.stored_bytes)
        if done.failure:
            self._counters.add("load", name, done.failure)
        if done.pages and name == KV:
            self._note("prefetch", done.pages, begin)
        return [True] * done.pages + [False] * (len(keys) - done.pages)

    def _save(self, name: str, keys: list[str], indices: Any, extra_info: Any) -> list[bool]:
        if not keys:
            return []
        begin = time.perf_counter()
        none = Saved([False] * len(keys), ["unavailable"] * len(keys))
        parent = parent_of(extra_info)
        done = self._do("save", none, lambda stores: stores.of(name).save(keys_of(keys), indices, parent))
        for result in done.results:
            self._counters.add("save", name, result)
        self._counters.add("save", name, "stored_bytes", by=done.stored_bytes)
        stored = done.results.count("stored")
        if stored and name == KV:
            self._note("backup", stored, begin)
        return done.there

    # -------------------------------------------------------------- pools of hybrid models

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Which prefixes KV and all other pools have."""
        none: PoolTransferResult = PoolTransferResult.empty()
        if not keys:
            return none
        # Of a pool that only numbers pages the others say what is there.
        kv_pages = len(keys) if self._logical else self.batch_exists(keys, extra_info)
        found = self._do("exists", none, lambda stores: self._find(stores, keys, kv_pages, pool_transfers or []))
        return found

    def _find(
        self, stores: Stores, keys: list[str], kv_pages: int, transfers: Sequence[PoolTransfer]
    ) -> PoolTransferResult:
        hits: dict[Any, int] = {KV: kv_pages} if kv_pages else {}
        restorable = list(range(1, kv_pages + 1))
        for transfer in transfers:
            if not restorable:
                break
            store = stores.of(str(transfer.name))

            def exists(names: Sequence[str], store: PageStore = store) -> list[bool]:
                return store.exists(keys_of(names))

            found = pool_hits(
                transfer.hit_policy.value,
                kv_pages,
                keys,
                transfer.keys,
                exists,
                block_pages=transfer.block_pages,
                group_pages=transfer.group_pages,
            )
            if found.pages:
                hits[transfer.name] = found.pages
            if found.restorable is not None:
                restorable = [pages for pages in restorable if pages in found.restorable]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Load pages of several pools; for each one, true for leading ones that are there now."""
        results: dict[str, list[bool]] = {}
        for transfer in transfers:
            name, keys = str(transfer.name), transfer.keys or []
            if name == KV:
                results[transfer.name] = self.batch_get_v1(keys, transfer.host_indices, extra_info)
            else:
                results[transfer.name] = self._load(name, keys, transfer.host_indices)
        return results

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Store pages of several pools; for each one, which are in the store now."""
        results: dict[str, list[bool]] = {}
        for transfer in transfers:
            name, keys = str(transfer.name), transfer.keys or []
            pool = self._pools.get(name)
            if name == KV:
                results[transfer.name] = self.batch_set_v1(keys, transfer.host_indices, extra_info)
            elif pool is not None and not pool.complete:
                self._counters.add("save", name, "incomplete", by=len(keys))
                results[transfer.name] = [False] * len(keys)
            elif pool is not None and pool.replicated and not self._writes:
                results[transfer.name] = [True] * len(keys)
            else:
                results[transfer.name] = self._save(name, keys, transfer.host_indices, extra_info)
        return results

    # -------------------------------------------------------------- tensors of the generic interface

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """A tensor that was set under this key: in ``target_location``, or a new one of bytes; None for a miss."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """Tensors that were set, up to the first that is not there; None for it and all after it."""
        if not keys:
            return []
        return self._do(
            "get",
            [None] * len(keys),
            lambda stores: self._values.get(stores.of(VALUES), keys_of(keys), target_locations),
        )

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep a tensor's bytes; whether they are in the store now."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Keep tensors' bytes; whether all are in the store now."""
        if not keys:
            return True
        if not self._writes:
            return True
        return self._do(
            "set", False, lambda stores: self._values.set(stores.of(VALUES), keys_of(keys), list(values or []))
        )

    def exists(self, key: str) -> bool:
        """Whether a tensor was set under this key, by all ranks that hold a part of it."""
        return self._do("exists", False, lambda stores: stores.of(VALUES).exists([key_of(key)])[0])

    # -------------------------------------------------------------- the store

    def _do(self, what: str, otherwise: R, work: Callable[[Stores], R]) -> R:
        """Do something with the stores where there are any; ``otherwise`` where there are not, or it fails."""
        link = self._link
        if link is None and not self._closed:
            # No host pool was registered: the generic interface alone is used.
            try:
                self._connect()
            except InvalidArgument as error:
                self._complain(error)
            link = self._link
        stores = None if link is None else link.store
        if link is None or stores is None:
            self._counters.add(what, "unavailable")
            return otherwise
        try:
            return work(stores)
        except Throttled:
            self._counters.add(what, "throttled")
        except InvalidArgument as error:
            self._counters.add(what, "refused")
            self._complain(error)
        except Exception as error:
            self._counters.add(what, "failed")
            link.failed(error)
        return otherwise

    def _complain(self, error: Exception) -> None:
        """Log an error, once."""
        text = str(error)
        if text not in self._complained and len(self._complained) < 100:
            self._complained.add(text)
            _log.error("%s: %s", _WHAT, text)

    def clear(self) -> bool:
        """Remove the pages of all pools, of all ranks; whether that was done."""

        def work(stores: Stores) -> bool:
            for name in self._opens:
                stores.of(name).client.clear()
            return True

        return self._do("clear", False, work)

    def counts(self) -> dict[str, float]:
        """What was counted so far: pages found, loaded and stored by pool, refusals, and how often the daemon went."""
        return self._counters.so_far()

    def get_stats(self) -> Any:
        """Pages and speeds of transfers since the last call, for SGLang's metrics; None where it keeps none."""
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            speeds, self._speeds = self._speeds, {"prefetch": [], "backup": []}
        metrics = StorageMetrics()
        for pages, gb_per_s in speeds["prefetch"]:
            metrics.prefetch_pgs.append(pages)
            metrics.prefetch_bandwidth.append(gb_per_s)
        for pages, gb_per_s in speeds["backup"]:
            metrics.backup_pgs.append(pages)
            metrics.backup_bandwidth.append(gb_per_s)
        return metrics

    def _note(self, what: str, pages: int, begin: float) -> None:
        if not self._config.enable_storage_metrics:
            return
        page_bytes = page_tokens_of(self.mem_pool_host) * getattr(self.mem_pool_host, "size_per_token", 0)
        seconds = max(time.perf_counter() - begin, 1e-9)
        with self._lock:
            self._speeds[what].append((pages, pages * page_bytes / seconds / 1e9))
            del self._speeds[what][:-_MOST_SPEEDS]

    def close(self) -> None:
        """End the connection; what comes later finds nothing. May be called again."""
        self._closed = True
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close(self._settings.timeout_s + _GRACE_S)


_MOST_SPEEDS: Final = 10_000
"""Transfers that are remembered while nobody asks for them."""


def _server_args() -> Any:
    """SGLang's arguments, None where there are none: outside of an engine."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:
        # Which error it is SGLang does not promise.
        return None
