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
TCP_PREFIX: Final = "tcp://"
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


def check_event_endpoint(endpoint: object) -> str:
    """Return a usable endpoint for KV events: ``ipc://`` as of ``check_endpoint``, or ``tcp://HOST:PORT``.

    Over tcp there is neither encryption nor authentication: events tell keys, never contents.

    Raises:
        InvalidArgument: it is neither.
    """
    if isinstance(endpoint, str) and endpoint.startswith(TCP_PREFIX):
        host, colon, port = endpoint.removeprefix(TCP_PREFIX).rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
            raise InvalidArgument(f"endpoint {endpoint!r} must be tcp://HOST:PORT, for example tcp://*:5557")
        return endpoint
    return check_endpoint(endpoint)


def default_event_endpoints(endpoint: str) -> tuple[str, str]:
    """Where a daemon at ``endpoint`` publishes KV events and replays them, unless it is told otherwise."""
    return f"{endpoint}.events", f"{endpoint}.replay"


def ipc_path(endpoint: str) -> Path:
    """Socket file of a checked endpoint."""
    return Path(endpoint.removeprefix(IPC_PREFIX))


def default_arena_directory(endpoint: str) -> Path:
    """Directory of a daemon's shared-memory files under ``/dev/shm``, one for each user and endpoint."""
    name = sha256(os.fsencode(endpoint)).hexdigest()[:12]
    return Path("/dev/shm") / f"kvstore-{os.getuid()}-{name}"


def default_recording_directory(endpoint: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Directory of what a daemon records, one for each endpoint, among the user's own files that outlive a session."""
    state = environ.get("XDG_STATE_HOME", "")
    root = Path(state) if state and os.path.isabs(state) else Path(environ.get("HOME") or "/") / ".local" / "state"
    return root / "kvstore" / f"recordings-{sha256(os.fsencode(endpoint)).hexdigest()[:12]}"
