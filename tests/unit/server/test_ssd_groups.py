"""Groups over the twin of the SSD directory: failures in the middle of groups and changes of logs, and what stays."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fakes.faulty_disk import FaultyDirectory

from kvstore.core.ssd import SsdStore
from kvstore.core.ssd_invariants import validate_ssd
from kvstore.core.ssd_record import SsdNamespace, SsdRecord
from kvstore.format.constants import PAGE_BYTES
from kvstore.policy.lru import Lru
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace
from kvstore.server import ssd_groups
from kvstore.server.ssd_groups import Groups, index_bytes
from kvstore.server.ssd_recovery import Recovered, recover, restored
from kvstore.server.ssd_transfers import Transfers

SLAB_BYTES = 16 * PAGE_BYTES
SLABS = 8
MAX_RECORDS = SLABS * 16


class Life:
    """One life of the tier's log over a directory: records are said to be written, nothing is."""

    def __init__(self, directory: FaultyDirectory, recovered: Recovered, ssd: SsdStore) -> None:
        self.directory = directory
        self.recovered = recovered
        self.ssd = ssd
        self.failures: list[str] = []
        self.transfers = Transfers(2, asyncio.get_running_loop())
        self.groups = Groups(
            ssd,
            directory,
            recovered,
            self.transfers,
            64,
            0.001,
            lambda records: None,
            self._failed,  # type: ignore[arg-type]
        )
        self.groups.start()

    @classmethod
    async def begin(cls, directory: FaultyDirectory) -> Life:
        recovered = await recover(directory, SLAB_BYTES, None, SLABS)  # type: ignore[arg-type]
        if not recovered.formatted_slabs:
            recovered.slabs.format(PAGE_BYTES, SLABS * SLAB_BYTES)
        counts = (SLABS, SLABS)
        ssd = restored(recovered.namespaces, recovered.puts, SLAB_BYTES, counts, Lru(), MAX_RECORDS)
        return cls(directory, recovered, ssd)

    def _failed(self, error: OSError, what: str) -> None:
        self.failures.append(what)

    def namespace(self) -> SsdNamespace:
        description = Namespace.parse("groups").canonical()
        known = next(iter(self.ssd.namespaces.values()), None)
        return known or self.ssd.namespace(description, 1)

    def write(self, number: int) -> SsdRecord | None:
        record = self.ssd.begin(self.namespace(), key(number), ROOT_KEY, 0, PAGE_BYTES, 1, number)
        if record is not None:
            record.record_bytes = 512
            self.groups.add(record)
        return record

    async def store(self, *numbers: int) -> bool:
        for number in numbers:
            assert self.write(number) is not None
        return await self.said()

    async def said(self) -> bool:
        """Wait for the group of what was written until now."""
        position = self.ssd.position + (not self.ssd.something_to_log)
        return await asyncio.wait_for(self.groups.wait(position), 5)

    async def remove(self, *numbers: int) -> bool:
        for number in numbers:
            assert self.ssd.remove_key(self.namespace(), key(number))
        return await asyncio.wait_for(self.groups.wait(self.ssd.position), 5)

    def stored(self) -> set[int]:
        validate_ssd(self.ssd)
        return {int.from_bytes(block.key) for block in self.ssd.blocks()}

    async def end(self) -> None:
        await self.groups.stop()
        self.transfers.stop()

    async def crash(self, choose: Callable[..., Any] | None = None) -> Life:
        """The process ends; what the next one finds."""
        directory = self.directory.crash(choose)
        self.groups._stopping = True
        for task in (self.groups._task, self.groups._checkpoint):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        self.transfers.stop()
        return await Life.begin(directory)


def key(number: int) -> bytes:
    return number.to_bytes(32)


@pytest.fixture
async def life(no_leaked_tasks: None) -> AsyncIterator[Life]:
    life = await Life.begin(FaultyDirectory())
    yield life
    if not life.directory._dead:
        life.directory.heal()
        await life.end()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("op", ["data_sync", "log_append", "log_sync"])
async def test_a_failed_group_is_in_no_later_one(life: Life, op: str) -> None:
    assert await life.store(1, 2)
    life.directory.fail(op, errno.EIO, times=1)
    assert not await life.store(3)
    # A record whose write ended before, and that is told later, may be lost as well.
    life.write(4)
    assert len(life.failures) == 1
    assert not await life.remove(1)
    await life.groups.begin_log()
    assert await life.store(5)
    assert await life.remove(2)
    assert life.stored() == {5}
    after = await life.crash()
    assert after.stored() == {5}
    assert after.recovered.problems == []
    await after.end()


