"""A secondary tier of vLLM's native offloading: rows of its CPU tier into kvstore and back (``docs/vllm-tier.md``).

vLLM imports this module by the name that its configuration says: ``{"type": "KVStoreTier", "module_path":
"kvstore_client.integrations.vllm_tier"}`` among the ``secondary_tiers`` of a ``TieringOffloadingSpec``. All methods run
in vLLM's scheduler and wait for nothing but ``drain_jobs`` and ``shutdown``, which have deadlines. Does not cover what
is in a row: see ``vllm_identity``; nor what the tier counts: ``vllm_tier_metrics``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final

from kvstore_client.integrations.row_tier.counters import Counters
from kvstore_client.integrations.row_tier.jobs import Jobs
from kvstore_client.integrations.row_tier.keys import Chain, Positions, block_key, chains
from kvstore_client.integrations.row_tier.leases import Leases
from kvstore_client.integrations.row_tier.link import CONNECTING, DOWN, UP, StoreLink
from kvstore_client.integrations.row_tier.lookups import Answer, Lookups
from kvstore_client.integrations.row_tier.rows import Loaded, Rows, Stored, load_rows, store_rows
from kvstore_client.integrations.row_tier.settings import TierSettings
from kvstore_client.integrations.vllm_identity import element_of, tier_version
from kvstore_client.tensors import TensorStore

tier_version()

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats  # noqa: E402
from vllm.v1.kv_offload.base import (  # noqa: E402
    Locality,
    LookupResult,
    Medium,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob  # noqa: E402

from kvstore_client.integrations.vllm_store import (  # noqa: E402
    check_engine,
    current_vllm_config,
    hashes_are_known,
    load_compiled,
    open_store,
)
from kvstore_client.integrations.vllm_tier_metrics import metric_definitions, stats_of  # noqa: E402

__all__ = ["KVStoreTier"]

_OF_THE_FACTORY: Final = ("type", "module_path", "backpressure")
"""Keys of a tier's configuration that vLLM takes out before it makes the tier."""

_GRACE_S: Final = 2.0
"""Beyond an operation's timeout, for what a thread does after it."""

_YIELD_S: Final = 0.0002

_ANSWERS: Final = {Answer.HIT: LookupResult.HIT, Answer.MISS: LookupResult.MISS, Answer.LATER: LookupResult.RETRY}


@dataclass(slots=True)
class _Request:
    """What is remembered of a request until it ends.

    Attributes:
        positions: which of its blocks ends where.
        failed: blocks that were there and could not be loaded: for this request they are misses.
        waits: blocks without an answer, and when they count as misses.
        loads: jobs of it that are not done.
    """

    positions: Positions = field(default_factory=Positions)
    failed: set[OffloadKey] = field(default_factory=set)
    waits: dict[OffloadKey, float] = field(default_factory=dict)
    loads: int = 0


