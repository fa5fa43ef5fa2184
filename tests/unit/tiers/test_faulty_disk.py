"""The twin of the SSD directory loses at a crash what a disk may lose, nothing else, and fails as it is told."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest
from disk_pages import PAGE_BYTES, pages, read_pages
from fakes.crash_medium import Choose, lose_everything
from fakes.faulty_disk import Crashed, FaultyDirectory, FaultySlabs

SEEDS = range(200)


def seeded(seed: int) -> Choose:
    return random.Random(seed).randrange


@pytest.fixture
def directory() -> FaultyDirectory:
    return FaultyDirectory()


@pytest.fixture
def slabs(directory: FaultyDirectory) -> FaultySlabs:
    opened = directory.open_slabs(create=True)
    opened.format(0, 4 * PAGE_BYTES)
    opened.sync()
    return opened


def crashes(make: Callable[[FaultyDirectory, FaultySlabs], None]) -> Counter[str]:
    """Pages of the slab file after a crash with each seed."""
    found: Counter[str] = Counter()
    for seed in SEEDS:
        directory = FaultyDirectory()
        slabs = directory.open_slabs(create=True)
        slabs.format(0, 4 * PAGE_BYTES)
        slabs.sync()
        make(directory, slabs)
        left = directory.crash(seeded(seed)).open_slabs(create=False)
        found[read_pages(left, 0, left.size_bytes // PAGE_BYTES)] += 1
    return found


# ---------------------------------------------------------------- pages


def test_pages_written_before_a_sync_survive_every_crash():
    def make(_: FaultyDirectory, slabs: FaultySlabs) -> None:
        slabs.write(0, pages("a", "b"))
        slabs.sync()

    assert set(crashes(make)) == {"ab.."}


def test_pages_not_synced_are_kept_lost_or_torn_each_by_itself():
    def make(_: FaultyDirectory, slabs: FaultySlabs) -> None:
        slabs.write(0, pages("a", "b"))

    found = set(crashes(make))
    assert {"ab..", "....", ".b..", "a..."} <= found
    assert {".ab..", "a.b.."} <= found, "torn"
    assert found <= {first + second + ".." for first in ("a", ".", ".a") for second in ("b", ".", ".b")}


def test_pages_written_twice_may_be_either_or_what_was_synced_before():
    def make(_: FaultyDirectory, slabs: FaultySlabs) -> None:
        slabs.write(0, pages("a"))
        slabs.sync()
        slabs.write(0, pages("b"))
        slabs.write(0, pages("c"))

    assert set(crashes(make)) == {"a...", "b...", "c...", "ab...", "bc..."}


def test_pages_written_during_a_sync_are_not_durable_by_it(directory: FaultyDirectory, slabs: FaultySlabs):
    slabs.write(0, pages("a"))
    directory.delays_s["data_sync"] = 0.2
    thread = threading.Thread(target=slabs.sync)
    directory.before = lambda op, name: started.set() if op == "data_sync" else None
    started = threading.Event()
    thread.start()
    assert started.wait(30)
    slabs.write(PAGE_BYTES, pages("b"))
    thread.join(30)
    assert read_pages(directory.crash(lose_everything).open_slabs(create=False), 0, 2) == "a."


def test_pages_of_syncs_that_overlap_are_durable_as_far_as_each_began(directory: FaultyDirectory, slabs: FaultySlabs):
    content = directory.medium.now["slabs"]
    slabs.write(0, pages("a"))
    first = content.begin_sync()
    slabs.write(0, pages("b"))
    second = content.begin_sync()
    slabs.write(0, pages("c"))
    content.end_sync(second)
    content.end_sync(first)
    assert read_pages(directory.crash(lose_everything).open_slabs(create=False), 0, 1) == "b"


def test_pages_that_a_failed_sync_gave_up_are_not_saved_by_the_next(directory: FaultyDirectory, slabs: FaultySlabs):
    slabs.write(0, pages("a", "b"))
    directory.fail("data_sync", errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output error"):
        slabs.sync()
    slabs.write(PAGE_BYTES, pages("c"))
    slabs.sync()
    assert read_pages(slabs, 0, 2) == "ac"
    assert read_pages(directory.crash(lose_everything).open_slabs(create=False), 0, 2) == ".c"


def test_size_of_a_file_that_was_truncated_or_grown_is_one_that_it_had():
    def make(_: FaultyDirectory, slabs: FaultySlabs) -> None:
        slabs.write(0, pages("a"))
        slabs.sync()
        slabs.truncate(0)
        slabs.format(0, 2 * PAGE_BYTES)

    found = set(crashes(make))
    assert {"a...", "", ".."} <= found


def test_process_that_dies_alone_loses_nothing_until_the_machine_does(directory: FaultyDirectory, slabs: FaultySlabs):
    slabs.write(0, pages("a"))
    alive = directory.crash()
    assert read_pages(alive.open_slabs(create=False), 0, 2) == "a."
    assert read_pages(alive.crash(lose_everything).open_slabs(create=False), 0, 2) == ".."


async def test_file_of_a_dead_process_is_durable_once_it_is_synced(directory: FaultyDirectory):
    log = await directory.create_log("log", b"")
    await log.append(b"frame")
    alive = directory.crash()
    await alive.sync_file("log")
    assert alive.crash(lose_everything).content("log") == b"frame"


def test_crash_with_one_seed_leaves_the_same_each_time():
    def left(seed: int) -> bytes:
        directory = FaultyDirectory()
        slabs = directory.open_slabs(create=True)
        for turn in range(20):
            slabs.write(turn % 7 * PAGE_BYTES, pages(chr(ord("a") + turn)))
        after = directory.crash(seeded(seed))
        return after.content("slabs") if "slabs" in after.names() else b""

    assert all(left(seed) == left(seed) for seed in range(20))
    assert len({left(seed) for seed in range(20)}) > 5


# ---------------------------------------------------------------- logs and names


async def test_file_with_pages_that_a_sync_gave_up_is_durable_once_it_is_synced_by_name(directory: FaultyDirectory):
    log = await directory.create_log("log", b"")
    await log.append(b"frame")
    directory.fail("log_sync", errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output"):
        await log.sync()
    alive = directory.crash()
    await alive.sync_file("log")
    assert alive.crash(lose_everything).content("log") == b"frame"


async def test_log_tail_that_was_not_synced_is_cut_at_any_byte():
    sizes, zeroed = set(), False
    for seed in SEEDS:
        directory = FaultyDirectory()
        log = await directory.create_log("log", b"header")
        await log.append(b" synced")
        await log.sync()
        await log.append(b" one")
        await log.append(b" two")
        content = directory.crash(seeded(seed)).content("log")
        sizes.add(len(content))
        full = b"header synced one two"
        assert content.startswith(b"header synced")
        assert all(byte in (full[at], 0) for at, byte in enumerate(content))
        zeroed = zeroed or 0 in content
    assert sizes == set(range(13, 22))
    assert zeroed, "a size may be durable before the bytes"


async def test_log_that_was_created_survives_with_its_header(directory: FaultyDirectory):
    await directory.create_log("log", b"header")
    assert directory.crash(lose_everything).content("log") == b"header"


async def test_whole_file_at_every_point_of_a_crash_is_old_or_new():
    directory = FaultyDirectory()
    await directory.write_whole("checkpoint", [b"old"])
    directory.points.clear()
    await directory.write_whole("checkpoint", [b"new", b" and longer"])
    points = len(directory.points)
    seen = set()
    for last in range(points + 1):
        for seed in range(20):
            directory = FaultyDirectory()
            await directory.write_whole("checkpoint", [b"old"])
            crash_at(directory, last)
            try:
                await directory.write_whole("checkpoint", [b"new", b" and longer"])
            except Crashed:
                assert last < points
            else:
                assert last == points
            after = directory.crash(seeded(seed))
            assert after.names() == ["checkpoint"], "what was being written is not there, or has no name"
            seen.add(content := after.content("checkpoint"))
            assert content in (b"old", b"new and longer")
            assert last < points or content == b"new and longer"
    assert len(seen) == 2


def crash_at(directory: FaultyDirectory, point: int) -> None:
    """Crash when so many points more were passed."""
    count = 0

    def hook(op: str, name: str) -> None:
        nonlocal count
        if count == point:
            raise Crashed
        count += 1

    directory.before = directory.after = hook


async def test_names_that_were_not_synced_may_be_there_or_not():
    found = Counter()
    for seed in SEEDS:
        directory = FaultyDirectory()
        for name in ("log-1", "log-2"):
            await (await directory.create_log(name, b"")).close()
        directory.remove("log-1")
        directory.remove("log-2")
        found[tuple(directory.crash(seeded(seed)).names())] += 1
    assert set(found) == {(), ("log-1",), ("log-2",), ("log-1", "log-2")}


async def test_names_removed_before_the_next_sync_of_the_directory_are_gone(directory: FaultyDirectory):
    await (await directory.create_log("log-1", b"")).close()
    directory.remove("log-1")
    await directory.create_log("log-2", b"")
    assert directory.crash(lose_everything).names() == ["log-2"]


# ---------------------------------------------------------------- the dead


async def test_every_call_of_a_dead_process_raises(directory: FaultyDirectory, slabs: FaultySlabs):
    log = await directory.create_log("log", b"")

    def hook(op: str, name: str) -> None:
        if op == "data_write":
            raise Crashed

    directory.before = hook
    with pytest.raises(Crashed):
        slabs.write(0, pages("a"))
    calls: list[Callable[[], object]] = [
        slabs.sync,
        lambda: slabs.read(0, pages("a")),
        lambda: directory.remove("log"),
        directory.names,
        lambda: directory.read_bytes("log", 100),
    ]
    for call in calls:
        with pytest.raises(Crashed):
            call()
    for wait in (log.append(b"more"), directory.create_log("other", b""), directory.write_whole("whole", [b""])):
        with pytest.raises(Crashed):
            await wait
    assert read_pages(directory.crash().open_slabs(create=False), 0, 1) == "."


def test_crash_after_a_point_has_done_what_it_names(directory: FaultyDirectory, slabs: FaultySlabs):
    def hook(op: str, name: str) -> None:
        raise Crashed

    slabs.write(0, pages("a"))
    directory.after = hook
    with pytest.raises(Crashed):
        slabs.sync()
    assert directory.points[-2:] == ["before_data_sync", "after_data_sync"]
    assert read_pages(directory.crash(lose_everything).open_slabs(create=False), 0, 1) == "a"


# ---------------------------------------------------------------- faults


def test_full_disk_takes_what_fits_and_overwrites_what_is_there(directory: FaultyDirectory, slabs: FaultySlabs):
    directory.full_after(PAGE_BYTES)
    slabs.write(0, pages("a", "b", "c", "d"))
    with pytest.raises(OSError, match="No space left") as caught:
        slabs.write(4 * PAGE_BYTES, pages("e", "f"))
    assert caught.value.errno == errno.ENOSPC
    assert (slabs.size_bytes, read_pages(slabs, 0, 5), directory.free_bytes()) == (5 * PAGE_BYTES, "abcde", 0)
    directory.heal()
    slabs.write(5 * PAGE_BYTES, pages("f"))


async def test_full_disk_is_freed_by_files_that_are_removed_and_closed(directory: FaultyDirectory):
    log = await directory.create_log("log-1", bytes(10 * PAGE_BYTES))
    directory.full_after(0)
    with pytest.raises(OSError, match="No space left"):
        await log.append(bytes(PAGE_BYTES))
    with pytest.raises(OSError, match="start a new one"):
        await log.append(b"")
    directory.remove("log-1")
    assert (directory.free_bytes(), directory.used_bytes()) == (0, 0)
    await log.close()
    assert directory.free_bytes() == 10 * PAGE_BYTES
    await directory.create_log("log-2", b"header")


async def test_full_disk_leaves_no_half_file(directory: FaultyDirectory):
    directory.full_after(PAGE_BYTES)
    for call in (directory.create_log("log", bytes(2 * PAGE_BYTES)), directory.write_whole("whole", [bytes(5000)])):
        with pytest.raises(OSError, match="No space left"):
            await call
        assert (directory.names(), directory.used_bytes()) == ([], 0)


def test_fault_strikes_its_range_after_its_passes_so_many_times(directory: FaultyDirectory, slabs: FaultySlabs):
    fault = directory.fail("read", errno.EIO, "slabs", start=PAGE_BYTES, end=2 * PAGE_BYTES, passes=1, times=1)
    outcomes = []
    for first in (0, 1, 0, 2, 1, 1):
        try:
            outcomes.append(read_pages(slabs, first, 1))
        except OSError as error:
            outcomes.append(str(error.errno))
    assert outcomes == [".", ".", ".", ".", str(errno.EIO), "."]
    assert fault.passes == 0
    directory.fail("sync", errno.EIO, "other")
    slabs.sync()


async def test_read_only_disk_refuses_all_that_changes_it(directory: FaultyDirectory, slabs: FaultySlabs):
    log = await directory.create_log("log", b"")
    directory.read_only = True
    changes: list[Callable[[], object]] = [
        lambda: slabs.write(0, pages("a")),
        lambda: slabs.format(0, PAGE_BYTES),
        lambda: slabs.truncate(0),
        lambda: directory.remove("log"),
    ]
    for call in changes:
        with pytest.raises(OSError, match="Read-only file system"):
            call()
    for wait in (log.append(b"more"), directory.create_log("other", b""), directory.write_whole("whole", [b""])):
        with pytest.raises(OSError, match="Read-only file system"):
            await wait
    assert read_pages(slabs, 0, 1) == "."


async def test_directory_that_is_gone_takes_no_new_files(directory: FaultyDirectory, slabs: FaultySlabs):
    directory.gone = True
    assert (directory.there(), directory.names()) == (False, [])
    for call in (directory.create_log("log", b""), directory.write_whole("whole", [b""])):
        with pytest.raises(FileNotFoundError):
            await call
    slabs.write(0, pages("a"))
    assert read_pages(slabs, 0, 1) == "a"


def test_flipped_bits_are_read_and_stay_until_written_over(directory: FaultyDirectory, slabs: FaultySlabs):
    slabs.write(0, pages("a"))
    slabs.sync()
    directory.flip("slabs", 5, 0x02)
    assert read_pages(slabs, 0, 1) == "ac"
    after = directory.crash(lose_everything).open_slabs(create=False)
    assert read_pages(after, 0, 1) == "ac"
    after.write(0, pages("b"))
    assert read_pages(after, 0, 1) == "b"


async def test_slow_log_lets_other_tasks_run(directory: FaultyDirectory):
    log = await directory.create_log("log", b"")
    directory.delays_s["log_append"] = 0.05
    order: list[str] = []

    async def append() -> None:
        await log.append(b"x")
        order.append("appended")

    task = asyncio.create_task(append())
    await asyncio.sleep(0)
    order.append("meanwhile")
    await task
    assert order == ["meanwhile", "appended"]
