"""Compiling with numba, once a machine: a cache of this project's own.

Numba's own cache looks at one source file a function and refuses to work where neither the package nor the home can be
written to. Here a package's functions have a directory named after the contents of every source file of the package,
so a changed callee is never served stale, two versions do not overwrite each other, and without any directory the
functions are compiled anew in each process. A package has its own ``CodeCache``; what one changes leaves the code of
others alone.

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
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol, TypeVar

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, _CacheLocator

__all__ = ["CodeCache", "inlined"]

CACHE_VARIABLE: Final = "KVSTORE_CACHE_DIR"
_KEPT_VERSIONS: Final = 4

F = TypeVar("F", bound=Callable[..., Any])


class _Dispatcher(Protocol):
    _cache: Any

    _compile_for_args: Callable[..., Any]

    def compile(self, signature: str) -> Any: ...

    def disable_compile(self) -> None: ...


class CodeCache:
    """Where the compiled functions of one package are kept.

    Args:
        sources: the package's directory. Its ``*.py``, without those of packages inside it, name the code: every
            function that is compiled into another one must be of this package, or never change.
        purpose: what the code does, for the log of the first compilation.
        logger: of the package.
    """

    def __init__(self, sources: Path, purpose: str, logger: logging.Logger) -> None:
        self._sources = sources
        self._purpose = purpose
        self._logger = logger

    @functools.cached_property
    def directory(self) -> Path | None:
        """Where compiled code is kept, made if need be; None where nothing can be written to."""
        family = f"compiled-{self._sources.name}-"
        for candidate, shared in _candidates():
            directory = candidate / (family + self.stamp)
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
                self._logger.info("compiling what %s, once on this machine; it is kept in %s", self._purpose, directory)
                _remove_old_versions(candidate, family, directory)
            return directory
        self._logger.warning(
            "no directory to keep compiled code in: it is compiled anew in each process; set %s to one that can be "
            "written to",
            CACHE_VARIABLE,
        )
        return None

    @functools.cached_property
    def stamp(self) -> str:
        """Names the package's sources, this file, numba and Python: what else code depends on, numba checks itself."""
        digest = hashlib.sha256(f"{numba.__version__} {sys.version} {sys.implementation.cache_tag}".encode())
        for source in [*sorted(self._sources.glob("*.py")), Path(__file__)]:
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return digest.hexdigest()[:20]

    def compiled(self, signature: str, *, nogil: bool = False) -> Callable[[F], F]:
        """Compile a function for one signature, at once, and keep the code on disk.

        Args:
            signature: numba's notation, for example ``"int64(int64, int64)"``.
            nogil: release the interpreter lock while it runs. Taking it back costs up to 5 ms beside a busy thread,
                so only long work does.
        """

        def compile_function(function: F) -> F:
            dispatcher: _Dispatcher = self.compiled_when_called(function, nogil=nogil)  # type: ignore[assignment]
            with _interrupts_later():
                dispatcher.compile(signature)
            dispatcher.disable_compile()
            return dispatcher  # type: ignore[return-value]

        return compile_function

    def compiled_when_called(self, function: F, *, nogil: bool = True) -> F:
        """Compile a function at its first call with arguments of some types, and keep the code on disk."""
        dispatcher: _Dispatcher = numba.njit(nogil=nogil, error_model="numpy")(function)
        dispatcher._cache = NullCache() if self.directory is None else _make_cache(self, function)
        compile_for = dispatcher._compile_for_args

        def compile_undisturbed(*args: object, **options: object) -> object:
            with _interrupts_later():
                return compile_for(*args, **options)

        dispatcher._compile_for_args = compile_undisturbed
        return dispatcher  # type: ignore[return-value]


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Interrupts are handled at the end.

    Inside of numba or LLVM an exception from a signal's handler leaves the compiler's lock taken, or memory that is
    freed twice. Compiling in another thread, where no handler runs, is not possible during an import: it imports too.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    interrupts: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            handler(*interrupts[-1])


def inlined(function: F) -> F:
    """A function that only compiled functions call; it is compiled into each of them."""
    dispatcher: F = numba.njit(error_model="numpy")(function)
    return dispatcher


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


def _remove_old_versions(parent: Path, family: str, keep: Path) -> None:
    try:
        others = sorted(parent.glob(f"{family}*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in [path for path in others if path != keep][_KEPT_VERSIONS:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        pass  # Another process removes them at the same time.


def _make_cache(code: CodeCache, function: Callable[..., object]) -> FunctionCache:
    """Numba's cache of one function, in our place, with our stamp; numba asks classes for both, not objects."""

    class Locator(_CacheLocator):  # type: ignore[misc]
        _py_file = function.__code__.co_filename  # named where a function turns out to be one that cannot be kept

        def get_cache_path(self) -> str:
            return str(code.directory)

        def get_source_stamp(self) -> str:
            return code.stamp

        def get_disambiguator(self) -> str:
            return str(function.__code__.co_firstlineno)

        @classmethod
        def from_function(cls, function: Callable[..., object], source: str) -> Locator:
            return cls()

    class CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
        _locator_classes = [Locator]  # noqa: RUF012

    class Cache(FunctionCache):  # type: ignore[misc]
        _impl_class = CacheImpl

        def load_overload(self, signature: object, target_context: object) -> object:
            try:
                return super().load_overload(signature, target_context)
            except Exception as error:
                # A file damaged by a crash of the host: compile anew, and replace it.
                code._logger.warning("kept code could not be read, it is compiled again: %r", error)
                self.flush()
                return None

        def save_overload(self, signature: object, data: object) -> None:
            try:
                super().save_overload(signature, data)
            except OSError as error:
                # A full or vanished disk costs the next process a compilation, nothing else.
                code._logger.warning("compiled code was not kept: %s", error)

    return Cache(function)