async def test_nothing_is_appended_behind_a_torn_frame(life: Life) -> None:
    assert await life.store(1)
    log = life.groups._log
    life.directory.fail("log_append", errno.ENOSPC, times=1)
    assert not await life.store(2)
    size_bytes = len(life.directory.content("log-0000000000000000"))
    await life.groups.begin_log()
    assert life.groups._log is not log
    assert await life.store(3)
    assert len(life.directory.content("log-0000000000000000")) == size_bytes
    after = await life.crash()
    assert after.stored() == {1, 3}
    await after.end()


async def test_a_change_of_logs_waits_for_the_group_in_progress(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, log = asyncio.Event(), life.groups._log
    sync = log.sync

    async def late() -> None:
        await gate.wait()
        await sync()

    monkeypatch.setattr(log, "sync", late)
    life.write(1)
    await until(lambda: life.ssd.synced < life.ssd.position)
    # Both a checkpoint that is due and a return after a failure come between.
    log.size_bytes += 1 << 30
    both = [asyncio.ensure_future(life.groups.begin_log()), asyncio.ensure_future(life.groups.tidy())]
    await asyncio.wait(both, timeout=0.05)
    assert life.groups._log is log
    assert not any(task.done() for task in both)
    gate.set()
    await asyncio.gather(*both)
    assert await life.store(2)
    assert life.stored() == {1, 2}
    after = await life.crash()
    assert after.stored() == {1, 2}
    assert (after.recovered.problems, after.recovered.torn) == ([], [])
    await after.end()


@pytest.mark.parametrize("op", ["checkpoint_create", "checkpoint_write", "checkpoint_sync", "checkpoint_rename"])
async def test_failed_checkpoints_leave_nothing(life: Life, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_groups, "SMALLEST_LOG_BYTES", 2000)
    life.directory.fail(op, errno.ENOSPC)
    number = 0
    while not life.failures:
        number += 1
        await life.store(number)
    before = set(life.directory.names())
    for _ in range(5):
        with pytest.raises(OSError, match="No space"):
            await life.groups.begin_log()
    assert len(set(life.directory.names()) - before) <= 1
    assert not await life.said()
    life.directory.heal()
    await life.groups.begin_log()
    assert life.groups.checkpoints == 1
    assert len(life.directory.names()) == 3
    stored = life.stored()
    assert await life.store(number + 1)
    after = await life.crash()
    assert after.stored() == stored | {number + 1}
    await after.end()


async def test_a_checkpoint_whose_name_may_not_last(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_groups, "SMALLEST_LOG_BYTES", 2000)
    # The first is that of the log's name.
    life.directory.fail("directory_sync", errno.EIO, passes=1, times=1)
    assert await life.store(*range(1, 20))
    await until(lambda: life.failures)
    await life.groups.begin_log()
    assert await life.store(30)
    assert await life.remove(3)
    after = await life.crash()
    assert after.stored() == set(range(1, 20)) - {3} | {30}
    await after.end()


async def test_files_stay_within_their_share(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_groups, "SMALLEST_LOG_BYTES", 4000)
    most = index_bytes(MAX_RECORDS) - (1 << 20)
    random_fault = iter([("checkpoint_sync", 3), ("log_append", 40), ("log_create", 2), ("checkpoint_rename", 1)] * 8)
    alive: Life = life
    for number in range(1, 600):
        if number % 40 == 0:
            op, passes = next(random_fault)
            alive.directory.fail(op, errno.EIO, passes=passes, times=1)
        if alive.write(number) is None or not await alive.said():
            while alive.groups._failed:
                try:
                    await alive.groups.begin_log()
                except OSError:
                    await asyncio.sleep(0)
            await asyncio.wait_for(alive.groups.wait(alive.ssd.position), 5)
        if number % 97 == 0:
            alive = await alive.crash()
        size_bytes = sum(len(alive.directory.content(name)) for name in alive.directory.names() if name != "slabs")
        assert size_bytes <= most, sorted(alive.directory.names())
    alive.directory.heal()
    last = await alive.crash()
    assert last.recovered.problems == []
    await last.end()


async def test_a_defect_ends_in_an_error(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))

    def broken(written: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(life.ssd, "begin_group", broken)
    assert not await life.store(1)
    assert "ZeroDivisionError" in repr(told[0]["exception"])
    with pytest.raises(OSError, match="restart the daemon"):
        await life.groups.begin_log()
