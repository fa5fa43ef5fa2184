"""Compiling the functions that touch shared memory, once a machine: numba with a cache of this project's own.

Numba's own cache looks at one source file a function and refuses to work where neither the package nor the home can be
written to. Here the cache's directory is named after the contents of every source file of this package, so a changed
callee is never served stale, two versions do not overwrite each other, and without any directory the functions are
compiled anew in each process.

Directories, the first that can be written to: ``$KVSTORE_CACHE_DIR``, ``$XDG_CACHE_HOME/kvstore``,
``~/.cache/kvstore``, ``kvstore-<uid>`` in the temporary folder (only if it is this user's and nobody else's: cached
code is executed).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, _CacheLocator

__all__ = ["cache_directory", "compiled", "inlined"]

CACHE_VARIABLE: Final = "KVSTORE_CACHE_DIR"
_KEPT_VERSIONS: Final = 4
_log: Final = logging.getLogger("kvstore.mapped")

F = TypeVar("F", bound=Callable[..., Any])


class _Dispatcher(Protocol):
    _cache: Any

    def compile(self, signature: str) -> Any: ...

    def disable_compile(self) -> None: ...


@functools.cache
def cache_directory() -> Path | None:
    """Where compiled code is kept, made if need be; None where nothing can be written to."""
    for candidate, shared in _candidates():
        directory = candidate / f"compiled-{_stamp()}"
        try:
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            if shared and not _private(candidate):
                continue
            fresh = not directory.is_dir()
            directory.mkdir(mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError:
            continue
        if fresh:
            _log.info("compiling what reads shared memory, once on this machine; it is kept in %s", directory)
            _remove_old_versions(candidate, directory)
        return directory
    _log.warning(
        "no directory to keep compiled code in: it is compiled anew in each process; set %s to one that can be "
        "written to",
        CACHE_VARIABLE,
    )
    return None


def _candidates() -> Iterator[tuple[Path, bool]]:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        yield Path(named), False
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and os.path.isabs(xdg):
        yield Path(xdg) / "kvstore", False
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        yield Path(home) / ".cache" / "kvstore", False
    yield Path(tempfile.gettempdir()) / f"kvstore-{os.geteuid()}", True


def _private(directory: Path) -> bool:
    """Whether only this user can put code into it."""
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


@functools.cache
def _stamp() -> str:
    """Names this package's sources, numba and Python: what else the code depends on, numba checks itself."""
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {sys.implementation.cache_tag}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _remove_old_versions(parent: Path, keep: Path) -> None:
    try:
        others = sorted(parent.glob("compiled-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in [path for path in others if path != keep][_KEPT_VERSIONS:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        pass  # Another process removes them at the same time.


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Numba's idea of a place for one function's code."""

    def __init__(self, directory: Path, function: Callable[..., object]) -> None:
        self._directory = directory
        self._line = function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(self._directory)

    def get_source_stamp(self) -> str:
        return _stamp()

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, function: Callable[..., object], source: str) -> _Locator | None:
        directory = cache_directory()
        return None if directory is None else cls(directory, function)


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [_Locator]  # noqa: RUF012


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl

    def load_overload(self, signature: object, target_context: object) -> object:
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:
            # A file damaged by a crash of the host: compile anew, and replace it.
            _log.warning("kept code could not be read, it is compiled again: %r", error)
            self.flush()
            return None

    def save_overload(self, signature: object, data: object) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            # A full or vanished disk costs the next process a compilation, nothing else.
            _log.warning("compiled code was not kept: %s", error)


def compiled(signature: str, *, nogil: bool = False) -> Callable[[F], F]:
    """Compile a function for one signature, at once, and keep the code on disk.

    Args:
        signature: numba's notation, for example ``"int64(int64, int64)"``.
        nogil: release the interpreter lock while it runs. Taking it back costs up to 5 ms beside a busy thread, so
            only long copies do.
    """

    def compile_function(function: F) -> F:
        dispatcher: _Dispatcher = numba.njit(nogil=nogil, error_model="numpy")(function)
        dispatcher._cache = NullCache() if cache_directory() is None else _Cache(function)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher  # type: ignore[return-value]

    return compile_function


def inlined(function: F) -> F:
    """A function that only compiled functions call; it is compiled into each of them."""
    dispatcher: F = numba.njit(error_model="numpy")(function)
    return dispatcher
