"""The daemon's life: start in an order that leaves nothing behind on failure, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

import kvstore
from kvstore.core.events import PopulationEnded, SlabPopulated, Ticked
from kvstore.core.journal import Journal
from kvstore.core.misses import Misses
from kvstore.core.pools import pooled
from kvstore.core.slabs import SlabAllocator
from kvstore.core.state import StoreLimits
from kvstore.core.store import Store
from kvstore.core.tenants import Tenant, tenants_of
from kvstore.errors import InvalidArgument, KVStoreError, SettingsError
from kvstore.format.constants import PAGE_BYTES
from kvstore.mapped.arena import FIRST_SLAB_PAGE, STATE_OFFSET, ArenaHeader, ArenaState
from kvstore.mapped.index_file import STATE_OFFSET as INDEX_STATE_OFFSET
from kvstore.mapped.index_file import IndexHeader, IndexState, bucket_count_for
from kvstore.observability.logs import Log, RepeatedLog, configure_logs, get_log
from kvstore.policy.admission import make_admission
from kvstore.policy.base import EvictionPolicy, PolicyContext
from kvstore.policy.curve import LiveCurve
from kvstore.policy.registry import make_policy
from kvstore.protocol.endpoint import default_arena_directory, default_directory, ipc_path
from kvstore.server.below import Below
from kvstore.server.counters import RequestCounters
from kvstore.server.descriptors import reserve_descriptors
from kvstore.server.events import EventPublisher
from kvstore.server.executor import Executor
from kvstore.server.gets import Reads
from kvstore.server.http import start_http
from kvstore.server.mapping import Mapping
from kvstore.server.outbound import Outbound
from kvstore.server.overload import Overload
from kvstore.server.population import Population, populate_first
from kvstore.server.puts import Puts
from kvstore.server.recorder import Recorder
from kvstore.server.requests import Requests
from kvstore.server.sessions import Sessions
from kvstore.server.ssd import SsdTier
from kvstore.server.statistics import Statistics
from kvstore.server.transport import RouterTransport
from kvstore.server.warming import WarmOutcome, Warmup, log_failure
from kvstore.settings import Settings
from kvstore.tiers.dram import Arena, automatic_slab_bytes, slab_count
from kvstore.tiers.files import Doorbell, OwnerLock, make_directory, read_text, remove_stale, require_socket_or_nothing
from kvstore.tiers.index import Index
from kvstore.tiers.memory import check_arena_fits

_TICK_S: Final = 1.0
_FILE_THREADS: Final = 2
_SAME_STOP_NS: Final = 500_000_000
"""Signals this close together are one wish to stop: runners signal a process and its group."""

_FRAME_SLACK_BYTES: Final = 8 << 20
_DIRECTORY_MODES: Final = {0o600: 0o700, 0o660: 0o750, 0o666: 0o755}
"""Whoever may open the files must be able to enter their directory; only the daemon writes into it."""


class Daemon:
    """One incarnation of the daemon on the running event loop.

    Everything that ``start`` acquires is released by ``stop``, in reverse order, also where ``start`` fails half-way.
    """

    def __init__(self, settings: Settings, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.settings = settings
        self._clock = clock
        self._log: Log = get_log()
        self._undo = contextlib.AsyncExitStack()
        self._ticker: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[WarmOutcome] | None = None
        self.ready = False
        self.problem = ""

    async def start(self) -> None:
        """Begin to serve.

        Raises:
            SettingsError, ResourceTaken, InsufficientMemory, PermissionRefused: why it cannot; nothing is left behind.
        """
        try:
            await self._start()
        except BaseException:
            await self._undo.aclose()
            raise

    async def _start(self) -> None:
        settings = self.settings
        loop = asyncio.get_running_loop()
        # For files that are written through aiofiles: a log, and a checkpoint beside it.
        loop.set_default_executor(ThreadPoolExecutor(_FILE_THREADS, "kvstore-files"))
        gid = settings.access.group_id if settings.access.group_id is not None else -1
        mode = settings.access.mode
        directory_mode = _DIRECTORY_MODES[mode]
        socket_path = ipc_path(settings.endpoint)
        if socket_path.parent == default_directory():
            make_directory(socket_path.parent, directory_mode, gid)
        elif not socket_path.parent.is_dir():
            raise SettingsError(
                f"endpoint {settings.endpoint}: the directory {socket_path.parent} does not exist; make it"
            )
        socket_lock = OwnerLock(
            Path(f"{socket_path}.lock"), f"the socket {socket_path}", "stop it, or choose another --endpoint"
        )
        self._undo.callback(socket_lock.release)
        require_socket_or_nothing(socket_path)
        directory = settings.dram.directory or default_arena_directory(settings.endpoint)
        existed = directory.is_dir()
        make_directory(directory, directory_mode, gid, private=settings.dram.directory is None)
        if not existed or settings.dram.directory is None:
            self._undo.callback(_remove_directory, directory)
        arena_lock = OwnerLock(
            directory / "owner.lock", f"the arena directory {directory}", "stop it, or choose another --arena-dir"
        )
        self._undo.callback(arena_lock.release)
        stale = remove_stale(directory, "arena-", (STATE_OFFSET, int(ArenaState.DEAD).to_bytes(4, "little")))
        remove_stale(directory, "index-", (INDEX_STATE_OFFSET, int(IndexState.DEAD).to_bytes(8, "little")))
        remove_stale(directory, "client-")
        remove_stale(directory, "doorbell-")
        if stale:
            self._log.warning("removed_stale_arena", directory=str(directory), why="a daemon did not stop cleanly")

        incarnation = secrets.randbits(62) | 1
        warmup = Warmup(settings.ssd.warm) if settings.ssd.directory is not None and settings.ssd.warm else None
        tier = await self._open_ssd()
        store, arena, index = self._make_store(directory, incarnation, mode, gid, tier)
        below_bytes = 0 if tier is None else settings.ssd.capacity_bytes or 0
        capacity_bytes = settings.dram.capacity_bytes
        curve = LiveCurve(capacity_bytes, self._clock, larger_bytes=capacity_bytes + below_bytes)
        store.watchers.append(curve)
        misses = None
        if settings.explain.memory_bytes:
            misses = Misses.watch(store, settings.explain.memory_bytes)
        executor = Executor(store, arena, self._clock, index)
        executor.apply(SlabPopulated(0))
        publisher = None
        if store.journal is not None:
            publisher = EventPublisher(
                store.journal,
                endpoint=settings.event_endpoints[0],
                replay_endpoint=settings.event_endpoints[1],
                topic=settings.events.topic,
                buffer_steps=settings.events.buffer_steps,
                hwm=settings.events.hwm,
                heartbeat_s=settings.events.heartbeat_s,
                incarnation=incarnation,
                mode=mode,
                gid=gid,
                wall_clock=time.time,
                log=RepeatedLog(self._log),
            )
            self._undo.callback(publisher.close)
        sessions = Sessions(
            directory,
            incarnation,
            settings.limits.max_sessions,
            int(settings.limits.session_idle_s * 1e9),
            mode,
            gid,
        )
        self._undo.callback(_close_session_files, sessions)
        counters = RequestCounters()
        outbound = Outbound(executor, settings.limits.outbound_bytes_per_session, loop.call_later)
        overload = Overload(settings.limits.max_queue_delay_ms)
        reads = Reads(executor, outbound, counters, settings.dram.verified_every, RepeatedLog(self._log))
        bell = None
        if index is not None:
            bell = Doorbell(directory / f"doorbell-{incarnation:016x}", mode & 0o622, gid)
            self._undo.callback(bell.close)
        below = None
        if tier is not None:
            tier.start(executor)
            self._undo.push_async_callback(tier.stop)
            below = Below(tier, executor, self._clock, lambda: curve.residence_s)
        mapping = Mapping(
            executor,
            sessions,
            bell,
            counters,
            reads,
            RepeatedLog(self._log),
            loop,
            self._clock,
            _hazard_bytes(settings),
            int(settings.limits.reclaim_grace_s * 1e9),
        )
        self._undo.callback(mapping.stop)
        recorder = Recorder(
            store,
            settings.recording_directory,
            settings.record.max_bytes,
            settings.record.files,
            self._clock,
            failed=self._recording_failed,
        )
        self._undo.push_async_callback(_end_recording, recorder)
        requests = Requests(
            executor=executor,
            sessions=sessions,
            outbound=outbound,
            overload=overload,
            reads=reads,
            puts=Puts(executor, counters, mapping.have_back),
            counters=counters,
            incarnation=incarnation,
            boot_id=read_text("/proc/sys/kernel/random/boot_id").strip(),
            max_lease_s=settings.limits.max_lease_s,
            pid=os.getpid(),
            mapping=mapping,
            below=below,
            recorder=recorder,
            hint_ns=int(settings.retention.hint_s * 1e9),
            clock=self._clock,
            log=self._log,
        )
        if tier is not None:
            tier.promotions.have_back = mapping.have_back
        mapping.end_session = requests.close_session
        transport = RouterTransport(
            settings.endpoint,
            max_frame_bytes=store.max_record_bytes + _FRAME_SLACK_BYTES,
            mode=mode,
            gid=gid,
            on_message=requests.on_message,
        )
        self._undo.callback(transport.close)
        self._undo.push_async_callback(requests.stop)
        self._statistics = Statistics(
            endpoint=settings.endpoint,
            incarnation=incarnation,
            started_ns=self._clock(),
            store=store,
            arena=arena,
            sessions=sessions,
            outbound=outbound,
            overload=overload,
            transport=transport,
            counters=counters,
            mapping=mapping,
            index=index,
            events=publisher,
            ssd=tier,
            curve=curve,
            misses=misses,
            recorder=recorder,
            below=below,
        )
        if settings.record.enabled:
            self._start_recording(recorder)
        requests.transport, requests.statistics = transport, self._statistics
        self._requests, self._executor, self._sessions, self._mapping = requests, executor, sessions, mapping
        self._tier = tier
        self._recorder = recorder

        http_address = "off"
        if settings.http != "off":
            http = await start_http(settings.http, lambda: self._statistics.snapshot(self._clock()), self._readiness)
            self._undo.push_async_callback(http.stop)
            http_address = http.address
        if publisher is not None:
            publisher.start(loop)
        transport.start(loop)
        self._ticker = asyncio.create_task(self._tick())
        self._undo.push_async_callback(self._end_ticker)
        population = Population(arena, loop, self._slab_populated, self._population_ended)
        population.start()
        self._undo.callback(population.stop)
        if below is not None and warmup is not None:
            self._warming = asyncio.create_task(warmup.run(below, store, self._clock, self._log))
            self._warming.add_done_callback(functools.partial(log_failure, self._log))
            self._undo.push_async_callback(self._end_warming)
        self.ready = True
        self._log.info(
            "ready",
            endpoint=settings.endpoint,
            http=http_address,
            capacity_bytes=settings.dram.capacity_bytes,
            arena=str(arena.path),
            policy=store.policy.name,
            version=kvstore.__version__,
            index=str(index.path) if index is not None else "none: dram.mapped is off",
            hbm="none: this version has no GPU tier",
            events=settings.event_endpoints[0] if publisher is not None else "off",
            **_told_of(tier),
        )

    def _policy(self, setting: str, name: str, capacity_bytes: int, tenants: Iterable[Tenant]) -> EvictionPolicy:
        try:
            return pooled(partial(make_policy, name), PolicyContext(capacity_bytes, self._clock), tenants)
        except InvalidArgument as error:
            raise SettingsError(f"eviction.{setting}: {error}") from None

    def _slab_bytes(self) -> int:
        dram = self.settings.dram
        return dram.slab_bytes or automatic_slab_bytes(dram.capacity_bytes, dram.grant_bytes)

    async def _open_ssd(self) -> SsdTier | None:
        settings = self.settings
        if settings.ssd.directory is None:
            return None
        tenants = tenants_of(settings.quota.ssd_tenants).values()
        largest = min(self._slab_bytes(), settings.dram.capacity_bytes, settings.dram.grant_bytes)
        return await SsdTier.open(
            settings.ssd,
            largest // PAGE_BYTES * PAGE_BYTES,
            self._policy("ssd_policy", settings.eviction.ssd_policy, settings.ssd.capacity_bytes or 0, tenants),
            self._clock,
            self._log,
            tenants=tenants,
        )

    def _make_store(
        self, directory: Path, incarnation: int, mode: int, gid: int, tier: SsdTier | None
    ) -> tuple[Store, Arena, Index | None]:
        settings = self.settings
        dram, limits = settings.dram, settings.limits
        tenants = tenants_of(settings.quota.tenants).values()
        policy = self._policy("policy", settings.eviction.policy, dram.capacity_bytes, tenants)
        slab_bytes = self._slab_bytes()
        slabs = slab_count(dram.capacity_bytes, dram.grant_bytes, slab_bytes)
        header = ArenaHeader(incarnation, slab_bytes, slabs, os.getpid())
        index_header = IndexHeader(
            incarnation,
            bucket_count_for(dram.record_limit),
            secrets.randbits(62),
            header.arena_bytes,
            dram.verified_every,
            _hazard_bytes(settings),
        )
        check_arena_fits(directory, header.arena_bytes + (index_header.index_bytes if dram.mapped else 0))
        arena = Arena(directory / f"arena-{incarnation:016x}", header, mode, gid)
        self._undo.callback(arena.close)
        populate_first(arena)
        index = None
        if dram.mapped:
            index = Index(directory / f"index-{incarnation:016x}", index_header, mode, gid)
            self._undo.callback(index.close)
        store = Store(
            StoreLimits(
                capacity_bytes=dram.capacity_bytes,
                grant_bytes=dram.grant_bytes,
                grant_bytes_per_session=min(limits.grant_bytes_per_session, dram.grant_bytes),
                max_records=dram.record_limit if dram.mapped else 1 << 62,
                lease_bytes=int(dram.capacity_bytes * limits.lease_share),
                ssd_lease_bytes=int((settings.ssd.capacity_bytes or 0) * limits.lease_share),
                retention_bytes=settings.retention_budget_bytes,
            ),
            SlabAllocator(slabs, slab_bytes, FIRST_SLAB_PAGE),
            policy,
            Journal() if settings.events.publish else None,
            None if tier is None else tier.ssd,
            make_admission(settings.ssd.admission),
            tenants,
        )
        return store, arena, index

    async def stop(self) -> None:
        """Stop serving and leave nothing behind."""
        self.ready = False
        await self._undo.aclose()

    def _start_recording(self, recorder: Recorder) -> None:
        """As it is set: a daemon that cannot record serves all the same, and says so."""
        try:
            recorder.start()
        except (KVStoreError, OSError) as error:
            self._log.error("recording_refused", directory=str(self.settings.recording_directory), why=str(error))

    def _recording_failed(self, why: str) -> None:
        self._log.error("recording_failed", why=why)

    def _readiness(self) -> tuple[bool, str]:
        if not self.ready:
            return False, "starting or stopping"
        return True, self.problem or "ready"

    def _slab_populated(self, slab: int) -> None:
        self._executor.apply(SlabPopulated(slab))

    def _population_ended(self, problem: str) -> None:
        self._executor.apply(PopulationEnded())
        if problem:
            self.problem = self._statistics.problem = f"the DRAM tier stays smaller than configured: {problem}"
            self._log.error("population_stopped", why=problem)
        else:
            self._log.info("populated", arena_bytes=self._executor.arena.header.arena_bytes)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._executor.apply(Ticked())
                self._mapping.tick()
                if self._tier is not None:
                    self._tier.tick()
                self._recorder.tick()
                for session in self._sessions.gone(self._clock(), self._mapping.grace_ns):
                    self._log.info("client_gone", pid=session.pid, locked=session.locked, requests=session.requests)
                    self._requests.close_session(session)
            except Exception as error:
                # A defect of ours, and loud; without further ticks no lease would expire and no death be noticed.
                self._log.error("tick_failed", error=repr(error), exc_info=error)

    async def _end_warming(self) -> None:
        if self._warming is not None:
            self._warming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._warming

    async def _end_ticker(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker


async def _end_recording(recorder: Recorder) -> None:
    recorder.stop()
    await asyncio.to_thread(recorder.finished)
    recorder.tick()


def _hazard_bytes(settings: Settings) -> int:
    return min(settings.limits.hazard_bytes_per_session, settings.dram.capacity_bytes // 4)


def _told_of(tier: SsdTier | None) -> dict[str, object]:
    """What the log says of the SSD tier at the start."""
    if tier is None:
        return {}
    stats = tier.statistics()
    return {
        "ssd": stats.directory,
        "ssd_capacity_bytes": stats.capacity_bytes,
        "ssd_records": stats.recovered_records,
        "ssd_io": "direct" if stats.direct else "buffered: the file system refuses O_DIRECT",
    }


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _close_session_files(sessions: Sessions) -> None:
    for session in sessions.all():
        if session.file is not None:
            session.file.close()


async def _serve(settings: Settings) -> int:
    daemon = Daemon(settings)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    log = get_log()

    first_ns = 0
    finished = False

    def stop(number: signal.Signals) -> None:
        nonlocal first_ns
        now_ns = time.monotonic_ns()
        if not first_ns:
            first_ns = now_ns
            log.info("stopping", signal=number.name)
            stopped.set()
        elif not finished and now_ns - first_ns > _SAME_STOP_NS:
            log.warning("forced_stop", signal=number.name)
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await daemon.start()
    gc.collect()
    gc.freeze()
    await stopped.wait()
    await daemon.stop()
    finished = True
    log.info("stopped")
    return 0


def run(settings: Settings) -> int:
    """Run a daemon until SIGTERM or SIGINT (a second one ends it at once); the exit status.

    Raises:
        SettingsError, ResourceTaken, InsufficientMemory, PermissionRefused: why it cannot start.
    """
    configure_logs(settings.log_level, settings.log_format)
    reserve_descriptors(settings.limits.max_sessions)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))
