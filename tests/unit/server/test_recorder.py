"""The recorder: reports of a request put together, bounds, and what becomes of it when writing fails."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from daemon_process import wait_until

from kvstore.core.block import Block
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_record import SsdBlock, SsdNamespace
from kvstore.core.watching import Cause, Watcher
from kvstore.format.lookup_trace import LookupDecoder, NamespaceFacts, RecordedLookup
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.namespace import Namespace
from kvstore.server import recorder as recorder_module
from kvstore.server import recording_writer
from kvstore.server.recorder import Recorder
from kvstore.tiers.recordings import RECORDING_SUFFIX, RecordingDirectory, RecordingFile

SECOND_NS = 1_000_000_000
MIB = 1 << 20


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


class World:
    """A namespace whose blocks a test makes, a clock that it moves, and a recorder."""

    def __init__(
        self, path: Path, max_bytes: int = 8 * MIB, files: int = 4, directory: type = RecordingDirectory
    ) -> None:
        self.path = path
        self.now_ns = 5 * SECOND_NS
        self.namespace = NamespaceState(3, Namespace(name="secret", block_tokens=64, codec="kivi4"), 0, b"")
        self.store = SimpleNamespace(
            watchers=[],
            namespaces=SimpleNamespace(by_id={3: self.namespace}),
            limits=SimpleNamespace(capacity_bytes=1 << 30),
        )
        self.failures: list[str] = []
        self.recorder = Recorder(
            self.store,  # type: ignore[arg-type]
            path,
            max_bytes,
            files,
            lambda: self.now_ns,
            directory,
            self.failures.append,
        )

    def resident(self, numbers: Sequence[int], slot_bytes: int = 8192) -> Block:
        """A chain of blocks in DRAM; its deepest one."""
        block = None
        for at, number in enumerate(numbers):
            parent = key(numbers[at - 1]) if at else ROOT_KEY
            block = self.namespace.blocks.get(key(number)) or Block(self.namespace, key(number), parent)
            if block.key not in self.namespace.blocks:
                self.namespace.insert(block)
            block.slot_bytes = slot_bytes
        assert block is not None
        return block

    def told(self, access: int, hit: Sequence[int], missing: Iterable[int] = (), asked: int = 0) -> None:
        """A report as the store passes it on."""
        names = [key(number) for number in missing]
        runs = [(self.resident(hit), len(hit))] if hit else []
        for watcher in self.store.watchers:
            watcher.accessed(3, access, runs, asked or len(hit) + len(names), names)

    def put(self, access: int, number: int, parent: int | None, *, promoted: bool = False) -> None:
        block = Block(self.namespace, key(number), ROOT_KEY if parent is None else key(parent))
        block.slot_bytes = 8192
        if block.key not in self.namespace.blocks:
            self.namespace.insert(block)
        for watcher in self.store.watchers:
            watcher.stored(block, access, promoted=promoted)

    def recorded(self) -> list[RecordedLookup]:
        """End the recording and read it."""
        self.recorder.stop()
        assert self.recorder.finished()
        return self.read()

    def read(self) -> list[RecordedLookup]:
        self.decoder = LookupDecoder()
        files = sorted(self.path.glob(f"*{RECORDING_SUFFIX}"), key=lambda file: file.name)
        found = [lookup for file in files for lookup in self.decoder.lookups(file.read_bytes())]
        assert self.decoder.damage == ""
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "recordings")
    made.recorder.start()
    return made


def test_match_get_and_puts_of_a_request_are_one(world: World) -> None:
    world.told(7, [1, 2], [3, 4])
    world.told(7, [1, 2])
    world.put(7, 3, 2)
    world.put(7, 4, 3)
    world.now_ns += 2 * SECOND_NS
    world.told(8, [1, 2, 3, 4], [5])
    first, second = world.recorded()
    assert first == RecordedLookup(0, 0, (0, 1, 2, 3), 4, 2, 0)
    assert second == RecordedLookup(2000, 0, (0, 1, 2, 3, 4), 5, 4, 0)
    assert world.decoder.namespaces == {0: NamespaceFacts(0, 64, 8192, "kivi4")}


def test_puts_name_what_the_match_of_a_mapped_client_did_not(world: World) -> None:
    world.told(1, [1], [2, 3], asked=8)
    for number in range(2, 7):
        world.put(1, number, number - 1)
    (found,) = world.recorded()
    assert (len(found.blocks), found.asked, found.hits) == (6, 8, 1)


def test_puts_of_a_client_that_names_no_request_are_those_of_the_prefix_they_go_on_with(world: World) -> None:
    world.told(1, [], [1, 2], asked=5)
    world.told(2, [], [11, 12], asked=3)
    world.put(91, 13, 12)
    world.put(92, 3, 2)
    world.put(93, 4, 3)
    world.put(94, 99, 98)
    one, other = world.recorded()
    assert (len(one.blocks), len(other.blocks)) == (4, 3)


def test_request_that_begins_in_the_middle_has_the_blocks_before_it(world: World) -> None:
    world.resident([1, 2, 3])
    deepest = world.resident([1, 2, 3, 4])
    world.recorder.accessed(3, 1, [(deepest, 2)], 3, [key(5)])
    world.told(2, [1, 2, 3, 4], [5])
    one, other = world.recorded()
    assert one.blocks == other.blocks
    assert (one.hits, one.asked) == (4, 5)


def test_promotions_evictions_and_puts_nobody_asked_for_are_no_lookups(world: World) -> None:
    world.put(5, 1, None)
    world.put(6, 2, 1, promoted=True)
    world.recorder.left(world.resident([1]), Cause.EVICTED)
    assert world.recorded() == []


def test_request_is_over_when_nothing_came_for_a_while(world: World) -> None:
    world.told(1, [], [1])
    world.now_ns += 20 * SECOND_NS
    world.told(2, [], [2])
    world.recorder.tick()
    assert world.recorder.statistics().open_requests == 2
    world.now_ns += 20 * SECOND_NS
    world.recorder.tick()
    assert world.recorder.statistics().open_requests == 1
    # Too late: its request is written.
    world.told(1, [], [1, 5, 6])
    world.put(1, 5, 1)
    assert [len(found.blocks) for found in world.recorded()] == [1, 1]


def test_request_that_never_ends_is_closed_all_the_same(world: World) -> None:
    for step in range(13):
        world.told(1, [], [1 + step])
        world.now_ns += 10 * SECOND_NS
        world.recorder.tick()
    assert world.recorder.statistics().open_requests == 0


def test_open_requests_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_MOST_REQUESTS", 100)
    for access in range(1, 1001):
        world.told(access, [], [access])
        assert world.recorder.statistics().open_requests <= 100
    assert [len(found.blocks) for found in world.recorded()] == [1] * 1000


def test_blocks_of_open_requests_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_MOST_BLOCKS", 500)
    for access in range(1, 101):
        world.told(access, [], range(100 * access, 100 * access + 100))
        assert world.recorder._blocks <= 600
    assert sum(len(found.blocks) for found in world.recorded()) == 10_000
    assert (world.recorder._blocks, world.recorder._ends) == (0, {})


def test_what_waits_too_long_for_the_thread_is_dropped_and_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_writer, "_MOST_WAITING_BLOCKS", 5)
    for access in range(1, 4):
        world.told(access, [], range(100 * access, 100 * access + 4))
    world.recorder._close(3)
    assert world.recorder.statistics().dropped_requests == 3
    world.told(9, [], [1, 2, 3])
    assert [len(found.blocks) for found in world.recorded()] == [3]


def test_nothing_is_watched_before_the_start_and_after_the_end(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    assert (world.recorder.statistics().state, world.store.watchers) == ("off", [])
    assert world.recorder.finished()
    world.recorder.stop()
    world.recorder.start()
    watcher: Watcher = world.recorder
    assert world.store.watchers == [watcher]
    world.recorder.start()
    assert world.store.watchers == [watcher]
    assert world.recorder.statistics().state == "on"
    world.recorder.stop()
    assert (world.recorder.statistics().state, world.store.watchers) == ("off", [])


def test_each_recording_has_files_and_a_salt_of_its_own(world: World) -> None:
    world.told(1, [], [1, 2, 3])
    world.recorded()
    world.recorder.start()
    world.told(2, [], [1, 2, 3])
    world.recorder.stop()
    assert world.recorder.finished()
    one, other = (file.read_bytes() for file in sorted(world.path.iterdir()))
    assert one[16:32] != other[16:32]
    assert one[-12:] != other[-12:]
    for name in (b"secret", key(1)[:4], key(2)[:4]):
        assert name not in one + other
    assert {path.stat().st_mode & 0o777 for path in world.path.iterdir()} == {0o600}


def fill(world: World, requests: int, first: int = 0) -> None:
    for access in range(first + 1, first + requests + 1):
        world.told(access, [], range(1000 * access, 1000 * access + 500))
        if access % 20 == 0:
            world.now_ns += 200 * SECOND_NS
            world.recorder.tick()
            deadline = time.monotonic() + 20
            writer = world.recorder._writer
            while writer is not None and writer._put_blocks != writer._taken_blocks and not writer.failure:
                assert time.monotonic() < deadline
                time.sleep(0.001)


def test_files_rotate_within_their_bytes_and_what_is_left_is_readable(tmp_path: Path) -> None:
    world = World(tmp_path / "r", max_bytes=MIB // 2, files=4)
    world.recorder.start()
    fill(world, 500)
    found = world.recorded()
    files = sorted(world.path.iterdir())
    assert len(files) <= 4
    assert sum(file.stat().st_size for file in files) <= MIB // 2
    assert int(files[-1].stem.rpartition("-")[2]) >= 6
    assert 100 < len(found) < 500
    assert all(len(lookup.blocks) == 500 for lookup in found)
    # A later recording makes room for itself.
    world.recorder.start()
    fill(world, 300, first=500)
    world.recorder.stop()
    assert world.recorder.finished()
    assert sum(file.stat().st_size for file in world.path.iterdir()) <= MIB // 2


class FullFile(RecordingFile):
    """The device is full after some bytes."""

    def append(self, data: bytes) -> None:
        if self.size_bytes + len(data) > 100_000:
            super().append(data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        super().append(data)


class FullDirectory(RecordingDirectory):
    def create(self, name: str) -> RecordingFile:
        return FullFile(self.path / name)


def test_full_device_ends_the_recording_with_a_reason_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path / "r", directory=FullDirectory)
    world.recorder.start()
    fill(world, 100)
    world.recorder.tick()
    status = world.recorder.statistics()
    assert (status.state, world.store.watchers) == ("failed", [])
    assert status.problem.startswith("cannot write")
    assert "No space left" in status.problem
    assert world.failures == [status.problem]
    assert world.recorder.finished()
    decoder = LookupDecoder()
    (file,) = world.path.iterdir()
    assert len(list(decoder.lookups(file.read_bytes()))) > 20
    assert "torn" in decoder.damage
    # A new one may work.
    world.recorder._make_directory = RecordingDirectory
    world.recorder.start()
    assert world.recorder.statistics().state == "on"
    world.recorder.stop()
    assert world.recorder.finished()


def gone(world: World, why: str) -> str:
    """What the status says of a recording that has to have noticed it; the callback is told the same, once."""
    deadline = time.monotonic() + 20
    while not world.failures:
        assert time.monotonic() < deadline
        world.recorder.tick()
        time.sleep(0.001)
    world.recorder.tick()
    status = world.recorder.statistics()
    assert (status.state, world.store.watchers, world.recorder.finished()) == ("failed", [], True)
    assert why in status.problem
    assert world.failures == [status.problem]
    return status.file


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "file"])
def test_recording_whose_files_somebody_removes_fails(world: World, how: str) -> None:
    (file,) = world.path.iterdir()
    if how == "file":
        file.unlink()
    elif how == "removed":
        shutil.rmtree(world.path)
    else:
        world.path.rename(world.path.with_name("moved"))
        if how == "replaced":
            shutil.copytree(world.path.with_name("moved"), world.path)
    world.told(1, [], [1, 2])
    world.now_ns += 200 * SECOND_NS
    world.recorder.tick()
    left = gone(world, f"{file} was removed or moved while it was written; ")
    # The copy that somebody put in its place is a beginning of the recording.
    assert left == (file.name if how == "replaced" else "")
    assert world.recorder.statistics().requests == 0
    # A new one makes its directory again.
    world.recorder.start()
    assert world.recorder.statistics().state == "on"
    world.told(2, [], [1, 2])
    assert len(world.recorded()) == 1
    assert len(world.failures) == 1


def test_files_that_are_gone_are_noticed_at_the_stop_and_while_nothing_is_looked_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.told(1, [], [1, 2])
    world.recorder._close(1)
    wait_until(lambda: world.recorder.statistics().requests == 1)
    shutil.rmtree(world.path)
    world.recorder.stop()
    assert world.recorder.finished()
    assert world.recorder.statistics().state == "failed"
    assert gone(world, "nothing of the recording is left there") == ""
    monkeypatch.setattr(recording_writer, "_LOOK_S", 0.01)
    world.recorder.start()
    world.failures.clear()
    shutil.rmtree(world.path)
    assert gone(world, "nothing of the recording is left there") == ""


def test_of_a_recording_whose_last_file_is_removed_the_others_are_named(tmp_path: Path) -> None:
    world = World(tmp_path / "r", max_bytes=MIB // 2, files=4)
    world.recorder.start()
    fill(world, 100)
    files = sorted(file.name for file in world.path.iterdir())
    assert len(files) > 1
    (world.path / files[-1]).unlink()
    world.recorder.stop()
    assert gone(world, f"{files[-1]} was removed or moved") == files[-2]


def test_directory_that_will_not_do_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    world = World(tmp_path / "file")
    with pytest.raises(Exception, match="is no directory"):
        world.recorder.start()
    assert (world.recorder.recording, world.store.watchers) == (False, [])


def test_blocks_below_dram_are_told_apart(world: World) -> None:
    below = SsdNamespace(0, world.namespace.description.canonical(), 0)
    world.namespace.ssd = below
    deepest = world.resident([1, 2])
    found = SsdBlock(below, key(3), key(2))
    found.slot_bytes = 8192
    below.tree.insert(found)
    world.recorder.accessed(3, 1, [(deepest, 2), (found, 1)], 4, [key(4)])
    (lookup,) = world.recorded()
    assert (len(lookup.blocks), lookup.hits, lookup.below) == (4, 3, 1)
