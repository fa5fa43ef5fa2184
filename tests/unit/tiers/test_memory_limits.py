"""Whether an arena fits is asked of the file system, of memory and of the container; each refuses by its name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.errors import InsufficientMemory
from kvstore.tiers import memory
from kvstore.tiers.memory import check_arena_fits

GIB = 1 << 30
NONE = "max\n"


class FakeMachine:
    """File system, memory and control groups of a machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file_system_bytes = 100 * GIB
        self.available_bytes = 100 * GIB
        self.files: dict[str, str] = {"/proc/self/cgroup": "0::/\n"}
        monkeypatch.setattr(memory, "read_text", lambda path: self.files.get(path, ""))
        monkeypatch.setattr(memory, "free_bytes", lambda directory: self.file_system_bytes)
        monkeypatch.setattr(
            memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=self.available_bytes), raising=True
        )

    def group(self, path: str, limit: str, used: int, inactive_file: int = 0) -> None:
        base = f"/sys/fs/cgroup{path}"
        self.files[f"{base}/memory.max"] = limit
        self.files[f"{base}/memory.current"] = f"{used}\n"
        self.files[f"{base}/memory.stat"] = f"anon 5\nfile 7\ninactive_file {inactive_file}\nactive_file 3\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(monkeypatch)


def fits(arena_bytes: int) -> None:
    check_arena_fits(Path("/dev/shm/kvstore-test"), arena_bytes)


def test_check_arena_fits_with_room_everywhere_passes(machine: FakeMachine):
    fits(99 * GIB)


def test_check_arena_fits_small_file_system_is_named(machine: FakeMachine):
    machine.file_system_bytes = GIB
    fits(GIB)
    with pytest.raises(InsufficientMemory, match=r"file system of /dev/shm/kvstore-test has 1\.0 GiB.*remount"):
        fits(GIB + 1)


def test_check_arena_fits_little_memory_is_named(machine: FakeMachine):
    machine.available_bytes = 3 * GIB
    with pytest.raises(InsufficientMemory, match=r"needs 4\.0 GiB.*available memory has 3\.0 GiB.*--capacity"):
        fits(4 * GIB)


def test_check_arena_fits_container_limit_is_named(machine: FakeMachine):
    machine.group("", f"{8 * GIB}\n", 2 * GIB)
    fits(6 * GIB)
    with pytest.raises(InsufficientMemory, match=r"container's memory limit has 6\.0 GiB.*raise the limit"):
        fits(6 * GIB + 1)


def test_check_arena_fits_pages_that_can_be_given_up_count_as_free(machine: FakeMachine):
    machine.group("", f"{8 * GIB}\n", 7 * GIB, inactive_file=5 * GIB)
    fits(6 * GIB)
    with pytest.raises(InsufficientMemory):
        fits(6 * GIB + 1)


def test_check_arena_fits_limit_of_a_group_above_counts(machine: FakeMachine):
    machine.files["/proc/self/cgroup"] = "0::/pod/container\n"
    machine.group("/pod/container", NONE, GIB)
    machine.group("/pod", f"{4 * GIB}\n", GIB)
    fits(3 * GIB)
    with pytest.raises(InsufficientMemory, match=r"has 3\.0 GiB"):
        fits(3 * GIB + 1)


def test_check_arena_fits_host_path_that_is_not_there_uses_the_container_s_root(machine: FakeMachine):
    machine.files["/proc/self/cgroup"] = "0::/system.slice/docker-1.scope\n"
    machine.group("", f"{2 * GIB}\n", 0)
    with pytest.raises(InsufficientMemory, match="container"):
        fits(3 * GIB)


def test_check_arena_fits_first_version_of_groups_counts_too(machine: FakeMachine):
    machine.files["/proc/self/cgroup"] = "5:cpu,cpuacct:/a\n4:memory:/docker/1\n0::/\n"
    base = "/sys/fs/cgroup/memory/docker/1"
    machine.files[f"{base}/memory.limit_in_bytes"] = f"{4 * GIB}\n"
    machine.files[f"{base}/memory.usage_in_bytes"] = f"{2 * GIB}\n"
    machine.files[f"{base}/memory.stat"] = f"inactive_file 1\ntotal_inactive_file {GIB}\n"
    machine.files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    machine.files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = "1\n"
    fits(3 * GIB)
    with pytest.raises(InsufficientMemory, match=r"has 3\.0 GiB"):
        fits(3 * GIB + 1)


def test_check_arena_fits_more_used_than_allowed_is_no_negative_room(machine: FakeMachine):
    machine.group("", "100\n", 200)
    with pytest.raises(InsufficientMemory, match=r"has 0 B"):
        fits(1)


@pytest.mark.parametrize("text", ["", "max\n", "nonsense\n", "-1\n"])
def test_check_arena_fits_without_a_readable_limit_passes(machine: FakeMachine, text: str):
    machine.group("", text, 200)
    fits(GIB)
