"""The connector's half in vLLM's scheduler: what is there, what is to be loaded, what is to be saved."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vllm.v1.request import RequestStatus

from kvstore_client.client import Match
from kvstore_client.integrations.reachable import Reachable
from kvstore_client.integrations.vllm.messages import LoadJob, SaveJob, StepJobs, StepReport
from kvstore_client.integrations.vllm.model import EngineModel, open_store
from kvstore_client.integrations.vllm.settings import ConnectorSettings
from kvstore_client.integrations.vllm.stats import ConnectorStats
from kvstore_client.tensors import TensorStore
from kvstore_kernels.codecs import get_codec

__all__ = ["SchedulerHalf"]

_log: Final = logging.getLogger("kvstore_client")
_FRESH: Final = 0.5
"""Part of a lease's time after which a hit is looked for again before it is relied on."""


@dataclass(slots=True)
class _Request:
    """What is known of a request of the engine's.

    Attributes:
        request: vLLM's.
        match: hits that are kept for it, and until when.
        matched_keys: number of keys that the match was made for.
        local_tokens: that the engine had itself when it asked.
        handed: store blocks, from the prompt's first, that were handed to be saved or came from the store.
        open_jobs: saves that workers have not reported.
        savable: False where its KV may mix two generations of weights.
    """

    request: Any
    match: Match | None = None
    matched_keys: int = -1
    match_until: float = 0.0
    local_tokens: int = 0
    handed: int = 0
    open_jobs: set[int] = field(default_factory=set)
    savable: bool = True


@dataclass(slots=True)
class _Load:
    """A load whose end not all workers reported.

    Attributes:
        request_id: whose.
        first: its first store block.
        pages: of KV group 0 that it writes.
        missing: workers that did not report.
    """

    request_id: str
    first: int
    pages: frozenset[int]
    missing: int


