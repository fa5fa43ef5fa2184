"""Whether an arena fits this machine: the shared-memory file system, memory, and the container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

from kvstore.errors import InsufficientMemory
from kvstore.sizes import format_size
from kvstore.tiers.files import free_bytes, read_text


def check_arena_fits(directory: Path, arena_bytes: int) -> None:
    """Refuse an arena that could not be populated.

    Raises:
        InsufficientMemory: naming what is too small, by how much, and what to change.
    """
    _require(
        arena_bytes, free_bytes(directory), f"the file system of {directory}", "enlarge it (mount -o remount,size=...)"
    )
    _require(arena_bytes, psutil.virtual_memory().available, "available memory", "free memory")
    limit = _container_limit_bytes()
    if limit is not None:
        _require(arena_bytes, limit, "this container's memory limit", "raise the limit")


def _require(need_bytes: int, have_bytes: int, what: str, remedy: str) -> None:
    if need_bytes > have_bytes:
        raise InsufficientMemory(
            f"the arena needs {format_size(need_bytes)} (capacity, grants and index) but {what} has "
            f"{format_size(have_bytes)}; lower dram.capacity_bytes (--capacity) or {remedy}"
        )


def _container_limit_bytes() -> int | None:
    """What this process's cgroup and those above it (v2, or v1's memory controller) still allow; None without a limit.

    Pages of files that the kernel would give up count as free. In a container the path may be the host's, which is not
    there; the container's own group then is the root.
    """
    rooms = []
    for line in read_text("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, limit_name, used_name = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, used_name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            group = "/".join([root, *parts[:depth]])
            limit, used = read_text(f"{group}/{limit_name}").strip(), read_text(f"{group}/{used_name}").strip()
            if limit.isdigit() and used.isdigit():
                rooms.append(int(limit) - int(used) + _reclaimable_bytes(read_text(f"{group}/memory.stat")))
    return max(min(rooms), 0) if rooms else None


def _reclaimable_bytes(memory_stat: str) -> int:
    counts = dict(line.split(" ", 1) for line in memory_stat.splitlines() if " " in line)
    text = counts.get("total_inactive_file", counts.get("inactive_file", "0"))
    return int(text) if text.isdigit() else 0
