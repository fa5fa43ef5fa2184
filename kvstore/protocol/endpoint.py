"""Where client and daemon meet: the default endpoint, and what an endpoint may look like."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from kvstore.errors import InvalidArgument

IPC_PREFIX: Final = "ipc://"
IPC_PATH_BYTES: Final = 107
"""Longest path of a unix socket on Linux, without the closing zero."""


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_RUNTIME_DIR/kvstore``, else a directory of the user's own in the temp folder."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.path.isabs(runtime) and os.path.isdir(runtime):
        return Path(runtime) / "kvstore"
    return Path(tempfile.gettempdir()) / f"kvstore-{os.getuid()}"


def default_endpoint(environ: Mapping[str, str] = os.environ) -> str:
    """The endpoint used where none is given."""
    return f"{IPC_PREFIX}{default_directory(environ)}/default.sock"


def check_endpoint(endpoint: object) -> str:
    """Return a usable ``ipc://`` endpoint with an absolute path; a bare path becomes one.

    Raises:
        InvalidArgument: another transport, an empty or overlong path.
    """
    if isinstance(endpoint, os.PathLike):
        endpoint = os.fspath(endpoint)
    if not isinstance(endpoint, str) or not endpoint:
        raise InvalidArgument(f"endpoint must be 'ipc:///path/to/socket', got {endpoint!r}")
    if endpoint.startswith("tcp://"):
        raise InvalidArgument(
            f"endpoint {endpoint!r}: tcp:// needs encrypted, authenticated connections, which this version "
            "does not have yet; use ipc:///path/to/socket"
        )
    path = endpoint.removeprefix(IPC_PREFIX)
    if "://" in path:
        raise InvalidArgument(f"endpoint {endpoint!r}: unknown transport; use ipc:///path/to/socket")
    if not path or path.startswith("@") or path.endswith("/") or "\0" in path:
        raise InvalidArgument(f"endpoint {endpoint!r} names no socket file; use ipc:///path/to/socket")
    path = os.path.abspath(path)
    try:
        path_bytes = len(path.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(
            f"endpoint {endpoint!r} is no UTF-8 text; use another path, or a UTF-8 locale (LC_ALL=C.UTF-8)"
        ) from None
    if path_bytes > IPC_PATH_BYTES:
        raise InvalidArgument(
            f"endpoint {endpoint!r}: the socket's path has {path_bytes} bytes, a unix socket allows "
            f"{IPC_PATH_BYTES}; use a shorter one"
        )
    return IPC_PREFIX + path


def ipc_path(endpoint: str) -> Path:
    """Socket file of a checked endpoint."""
    return Path(endpoint.removeprefix(IPC_PREFIX))


def default_arena_directory(endpoint: str) -> Path:
    """Directory of a daemon's shared-memory files under ``/dev/shm``, one for each user and endpoint."""
    name = sha256(os.fsencode(endpoint)).hexdigest()[:12]
    return Path("/dev/shm") / f"kvstore-{os.getuid()}-{name}"
