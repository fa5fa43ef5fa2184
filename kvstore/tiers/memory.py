"""Whether an arena fits this machine: the shared-memory file system, memory, and the container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

from kvstore.errors import InsufficientMemory
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
            f"the arena needs {need_bytes / 2**30:.2f} GiB (capacity and grants) but {what} has "
            f"{have_bytes / 2**30:.2f} GiB; lower dram.capacity_bytes (--capacity) or {remedy}"
        )


def _container_limit_bytes() -> int | None:
    """What this process's cgroup (v2) still allows, or None without a limit."""
    for line in read_text("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            group = f"/sys/fs/cgroup{line[3:].rstrip('/')}"
            limit = read_text(f"{group}/memory.max").strip() or read_text("/sys/fs/cgroup/memory.max").strip()
            used = read_text(f"{group}/memory.current").strip() or read_text("/sys/fs/cgroup/memory.current").strip()
            if limit.isdigit() and used.isdigit():
                return max(int(limit) - int(used), 0)
    return None
