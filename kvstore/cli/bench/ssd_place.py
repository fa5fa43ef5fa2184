"""Where the SSD tier is measured: a directory on a file system that can be read and written past the page cache."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from kvstore.errors import InvalidArgument
from kvstore.format.constants import PAGE_BYTES
from kvstore.sizes import format_size

__all__ = ["DiskFacts", "Mount", "check_place", "mount_of"]

_IN_MEMORY: Final = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
"""Blanks and their like in paths of ``mountinfo``."""


class Mount(msgspec.Struct, frozen=True):
    """A mounted file system.

    Attributes:
        point: where it is mounted.
        kind: "ext4", "xfs", ...
        source: a device, or what the file system calls it.
    """

    point: str
    kind: str
    source: str


class DiskFacts(msgspec.Struct, kw_only=True):
    """What is below both sides.

    Attributes:
        filesystem: its kind.
        device: what is mounted there.
        size_bytes: of fio's file, and of all files of the SSD tier.
        depth: requests at once, of both sides.
        fio: version.
    """

    filesystem: str
    device: str
    size_bytes: int
    depth: int
    fio: str


def mount_of(path: str, mountinfo: Iterable[str]) -> Mount:
    """The file system that a path is on, from the lines of ``/proc/self/mountinfo``.

    Args:
        path: absolute, without links.
        mountinfo: see proc(5).
    """
    found = Mount("", "unknown", "unknown")
    for line in mountinfo:
        left, separator, right = line.partition(" - ")
        if not separator:
            continue
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), left.split()[4])
        kind, source = right.split()[:2]
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # What was mounted later over the same place hides what was there before.
        if inside and len(point) >= len(found.point):
            found = Mount(point, kind, source)
    return found


def check_place(directory: Path, needed_bytes: int) -> Mount:
    """Whether the tier can be measured in a directory.

    Args:
        directory: there, and ours to write to.
        needed_bytes: of free space.

    Returns:
        Its file system.

    Raises:
        InvalidArgument: it is no directory, in memory, too full, or takes no direct I/O.
    """
    try:
        resolved = directory.resolve(strict=True)
    except OSError as error:
        raise InvalidArgument(f"--dir {directory}: {error.strerror}; name a directory on the SSD") from None
    if not resolved.is_dir():
        raise InvalidArgument(f"--dir {directory} is no directory; name one on the SSD")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        mount = mount_of(str(resolved), lines)
    if mount.kind in _IN_MEMORY:
        raise InvalidArgument(
            f"--dir {directory} is on {mount.kind}, which is memory: there is no disk to measure; name a directory on "
            "the SSD"
        )
    free_bytes = shutil.disk_usage(resolved).free
    if free_bytes < needed_bytes:
        raise InvalidArgument(
            f"--dir {directory} has {format_size(free_bytes)} free and the benchmark needs "
            f"{format_size(needed_bytes)}; name another directory, or a smaller --size"
        )
    _check_direct(resolved, directory)
    return mount


def _check_direct(resolved: Path, given: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=resolved, prefix="kvstore-bench-") as file:
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            try:
                with mmap.mmap(-1, PAGE_BYTES) as page:
                    os.pwritev(fd, [page], 0)
            finally:
                os.close(fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise InvalidArgument(
                f"--dir {given}: its file system takes no direct I/O (O_DIRECT), so neither side would measure the "
                "disk; name a directory on another one"
            ) from None
        raise InvalidArgument(f"--dir {given}: {error.strerror}; name a directory on the SSD") from None