class SchedulerHalf:
    """Answers vLLM's scheduler; waits for the daemon no longer than ``deadline_s``, and not at all where it is away.

    Args:
        settings: the user's.
        model: as both halves know it.
        loads, saves: whether this engine may load and save (its ``kv_role``).
    """

    def __init__(self, settings: ConnectorSettings, model: EngineModel, *, loads: bool, saves: bool) -> None:
        self._settings = settings
        self._model = model
        self._loads = loads
        self._saves = saves
        self._lossy = not get_codec(settings.codec).exact
        self._async_load = settings.load == "async" or model.table_groups > 1
        self._store: Reachable[TensorStore] = Reachable(
            "kvstore connector (scheduler)",
            lambda: open_store(settings, model, 0, settings.deadline_s),
            retry_s=settings.retry_s,
            log=_log,
        )
        self._requests: dict[str, _Request] = {}
        self._jobs: dict[int, tuple[str, int]] = {}
        """Saves that are not reported by all workers: the request, and how many reports are missing."""
        self._loading: dict[int, _Load] = {}
        self._unsure: Counter[int] = Counter()
        """Pages of KV group 0 under loads whose end is not known: nothing computed on them is saved yet."""
        self._ended: dict[str, tuple[Sequence[Sequence[int]], int]] = {}
        """Requests that ended, with blocks to be saved still: their tables and computed tokens."""
        self._next_job = 1
        self._planned: list[LoadJob] = []
        self._finished: set[str] = set()
        self.stats = ConnectorStats()

    def connect(self) -> bool:
        """Try to reach the daemon now; whether it is there."""
        return self._store.call(lambda store: store.client.ping() >= 0, False)

    def close(self) -> None:
        """Say goodbye."""
        self._store.close()

    # -------------------------------------------------------------- looking up

    def new_request(self, request: Any) -> None:
        """A request came."""
        self._requests[request.request_id] = _Request(request)

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int, bool]:
        """Tokens behind the engine's own ones that can be loaded, and whether they are between steps."""
        state = self._state(request)
        state.local_tokens = computed_tokens
        if not self._loads or request.skip_reading_prefix_cache:
            return 0, False
        size = self._model.block_tokens
        # One token at least is left to be computed: its output is what the engine is after.
        keys = self._keys(request, 0, (request.num_tokens - 1) // size)
        if len(keys) * size - computed_tokens < max(1, self._settings.least_load_tokens):
            self._release(state)
            return 0, False
        match = self._match(state, keys)
        tokens = 0 if match is None else len(match) * size - computed_tokens
        if tokens < max(1, self._settings.least_load_tokens):
            self._release(state)
            return 0, False
        return tokens, self._async_load

    def _match(self, state: _Request, keys: Sequence[bytes]) -> Match | None:
        now = time.monotonic()
        if state.match is not None and state.matched_keys == len(keys) and now < state.match_until:
            return state.match
        self._release(state)
        lease_s = self._settings.lease_s
        begin = time.perf_counter()
        found: Match | None = self._store.call(lambda store: store.match(keys, lease=lease_s, prefetch=True), None)
        self.stats.add("lookups", 1)
        self.stats.add("lookup_s", time.perf_counter() - begin)
        if found is None:
            self.stats.add("lookups_unserved", 1)
            return None
        self.stats.add("blocks_asked", len(keys))
        self.stats.add("blocks_hit", len(found))
        state.match, state.matched_keys, state.match_until = found, len(keys), now + lease_s * _FRESH
        return found

    def _release(self, state: _Request) -> None:
        match, state.match = state.match, None
        if match is not None and match.lease:
            self._store.call(lambda _: match.release(), None)

    def _keys(self, request: Any, first: int, end: int) -> tuple[bytes, ...]:
        """Keys of a request's store blocks, as far as it has them: each the hash of its last block of vLLM's."""
        step = self._model.block_tokens // self._model.hash_tokens
        return tuple(key_of(each) for each in request.block_hashes[(first + 1) * step - 1 : end * step : step])

    def _state(self, request: Any) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = _Request(request)
        return state

    # -------------------------------------------------------------- planning

    def allocated(self, request: Any, tables: Sequence[Sequence[int]], external_tokens: int) -> None:
        """The engine has blocks for a request: plan the load of ``external_tokens`` behind its own ones."""
        state = self._state(request)
        if not external_tokens:
            # Also the second call for a load between steps, which is over then.
            self._release(state)
            return
        size = self._model.block_tokens
        local = state.local_tokens
        end = (local + external_tokens) // size
        first = local // size
        pages = self._pages(tables, first, end)
        skip = local - first * size
        number, self._next_job = self._next_job, self._next_job + 1
        self._planned.append(
            LoadJob(
                number,
                request.request_id,
                self._keys(request, first, end),
                pages,
                skip,
                self._pages(tables, first - 1, first)[0][-1] if first else 0,
                not self._async_load,
            )
        )
        written = frozenset(pages[0][skip // self._model.groups[0].page_tokens :])
        self._loading[number] = _Load(request.request_id, first, written, self._model.workers)
        self._unsure.update(written)
        # What comes from the store is in it: saving begins behind it.
        state.handed = max(state.handed, end)

    def _pages(self, tables: Sequence[Sequence[int]], first: int, end: int) -> tuple[tuple[int, ...], ...]:
        pages = []
        for group in self._model.groups:
            step = self._model.block_tokens // group.page_tokens
            pages.append(tuple(tables[group.index][first * step : end * step]))
        return tuple(pages)

    def step(self, output: Any) -> StepJobs:
        """What the workers have to do in this step; resets what was planned for it."""
        loads, self._planned = self._planned, []
        store = self._store.store
        jobs = StepJobs(generation=-1 if store is None else store.client.generation, loads=loads)
        preempted = output.preempted_req_ids or ()
        if preempted:
            jobs.flush = frozenset(
                number for name in preempted if name in self._requests for number in self._requests[name].open_jobs
            )
        block_state = output.kv_connector_block_state
        for name, computed in _computed(output):
            state = self._requests.get(name)
            tables = None if block_state is None or not self._saves else block_state.get_block_ids(name)
            scheduled = output.num_scheduled_tokens[name]
            prompt = 0 if state is None else max(0, min(scheduled, state.request.num_prompt_tokens - computed))
            jobs.prefill_tokens += prompt
            jobs.other_tokens += scheduled - prompt
            if state is not None and tables is not None:
                after = computed + scheduled
                self._plan_marks(jobs, tables, computed, after)
                self._plan_saves(jobs, state, tables, after)
        for name, (tables, computed) in list(self._ended.items()):
            state = self._requests[name]
            if self._plan_saves(jobs, state, tables, computed):
                del self._ended[name]
                self._finished.add(name)
        jobs.finished, self._finished = frozenset(self._finished), set()
        return jobs

    def _plan_marks(self, jobs: StepJobs, tables: Sequence[Sequence[int]], before: int, after: int) -> None:
        """Tell workers which pages the step writes, where what stands before them may be lossy."""
        if not self._lossy:
            return
        group = self._model.groups[0]
        table = tables[group.index]
        first = before // group.page_tokens
        written = tuple(table[first : -(-after // group.page_tokens)])
        if before % group.page_tokens == 0 or len(written) > 1:
            jobs.computed.append((table[first - 1] if first else 0, written))

    def _plan_saves(self, jobs: StepJobs, state: _Request, tables: Sequence[Sequence[int]], computed: int) -> bool:
        """Hand out the store blocks whose tokens are known, and computed after this step.

        Returns:
            False where it is not known yet whether what they were computed on was loaded.
        """
        first, end = state.handed, self._complete(state, computed)
        if end <= first:
            return True
        if self._unsure and not self._unsure.keys().isdisjoint(self._pages(tables, 0, end)[0]):
            return False
        pages = self._pages(tables, first, end)
        size = self._model.block_tokens
        for each, group in zip(pages, self._model.groups, strict=True):
            if len(each) != (end - first) * (size // group.page_tokens) or 0 in each:
                # Out of its window already: without all its groups a block is of no use, nor is what follows it.
                state.savable = False
                return True
        request = state.request
        number, self._next_job = self._next_job, self._next_job + 1
        jobs.saves.append(
            SaveJob(
                number,
                request.request_id,
                self._keys(request, first, end),
                self._keys(request, first - 1, first)[0] if first else None,
                pages,
                jobs.generation,
            )
        )
        state.handed = end
        state.open_jobs.add(number)
        self._jobs[number] = (request.request_id, self._model.workers)
        return True

    def _complete(self, state: _Request, computed: int) -> int:
        """Store blocks of a request, from its first, that can be saved once so many tokens are computed."""
        if not self._saves or not state.savable:
            return 0
        request = state.request
        limit = request.num_prompt_tokens if self._settings.save_tokens == "prompt" else computed
        known = len(request.block_hashes) * self._model.hash_tokens
        return int(min(computed, limit, known)) // self._model.block_tokens

    # -------------------------------------------------------------- what became of it

    def reported(self, report: StepReport | None) -> None:
        """Take over what workers report."""
        if report is None:
            return
        for number, workers in report.saved.items():
            name, missing = self._jobs.get(number, ("", 0))
            if missing > workers:
                self._jobs[number] = (name, missing - workers)
                continue
            self._jobs.pop(number, None)
            state = self._requests.get(name)
            if state is not None:
                state.open_jobs.discard(number)
                if state.request.is_finished() and not state.open_jobs and name not in self._ended:
                    self._forget(name)
        for number, workers in report.loaded.items():
            load = self._loading.get(number)
            if load is None:
                continue
            state = self._requests.get(load.request_id)
            if number in report.failed:
                if state is not None:
                    # What was to come from the store will be computed, and can be saved then.
                    state.handed = min(state.handed, load.first)
                self._drop_ended(load.pages)
            load.missing -= workers
            if load.missing <= 0:
                del self._loading[number]
                self._unsure -= Counter(load.pages)
                if state is not None:
                    self._release(state)

    def _drop_ended(self, pages: frozenset[int]) -> None:
        """Requests that ended before their load failed are not computed again: what they hold is worth nothing."""
        group = self._model.groups[0].index
        for name, (tables, _) in list(self._ended.items()):
            if not pages.isdisjoint(tables[group]):
                del self._ended[name]
                self._finished.add(name)

    def finished(self, request: Any, tables: Sequence[Sequence[int]]) -> bool:
        """A request ended; whether its blocks must be kept until its saves are done."""
        state = self._requests.get(request.request_id)
        if state is None:
            return False
        if request.status == RequestStatus.FINISHED_ERROR:
            # Its load failed and vLLM was not told to compute it.
            state.savable = False
        if request.num_computed_tokens and self._complete(state, request.num_computed_tokens) > state.handed:
            # Of its last step: handed out with the next one.
            self._ended[request.request_id] = [list(table) for table in tables], request.num_computed_tokens
            return True
        if state.open_jobs:
            self._finished.add(request.request_id)
            return True
        self._forget(request.request_id)
        return False

    def _forget(self, name: str) -> None:
        state = self._requests.pop(name, None)
        if state is not None:
            self._release(state)

    def reset(self) -> bool:
        """The weights changed, or all caches are to be empty: nothing stored before counts any more."""
        for state in self._requests.values():
            state.savable = False
            self._release(state)

        def invalidate(store: TensorStore) -> bool:
            store.client.invalidate()
            return True

        done = self._store.call(invalidate, False)
        if not done:
            _log.error(
                "kvstore connector: the daemon cannot be reached, so what it has of the old weights still counts: "
                "reset the prefix cache again when it is there"
            )
        return done


def key_of(block_hash: bytes) -> bytes:
    """The store's key of one of vLLM's block hashes: itself where it is a sha256, else spread over 32 bytes."""
    if len(block_hash) == 32:
        return bytes(block_hash)
    from hashlib import sha256

    return sha256(b"vllm block hash\0" + bytes(block_hash)).digest()


def _computed(output: Any) -> Iterable[tuple[str, int]]:
    """Requests of this step and their tokens that were computed before it."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
