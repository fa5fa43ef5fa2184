"""The only module that opens files of recordings.

Covers: the directory, new files in it, removing old ones. Its calls block for a short time and are for a thread; tests
put a twin that injects faults in its place. An ``OSError`` of the system comes out as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import CorruptRecord
from kvstore.format.lookup_trace import FILE_HEADER_BYTES, LookupFileHeader, decode_header
from kvstore.tiers.files import make_directory

__all__ = ["RECORDING_SUFFIX", "RecordingDirectory", "RecordingFile", "StoredFile"]

RECORDING_SUFFIX: Final = ".lookups"


class StoredFile(NamedTuple):
    """A file of a recording that is in the directory."""

    name: str
    size_bytes: int
    header: LookupFileHeader


class RecordingFile:
    """A new file, which is only appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def append(self, data: bytes) -> None:
        """Append all of ``data``.

        Raises:
            OSError: some of it may have been appended.
        """
        left = memoryview(data)
        while left:
            written = os.write(self._fd, left)
            self.size_bytes += written
            left = left[written:]

    def is_in_place(self) -> bool:
        """Whether its name still leads to it; False where it or its directory was removed, moved or replaced.

        Raises:
            OSError: that cannot be found out.
        """
        try:
            found = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def close(self) -> None:
        """Close it, without a sync: what a crash of the machine loses is the end of a recording."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RecordingDirectory:
    """A directory of recordings.

    Args:
        path: made if it is not there (mode 0700); files in it get mode 0600.

    Raises:
        PermissionRefused: it cannot be made, or belongs to another user.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path, 0o700)
        self.path = path

    def create(self, name: str) -> RecordingFile:
        """A new file; one that is there is never opened."""
        return RecordingFile(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def stored(self) -> list[StoredFile]:
        """Files of recordings, the oldest first; what is no recording is left alone."""
        return sorted(self._stored(), key=lambda file: (file.header.started_unix_ns, file.header.sequence))

    def _stored(self) -> Iterator[StoredFile]:
        for path in self.path.glob(f"*{RECORDING_SUFFIX}"):
            try:
                with open(path, "rb", opener=_no_links) as file:
                    header = decode_header(file.read(FILE_HEADER_BYTES))
                    yield StoredFile(path.name, os.fstat(file.fileno()).st_size, header)
            except (OSError, CorruptRecord):
                continue


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
