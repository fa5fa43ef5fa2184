"""A client's own file: the daemon makes it, the client locks it for as long as it lives.

The lock is a POSIX record lock (``fcntl`` F_SETLK) over the whole file: the kernel frees it when the process ends,
however it ends, and a forked child does not inherit it. See ``docs/mapped.md``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from kvstore.errors import CorruptRecord

SESSION_MAGIC: Final = b"KVCLIENT"
SESSION_VERSION: Final = 1
"""A file that is only locked."""

MAPPED_SESSION_VERSION: Final = 2
"""A file that client and daemon also share as memory (``client_file``)."""

SESSION_FILE_BYTES: Final = 4096

# magic 8 | version u32 | reserved u32 | incarnation u64 | session u64
_LAYOUT: Final = struct.Struct("<8sIIQQ")
_LOCK: Final = struct.Struct("@hhqqi")


@dataclass(frozen=True, slots=True)
class SessionHeader:
    """Whose file it is."""

    incarnation: int
    session: int
    mapped: bool = False


def encode_session_header(header: SessionHeader) -> bytes:
    """The first bytes of the file."""
    version = MAPPED_SESSION_VERSION if header.mapped else SESSION_VERSION
    return _LAYOUT.pack(SESSION_MAGIC, version, 0, header.incarnation, header.session)


def decode_session_header(data: bytes) -> SessionHeader:
    """Read a session file.

    Raises:
        CorruptRecord: it is no session file, or one of another version.
    """
    if len(data) < _LAYOUT.size:
        raise CorruptRecord(f"no session file: {len(data)} bytes")
    magic, version, reserved, incarnation, session = _LAYOUT.unpack(data[: _LAYOUT.size])
    if magic != SESSION_MAGIC or version not in (SESSION_VERSION, MAPPED_SESSION_VERSION) or reserved:
        raise CorruptRecord("no session file of this version")
    return SessionHeader(incarnation, session, version == MAPPED_SESSION_VERSION)


def lock_request(kind: int) -> bytes:
    """``struct flock`` over the whole file, for ``fcntl.fcntl(fd, F_SETLK | F_GETLK, ...)``."""
    return _LOCK.pack(kind, 0, 0, 0, 0)


def lock_kind(answer: bytes) -> int:
    """The kind of lock in an answered ``struct flock`` (F_UNLCK: nobody holds one)."""
    kind: int = _LOCK.unpack(answer[: _LOCK.size])[0]
    return kind