class KVStoreTier(SecondaryTierManager):
    """Rows of vLLM's CPU tier in a kvstore daemon.

    Args:
        offloading_spec: vLLM's, with an ``OffloadingConfig``.
        primary_kv_view: ``[rows, row bytes]`` of single bytes.
        tier_type: as configured.
        backpressure_detector: vLLM's.
        config: see ``TierSettings``.

    Raises:
        InvalidArgument: a setting that is unknown or wrong.
    """

    medium: ClassVar[Medium | None] = Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **config: Any,
    ) -> None:
        self._settings = settings = TierSettings.parse(config)
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.LOCAL
        self._config = offloading_spec.config
        self._vllm_config = current_vllm_config()
        check_engine(settings, self._config, self._vllm_config)
        chunk_blocks = self._config.cache.blocks_per_chunk
        self._block_tokens = {group.group_id: group.tokens_per_block * chunk_blocks for group in self._config.groups}
        self._rows = Rows(
            primary_kv_view, element_of(self._config.model.dtype), next(iter(self._block_tokens.values()), 1)
        )
        load_compiled(settings)
        self._counters = Counters()
        self._requests: dict[str, _Request] = {}
        self._promised: dict[str, list[bytes]] = {}
        """Blocks that requests were told are there in this step, and that are not leased yet."""
        self._job_keys: dict[int, tuple[str, list[OffloadKey]]] = {}
        self._closed = False
        queued = settings.queued_stores or max(self._rows.count // 4, 1)
        self._link = StoreLink(
            self._connect,
            self._counters,
            ready=lambda: bool(self._requests) or hashes_are_known(),
            retry_s=settings.retry_s,
            timeout_s=settings.timeout_s,
        )
        self._lookups = Lookups(self._ask)
        self._leases = Leases(self._client, self._link.failed, self._counters, settings.lease_s)
        self._jobs: Jobs[Loaded | Stored] = Jobs(settings.threads, queued, settings.job_timeout_s)

    # -------------------------------------------------------------- the store

    def _connect(self) -> TensorStore:
        """Make the store. In the link's thread, once block hashes are known."""
        return open_store(self._settings, self._config, self._vllm_config, self._rows)

    def _client(self) -> Any:
        store = self._link.store
        return None if store is None else store.client

    def _ask(self, keys: Any) -> list[bool]:
        """Ask the daemon for blocks. In the lookups' thread."""
        client = self._client()
        if client is None:
            return [False] * len(keys)
        try:
            return list(client.exists(keys))
        except Exception as error:
            self._link.failed(error)
            raise

    # -------------------------------------------------------------- lookups

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk is there; ``RETRY`` until the daemon said it where memory does not, or time is up."""
        request = self._request(req_context)
        request.positions.note(key, req_context.get_offload_key_position(key))
        if key in request.failed:
            return self._counted(LookupResult.MISS, "failed")
        name = block_key(key)
        state = self._link.state
        if state == DOWN:
            return self._counted(LookupResult.MISS, "down")
        found = self._link.find([name]) if state == UP else None
        if found is not None:
            result = LookupResult.HIT if found[0] else LookupResult.MISS
        elif state == CONNECTING:
            result = LookupResult.RETRY
        else:
            result = _ANSWERS[self._lookups.look_up(name, req_context.req_id)]
        if result is LookupResult.RETRY:
            now = time.monotonic()
            if now >= request.waits.setdefault(key, now + self._settings.lookup_timeout_s):
                return self._counted(LookupResult.MISS, "timeout")
            return self._counted(result, "retry")
        request.waits.pop(key, None)
        if result is LookupResult.HIT:
            self._promised.setdefault(req_context.req_id, []).append(name)
            return self._counted(result, "hit")
        return self._counted(result, "miss")

    def _counted(self, result: LookupResult, why: str) -> LookupResult:
        self._counters.add("lookups", why)
        return result

    def _request(self, req_context: ReqContext) -> _Request:
        request = self._requests.get(req_context.req_id)
        if request is None:
            request = self._requests[req_context.req_id] = _Request()
        return request

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Have the store count an access to chunks that need not be loaded."""
        if self._link.state == UP:
            self._leases.touch([block_key(key) for key in keys])

    # -------------------------------------------------------------- jobs

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Queue chunks for the store; fails at once where there is none, or too much waits already."""
        job, context = job_metadata, job_metadata.req_context
        keys = list(job.keys)
        self._job_keys[job.job_id] = context.req_id, keys
        if self._link.state == DOWN:
            self._jobs.fail(job.job_id, False, Stored(dict.fromkeys(keys, "unavailable")))
            return
        request = self._request(context)
        for key in keys:
            request.positions.note(key, context.get_offload_key_position(key))
        wanted = chains(
            keys,
            [int(row) for row in job.chunk_ids],
            context.get_offload_key_position,
            self._block_tokens,
            partial(_before, request.positions, context),
        )
        if not self._jobs.submit(job.job_id, False, len(keys), partial(self._store, wanted)):
            self._jobs.fail(job.job_id, False, Stored(dict.fromkeys(keys, "queue_full")))

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Queue chunks to be loaded into their rows."""
        job, request = job_metadata, self._request(job_metadata.req_context)
        keys = list(job.keys)
        self._job_keys[job.job_id] = job.req_context.req_id, keys
        self._lease_promised()
        request.loads += 1
        pairs = [(key, block_key(key)) for key in keys]
        rows = [int(row) for row in job.chunk_ids]
        if not self._jobs.submit(job.job_id, True, len(keys), partial(self._load, pairs, rows)):
            self._jobs.fail(job.job_id, True, Loaded(failed=dict.fromkeys(keys, "cancelled")))

    def _store(self, wanted: list[Chain], ended: Callable[[], bool]) -> Stored:
        """Store chunks. In a job's thread."""
        store = self._wait_for_store(ended)
        if store is None:
            return Stored({key: "unavailable" for chain in wanted for key in chain.offload_keys})
        done = store_rows(store, self._rows.paged, wanted, ended)
        if done.error is not None:
            self._link.failed(done.error)
        return done

    def _load(self, pairs: list[tuple[OffloadKey, bytes]], rows: list[int], ended: Callable[[], bool]) -> Loaded:
        """Load chunks. In a job's thread."""
        store = self._wait_for_store(ended)
        if store is None:
            return Loaded(failed={key: "unavailable" for key, _ in pairs})
        done = load_rows(store, self._rows.paged, pairs, rows, ended)
        if done.error is not None:
            self._link.failed(done.error)
        return done

    def _wait_for_store(self, ended: Callable[[], bool]) -> TensorStore | None:
        """The store; waits for it while it is connected to for the first time."""
        while self._link.state == CONNECTING and not ended():
            time.sleep(0.01)
        return self._link.store

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Jobs that ended since the last call; of loads, which chunks are in their rows."""
        results = []
        for job in self._jobs.take_finished():
            name, keys = self._job_keys.pop(job.identity)
            done = job.result
            if job.is_load:
                loaded = done if isinstance(done, Loaded) else Loaded(failed=dict.fromkeys(keys, "cancelled"))
                results.append(self._load_ended(job.identity, name, loaded, job.seconds))
            else:
                stored = done if isinstance(done, Stored) else Stored(dict.fromkeys(keys, "cancelled"))
                for result in stored.results.values():
                    self._counters.add("chunks", "store", result)
                self._counters.add("stored_bytes", "store", by=stored.stored_bytes)
                good = sum(result in ("stored", "exists") for result in stored.results.values())
                size = good * self._rows.row_bytes
                results.append(JobResult(job.identity, stored.complete, None, job.seconds, size))
        return results

    def _load_ended(self, identity: int, name: str, loaded: Loaded, seconds: float) -> JobResult:
        self._counters.add("chunks", "load", "loaded", by=len(loaded.keys))
        for why in loaded.failed.values():
            self._counters.add("chunks", "load", why)
        self._counters.add("stored_bytes", "load", by=loaded.stored_bytes)
        request = self._requests.get(name)
        if request is not None:
            request.failed.update(loaded.failed)
            request.loads -= 1
            if not request.loads:
                self._leases.release(name)
        size = len(loaded.keys) * self._rows.row_bytes
        good = tuple(loaded.keys) if loaded.failed and loaded.keys else None
        return JobResult(identity, not loaded.failed, good, seconds, size)

    # -------------------------------------------------------------- requests and steps

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunks are stored as they are computed."""
        self._request(req_context)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Give back what was leased for a request, and forget it."""
        self._promised.pop(req_context.req_id, None)
        if self._requests.pop(req_context.req_id, None) is not None:
            self._lookups.forget(req_context.req_id)
            self._leases.release(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Ask for what was looked up in this step, and lease what was found."""
        self._lookups.flush()
        self._lease_promised()
        if self.has_pending_work():
            # An engine that only waits steps without a pause, and the threads that answer need the interpreter lock.
            time.sleep(_YIELD_S)

    def _lease_promised(self) -> None:
        for name, keys in self._promised.items():
            self._leases.promise(name, keys)
        self._promised.clear()

    def has_pending_work(self) -> bool:
        """Whether answers are on their way, or requests wait for the first connection."""
        return self._lookups.pending() or (
            self._link.state == CONNECTING and any(each.waits for each in self._requests.values())
        )

    # -------------------------------------------------------------- the end

    def drain_jobs(self) -> None:
        """Cancel jobs that wait, and wait for those that run. vLLM resets its caches then: see ``on_reset``.

        Raises:
            TimeoutError: one still runs, and touches the rows: they must not be used for anything else.
        """
        if not self._jobs.drain(self._patience_s):
            raise TimeoutError(
                f"kvstore tier: a transfer did not end within {self._patience_s:g} s (timeout_s and {_GRACE_S:g} s "
                "more); the CPU tier cannot be reset while it runs"
            )
        if self._settings.on_reset == "invalidate":
            self._link.invalidate()

    @property
    def _patience_s(self) -> float:
        return self._settings.timeout_s + _GRACE_S

    def shutdown(self) -> None:
        """End all threads and the connection.

        Raises:
            TimeoutError: a transfer still runs, and touches the rows.
        """
        if self._closed:
            return
        ended = self._jobs.close(self._patience_s)
        self._lookups.close(self._patience_s)
        self._leases.close(self._patience_s)
        self._link.close(self._patience_s)
        if not ended:
            raise TimeoutError(f"kvstore tier: a transfer did not end within {self._patience_s:g} s")
        self._closed = True

    # -------------------------------------------------------------- what it says of itself

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Metrics of this tier. Also the first place where a wrong setting is noticed."""
        TierSettings.parse({key: value for key, value in extra_config.items() if key not in _OF_THE_FACTORY})
        return metric_definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What was counted since the last call."""
        return stats_of(self._counters, self.tier_type, self._link.state == UP)

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """Labels of vLLM 0.33's info metric."""
        return ("kvstore_endpoint", "kvstore_codec")

    def config_info(self) -> dict[str, str]:
        """Their values."""
        return {
            "kvstore_endpoint": self._settings.endpoint or os.environ.get("KVSTORE_ENDPOINT") or "default",
            "kvstore_codec": self._settings.codec,
        }


def _before(positions: Positions, context: ReqContext, group: int, end_token: int) -> OffloadKey | None:
    """The block before another one: of those that were seen, else of all that vLLM knows of the request."""
    if end_token <= 0:
        return None
    key = positions.at(group, end_token)
    if key is None:
        positions.note_all(getattr(context, "_offload_key_positions", {}))
        key = positions.at(group, end_token)
    return None if key is None else OffloadKey(key)
