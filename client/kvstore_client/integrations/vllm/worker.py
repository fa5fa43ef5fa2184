"""The connector's half in a worker: loads into, and saves from, the pages of its KV cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from kvstore.errors import ProtocolMismatch
from kvstore_client.integrations.prefill_times import CpuMark, CudaMark, PrefillTimes
from kvstore_client.integrations.reachable import Reachable
from kvstore_client.integrations.vllm.caches import GroupCache
from kvstore_client.integrations.vllm.messages import LoadJob, SaveJob, StepJobs, StepReport
from kvstore_client.integrations.vllm.model import EngineModel, open_store
from kvstore_client.integrations.vllm.settings import ConnectorSettings
from kvstore_client.integrations.vllm.stats import ConnectorStats
from kvstore_client.tensors import LoadReport, TensorStore

__all__ = ["WorkerHalf"]

_log: Final = logging.getLogger("kvstore_client")
_EXACT: Final = 255


class WorkerHalf:
    """Carries out a step's jobs, in the step or on threads of its own.

    Args:
        settings: the user's.
        model: as both halves know it.
    """

    def __init__(self, settings: ConnectorSettings, model: EngineModel) -> None:
        self._settings = settings
        self._model = model
        self._stores: list[Reachable[TensorStore]] = [
            Reachable(
                f"kvstore connector (worker, KV group {index})" if index else "kvstore connector (worker)",
                partial(open_store, settings, model, index, settings.transfer_timeout_s),
                retry_s=settings.retry_s,
                log=_log,
            )
            for index in range(len(model.groups))
        ]
        self._caches: list[GroupCache] = []
        # Pages that a window left behind are given to other requests while a save could still read them.
        self._async_save = settings.save == "async" and not model.window
        self._savers = ThreadPoolExecutor(1, "kvstore-save")
        self._loaders = ThreadPoolExecutor(1, "kvstore-load")
        self._saving: dict[int, tuple[SaveJob, Future[None]]] = {}
        self._loading: dict[str, tuple[LoadJob, Future[int]]] = {}
        self._awaited: set[str] = set()
        self._invalid: set[int] = set()
        self._failed: set[str] = set()
        self._generation = -1
        self._fidelity = np.full(0, _EXACT, np.uint8)
        """Of what stands in each page of KV group 0 and before it: 255 where all of it is exact."""
        self._report = StepReport()
        self._prefill: PrefillTimes | None = None
        self.stats = ConnectorStats()

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take over the tensors, and connect: what has to be compiled is compiled before the first request.

        Raises:
            InvalidArgument: the tensors are not what vLLM says of them, or the codec does not take them.
        """
        self._caches = [GroupCache.of(group, kv_caches) for group in self._model.groups]
        self._fidelity = np.full(self._caches[0].pages.num_pages, _EXACT, np.uint8)
        if self._settings.report_prefill and self._model.times_prefill:
            self._prefill = PrefillTimes(CudaMark if _on_cuda(self._caches[0]) else CpuMark)
        for cache, store in zip(self._caches, self._stores, strict=True):
            store.call(partial(TensorStore.prepare, kv=cache.spare), None)

    def close(self) -> None:
        """End the threads, after what they do now, and say goodbye."""
        self._savers.shutdown(wait=True, cancel_futures=True)
        self._loaders.shutdown(wait=True, cancel_futures=True)
        for store in self._stores:
            store.close()

    # -------------------------------------------------------------- a step

    def begin(self, jobs: StepJobs) -> None:
        """Before anything of a step: pages that will be used for something else are left alone from here on."""
        for number in jobs.flush:
            self._abandon(number)
        if jobs.generation > self._generation:
            self._join(jobs.generation)

    def _abandon(self, number: int) -> None:
        """Have a save not happen; where it happens now, wait for its end, which the store's timeout bounds."""
        known = self._saving.get(number)
        if known is None:
            return
        if not known[1].cancel():
            known[1].exception()

    def _join(self, generation: int) -> None:
        """The weights changed: blocks saved from here on are of the next generation."""
        before, self._generation = self._generation, generation
        if before < 0:
            return

        def join(store: TensorStore) -> None:
            if store.client.generation < generation:
                store.client.invalidate()

        for number in list(self._saving):
            self._abandon(number)
        for store in self._stores:
            store.call(join, None)

    def compute(self, jobs: StepJobs) -> None:
        """The step begins to compute, unless it waits for loads first."""
        # Read once: a thread takes it away where the daemon has no use for it.
        times = self._prefill
        if times is not None:
            times.begin(jobs.prefill_tokens, jobs.other_tokens)

    def load(self, jobs: StepJobs) -> None:
        """Begin the loads of a step; those that it computes on are over when this returns."""
        for job in jobs.loads:
            if job.wait:
                self._loaded(job, self._load(job, None))
            else:
                self._loading[job.request_id] = job, self._loaders.submit(self._load, job, _event(self._caches[0]))
        if any(job.wait for job in jobs.loads):
            # vLLM computes after it where it waits for a load, and before it elsewhere.
            self.compute(jobs)

    def save(self, jobs: StepJobs) -> None:
        """Begin the saves of a step, whose KV is computed (or queued on the device's current stream)."""
        times = self._prefill
        if times is not None:
            times.end()
            measured = times.take()
            if measured is not None:
                self._savers.submit(self._tell_prefill, *measured)
        for before, written in jobs.computed:
            self._mark(before, written)
        for job in jobs.saves:
            if not self._model.writes:
                self._report.saved[job.number] += 1
            else:
                lineage = self._lineage(job.pages[0][-1])
                event = _event(self._caches[0])
                if self._async_save:
                    self._saving[job.number] = job, self._savers.submit(self._save, job, lineage, event)
                else:
                    self._save(job, lineage, event)
                    self._report.saved[job.number] += 1
        self._awaited |= jobs.finished

    def over(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose saves are done, whose loads are over, and those of them whose loads failed."""
        for number, (_, future) in list(self._saving.items()):
            if future.done():
                del self._saving[number]
                self._report.saved[number] += 1
                if not future.cancelled() and future.exception() is not None:
                    _log.error("kvstore connector: a save failed", exc_info=future.exception())
        busy = {job.request_id for job, _ in self._saving.values()}
        sent = self._awaited - busy
        self._awaited -= sent
        received = set()
        for name, (job, load) in list(self._loading.items()):
            if load.done():
                del self._loading[name]
                error = load.exception()
                if error is not None:
                    _log.error("kvstore connector: a load failed", exc_info=error)
                self._loaded(job, 0 if error is not None else load.result())
                received.add(name)
        failed, self._failed = self._failed & received, self._failed - received
        return sent, received, failed

    def take_invalid(self) -> set[int]:
        """Pages that should have been loaded and were not, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> StepReport | None:
        """What happened since the last call."""
        if not self._report:
            return None
        report, self._report = self._report, StepReport()
        return report

    # -------------------------------------------------------------- loading

    def _load(self, job: LoadJob, event: Any) -> int:
        """Load a job's blocks for all KV groups; how many leading ones are there."""
        begin = time.perf_counter()
        good = len(job.keys)
        lineage = self._lineage(job.before)
        fidelity = np.full(good, lineage, np.uint8)
        for index, cache in enumerate(self._caches):
            loaded, levels = self._load_group(job, index, cache, lineage, event)
            good = min(good, loaded)
            fidelity[: len(levels)] = np.minimum(fidelity[: len(levels)], levels)
        fidelity = np.minimum.accumulate(fidelity) if good else fidelity
        step = self._caches[0].block_pages
        skip = job.skip_tokens // self._model.groups[0].page_tokens
        pages = np.array(job.pages[0][: good * step], np.int64)
        levels_by_page = np.repeat(fidelity[:good], step)
        self._fidelity[pages[skip:]] = levels_by_page[skip:]
        self.stats.add("blocks_loaded", good)
        self.stats.add("load_s", time.perf_counter() - begin)
        return good

    def _load_group(
        self, job: LoadJob, index: int, cache: GroupCache, lineage: int, event: Any
    ) -> tuple[int, list[int]]:
        """Load one KV group's part: whole blocks straight into pages, others through the spare block.

        Of a window's group, blocks without pages are not needed.
        """
        step = cache.block_pages
        pages = np.array(job.pages[index], np.int64).reshape(len(job.keys), step)
        wanted = pages != 0
        if job.skip_tokens:
            wanted[0, : job.skip_tokens // self._model.groups[index].page_tokens] = False
        levels: list[int] = []
        at = 0
        while at < len(job.keys):
            row = wanted[at]
            if not row.any():
                levels.append(_EXACT)
                at += 1
                continue
            whole = int(np.argmin(np.append(wanted[at:].all(axis=1), False)))
            if whole:
                report = self._ask_load(
                    index, job.keys[at : at + whole], cache.pages, pages[at : at + whole], lineage, event
                )
            else:
                whole = 1
                spare = np.arange(step).reshape(1, step)
                report = self._ask_load(index, job.keys[at : at + 1], cache.spare, spare, lineage, event)
                if report is not None and report.loaded:
                    places = np.flatnonzero(row)
                    cache.copy_spare(places.tolist(), pages[at][places].tolist())
            if report is None:
                return at, levels
            levels += report.fidelities
            self.stats.add("loaded_bytes", report.raw_bytes)
            self.stats.add("loaded_stored_bytes", report.stored_bytes)
            at += report.loaded
            if report.loaded < whole:
                _log.warning(
                    "kvstore connector: %d of %d blocks of request %s could not be loaded: %s",
                    len(job.keys) - at,
                    len(job.keys),
                    job.request_id,
                    report.detail,
                )
                return at, levels
        return at, levels

    def _ask_load(
        self, index: int, keys: tuple[bytes, ...], target: Any, pages: Any, lineage: int, event: Any
    ) -> LoadReport | None:
        def load(store: TensorStore) -> LoadReport:
            with _stream(event) as stream:
                return store.load_blocks(keys, target, pages=pages, lineage=lineage, stream=stream)

        return self._stores[index].call(load, None)

    def _loaded(self, job: LoadJob, good: int) -> None:
        """Take over how a load ended."""
        self._report.loaded[job.number] += 1
        if good == len(job.keys):
            return
        self.stats.add("load_failures", 1)
        self._report.failed.add(job.number)
        if len(self._caches) > 1 or self._model.table_groups > 1:
            self._failed.add(job.request_id)
            return
        begin = max(good * self._caches[0].block_pages, job.skip_tokens // self._model.groups[0].page_tokens)
        self._invalid |= set(job.pages[0][begin:])

    # -------------------------------------------------------------- saving

    def _save(self, job: SaveJob, lineage: int, event: Any) -> None:
        """Save a job's blocks of all KV groups."""
        begin = time.perf_counter()
        for index, cache in enumerate(self._caches):
            pages = np.array(job.pages[index], np.int64).reshape(len(job.keys), cache.block_pages)

            def save(store: TensorStore, cache: GroupCache = cache, pages: Any = pages) -> Any:
                if job.generation >= 0 and store.client.generation != job.generation:
                    return None
                with _stream(event) as stream:
                    return store.save_blocks(
                        job.keys, cache.pages, pages=pages, parent=job.parent, lineage=lineage, stream=stream
                    )

            report = self._stores[index].call(save, None)
            if report is None:
                self.stats.add("save_failures", 1)
                return
            self.stats.add("blocks_saved", report.stored)
            self.stats.add("blocks_known", report.exists)
            self.stats.add("blocks_refused", len(job.keys) - report.stored - report.exists)
            self.stats.add("blocks_void", len(report.void))
            self.stats.add("saved_bytes", report.raw_bytes)
            self.stats.add("saved_stored_bytes", report.stored_bytes)
        self.stats.add("save_s", time.perf_counter() - begin)

    def _tell_prefill(self, tokens: int, seconds: float) -> None:
        """Tell the daemon how fast prompts are computed."""

        def tell(store: TensorStore) -> None:
            try:
                store.client.report_prefill(tokens, seconds)
            except ProtocolMismatch:
                # It is too old to have a use for it, which is no reason to do without it.
                self._prefill = None

        self._stores[0].call(tell, None)

    # -------------------------------------------------------------- fidelity

    def _lineage(self, page: int) -> int:
        """The effective fidelity of what stands in a page and before it; page 0 is no page."""
        return int(self._fidelity[page]) if page else _EXACT

    def _mark(self, before: int, written: tuple[int, ...]) -> None:
        """Pages that a step writes are as good as what stands before them."""
        self._fidelity[np.array(written, np.int64)] = self._lineage(before)


def _on_cuda(cache: GroupCache) -> bool:
    return bool(cache.tensors[0].device.type == "cuda")


def _event(cache: GroupCache) -> Any:
    """A mark in the device's current stream, None on the CPU."""
    if not _on_cuda(cache):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


class _stream:
    """A stream whose work comes after a mark, as the handle that a store takes; None on the CPU. Done when it ends."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self._own: Any = None

    def __enter__(self) -> int | None:
        if self._event is None:
            return None
        self._own = torch.cuda.Stream()
        self._own.wait_event(self._event)
        return int(self._own.cuda_stream)

    def __exit__(self, *error: object) -> None:
        if self._own is not None:
            self._own.synchronize()
