"""The only module of the daemon that opens, maps, locks and removes files.

Nothing above it calls ``os.open``; tests put a fault-injecting twin in its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import Final

from kvstore.errors import InsufficientMemory, KVStoreError, PermissionRefused, ResourceTaken
from kvstore.mapped.session_file import lock_kind, lock_request

_MADV_POPULATE_WRITE: Final = 23
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG})
"""Errors that say that there is no room, where others say that it is not allowed."""


def make_directory(path: Path, mode: int, gid: int = -1, *, private: bool = True) -> None:
    """Make a directory, or accept one that is there.

    Args:
        path: its parents must exist or be makeable.
        mode: permissions for a new directory.
        gid: group for a new directory, -1 to leave it.
        private: accept one only if it belongs to this user; a guessable path could have been made by another.

    Raises:
        PermissionRefused: it cannot be made, is a link, or belongs to another user.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            made = False
        else:
            made = True
            path.chmod(mode)
            if gid >= 0:
                os.chown(path, -1, gid)
        status = path.lstat()
    except OSError as error:
        raise PermissionRefused(
            f"cannot make the directory {path}: {error.strerror}; choose another place or fix its permissions"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionRefused(f"{path} is no directory; remove it or choose another place")
    if private and not made and status.st_uid != os.geteuid():
        raise PermissionRefused(f"{path} belongs to user {status.st_uid}; choose another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionRefused(f"cannot write into {path}; choose another place or fix its permissions")


def require_socket_or_nothing(path: Path, setting: str = "--endpoint") -> None:
    """Refuse a path, chosen by ``setting``, where binding a socket would replace something that is no socket.

    Raises:
        ResourceTaken: a file, directory or link is there.
    """
    try:
        kind = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(kind):
        raise ResourceTaken(f"{path} exists and is no socket; remove it or choose another {setting}")


class OwnerLock:
    """Exclusive lock on a file that says who owns something; freed by the kernel when the process ends.

    Args:
        path: of the file.
        what: it locks, for messages.
        remedy: what to do where another has it, for messages.
        named: the file must say the owner's pid; else it is left out where there is no room for it.

    Raises:
        ResourceTaken: another process holds it; the message names its pid and ``what``.
        PermissionRefused: the lock file cannot be opened or locked.
        InsufficientMemory: the file system is too full to hold even a pid.
    """

    def __init__(self, path: Path, what: str, remedy: str, *, named: bool = True) -> None:
        self._path = path
        self._fd = self._locked_fd(what, remedy)
        pid = f"{os.getpid()}\n".encode()
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, pid, 0)
        except OSError as error:
            if not named and error.errno in _FULL:
                return
            self.release()
            raise _refused(f"cannot write the lock file {path}", error) from None

    def _locked_fd(self, what: str, remedy: str) -> int:
        while True:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise _refused(f"cannot open the lock file {self._path}", error) from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    os.close(fd)
                    raise _refused(f"cannot lock {self._path}", error) from None
                owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(fd)
                raise ResourceTaken(f"{what} is in use by another daemon (pid {owner}); {remedy}") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    return fd
            # The last owner removed the file between our open and our lock: ours is not the one others see.
            os.close(fd)

    def release(self) -> None:
        """Remove the file and give the lock back; whoever opened it meanwhile sees that it is not the one any more.

        A file that cannot be removed is taken over by the next owner; one that another owner made in a new directory
        of the same name is left alone.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._fd), self._path.lstat()):
                    self._path.unlink()
            os.close(self._fd)
            self._fd = -1


class SharedFile:
    """A new file in shared memory, mapped readable and writable. Never opens or truncates an existing one.

    Raises:
        InsufficientMemory, PermissionRefused: it cannot be made; nothing is left behind.
    """

    def __init__(self, path: Path, size_bytes: int, mode: int, gid: int = -1) -> None:
        self.path = path
        self.size_bytes = size_bytes
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(self._fd, mode)
                if gid >= 0:
                    os.fchown(self._fd, -1, gid)
                os.ftruncate(self._fd, size_bytes)
                self.map = mmap.mmap(self._fd, size_bytes)
            except BaseException:
                os.close(self._fd)
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise _refused(f"cannot make and map {path} of {size_bytes} bytes", error) from None

    def allocate(self, offset: int, length: int) -> None:
        """Give a range its memory, so that touching it can never fail (SIGBUS).

        Raises:
            InsufficientMemory: the file system or its quota is full.
        """
        try:
            os.posix_fallocate(self._fd, offset, length)
        except OSError as error:
            raise InsufficientMemory(
                f"{self.path.parent} has no room for {length} bytes more: {error.strerror}"
            ) from None

    def lock_for_life(self) -> None:
        """Hold the file's ``flock`` until it is closed: who gets it knows that this process is gone."""
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def populate(self, offset: int, length: int) -> None:
        """Fill the page tables of an allocated range. Kernels before 5.14 cannot; pages then fault in one by one."""
        with contextlib.suppress(OSError):
            self.map.madvise(_MADV_POPULATE_WRITE, offset, length)

    def close(self) -> None:
        """Remove the name and unmap; other processes that mapped it keep their memory."""
        self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        # A transfer that still holds a view keeps the mapping until it ends: unmapping under it would crash.
        with contextlib.suppress(BufferError):
            self.map.close()


class SessionFile:
    """A client's file as the daemon sees it: made here, locked by the client.

    Args:
        path: must not exist.
        content: its first bytes.
        size_bytes: its size.
        mode, gid: who may open it.
        mapped: give it all its memory and map it.

    Raises:
        OSError: it cannot be made; nothing is left behind.
    """

    def __init__(
        self, path: Path, content: bytes, size_bytes: int, mode: int, gid: int = -1, *, mapped: bool = False
    ) -> None:
        self.path = path
        self.map: mmap.mmap | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(self._fd, mode)
            if gid >= 0:
                os.fchown(self._fd, -1, gid)
            os.ftruncate(self._fd, size_bytes)
            if mapped:
                os.posix_fallocate(self._fd, 0, size_bytes)
                self.map = mmap.mmap(self._fd, size_bytes)
            os.pwrite(self._fd, content, 0)
        except BaseException:
            self.close()
            raise

    def locked(self) -> bool:
        """Whether some process holds the lock."""
        answer = fcntl.fcntl(self._fd, fcntl.F_GETLK, lock_request(fcntl.F_WRLCK))
        return lock_kind(answer) != fcntl.F_UNLCK

    def close(self) -> None:
        """Remove it; a client that mapped it keeps its memory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.path.unlink(missing_ok=True)
            self.map = None


class Doorbell:
    """A FIFO that clients write a byte into when the daemon sleeps and there is something in a ring.

    Unlike an eventfd it can be opened by name, from other containers too.

    Raises:
        PermissionRefused, InsufficientMemory: it cannot be made; nothing is left behind.
    """

    def __init__(self, path: Path, mode: int, gid: int = -1) -> None:
        self.path = path
        self.fd = self._own_end = -1
        try:
            os.mkfifo(path, 0o600)
            try:
                path.chmod(mode)
                if gid >= 0:
                    os.chown(path, -1, gid)
                self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                # With a writer of our own the FIFO is never at its end, which would make it readable for ever.
                self._own_end = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise _refused(f"cannot make the FIFO {path}", error) from None

    def silence(self) -> None:
        """Read what was rung."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 1 << 16)

    def close(self) -> None:
        """Remove it."""
        for fd in (self.fd, self._own_end):
            if fd >= 0:
                os.close(fd)
        self.fd = self._own_end = -1
        self.path.unlink(missing_ok=True)


def remove_stale(directory: Path, prefix: str, state: tuple[int, bytes] | None = None) -> int:
    """Remove files of a daemon that died, marking each first so that clients that still map it see it is over.

    Args:
        directory: locked by the caller.
        prefix: of the files' names.
        state: offset and bytes to write into each file before it goes, or None.

    Returns:
        How many were removed.

    Raises:
        PermissionRefused: something of that name is there that cannot be removed.
    """
    removed = 0
    for path in directory.glob(prefix + "*"):
        if state is not None:
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.pwrite(fd, state[1], state[0])
                finally:
                    os.close(fd)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise PermissionRefused(
                f"cannot remove {path}, which looks like a dead daemon's: {error.strerror}; remove it"
            ) from None
        removed += 1
    return removed


def _refused(what: str, error: OSError) -> KVStoreError:
    kind = InsufficientMemory if error.errno in _FULL else PermissionRefused
    return kind(f"{what}: {error.strerror}")


def free_bytes(directory: Path) -> int:
    """Bytes that a file system can still take from this user."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def read_lines(path: str) -> list[str]:
    """Lines of a text file that somebody else made.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def read_text(path: str) -> str:
    """A small text file of the kernel's, "" where it is not there."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
