"""A directory of a command's own that is gone with it, wherever in the command an interrupt comes."""

from __future__ import annotations

import atexit
import functools
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["fresh_path", "own_directory"]


def fresh_path(prefix: str, parent: str | Path | None = None) -> Path:
    """A path in ``parent``, by default the folder for temporary files, that nobody else uses; nothing is made."""
    return Path(parent or tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(6)}"


@contextmanager
def own_directory(path: Path) -> Iterator[Path]:
    """Make a directory for this user alone, and remove it at the end with all that is in it.

    An interrupt can come between any two lines, those of a ``finally`` included: the directory is then removed when
    this process exits, whoever handles the interrupt.

    Raises:
        OSError: it cannot be made, for example because it is there already.
    """
    remove = functools.partial(shutil.rmtree, path, ignore_errors=True)
    atexit.register(remove)
    try:
        path.mkdir(mode=0o700)
    except OSError:
        atexit.unregister(remove)
        raise
    try:
        yield path
    finally:
        remove()
        atexit.unregister(remove)
