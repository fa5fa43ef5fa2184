"""Where CuPy keeps compiled kernels: a directory that can be written to.

CuPy makes ``~/.cupy/kernel_cache`` when it is imported and fails where it cannot, as in a service without a home.
Then ``CUPY_CACHE_DIR`` is set for this process: to ``cupy`` in ``$KVSTORE_CACHE_DIR`` or ``$XDG_CACHE_HOME/kvstore``,
or else to a new directory of this process alone, which goes when it ends. What lies there is code that will be run, so
a directory must be this user's own.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["ensure_cache_directory"]

_log: Final = logging.getLogger("kvstore_kernels.cuda")

_VARIABLE: Final = "CUPY_CACHE_DIR"


def ensure_cache_directory() -> None:
    """Set ``CUPY_CACHE_DIR`` where CuPy's own choice cannot be written to. To be called before CuPy is imported."""
    if _VARIABLE in os.environ or _usable(Path("~/.cupy/kernel_cache").expanduser()):
        return
    for directory in _candidates():
        if _usable(directory):
            os.environ[_VARIABLE] = str(directory)
            return
    temporary = tempfile.mkdtemp(prefix="kvstore-cupy-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    os.environ[_VARIABLE] = temporary
    _log.warning(
        "no directory to keep compiled CUDA kernels in: they are compiled anew in each process; set KVSTORE_CACHE_DIR "
        "to one that can be written to"
    )


def _candidates() -> Iterator[Path]:
    if os.environ.get("KVSTORE_CACHE_DIR"):
        yield Path(os.environ["KVSTORE_CACHE_DIR"]) / "cupy"
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "kvstore" / "cupy"


def _usable(directory: Path) -> bool:
    """Whether a directory is there or can be made, is this user's alone to write to, and takes files."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True
