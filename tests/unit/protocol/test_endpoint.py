from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.errors import InvalidArgument
from kvstore.protocol.endpoint import (
    IPC_PATH_BYTES,
    check_endpoint,
    default_arena_directory,
    default_directory,
    default_endpoint,
    ipc_path,
)


def test_default_endpoint_runtime_directory_is_used_when_it_is_there(tmp_path: Path):
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert default_endpoint(environ) == f"ipc://{tmp_path}/kvstore/default.sock"
    assert check_endpoint(default_endpoint(environ)) == default_endpoint(environ)


@pytest.mark.parametrize("runtime", [None, "", "relative/path", "/nonexistent/runtime/directory"])
def test_default_directory_no_runtime_directory_is_private_to_the_user(runtime):
    environ = {} if runtime is None else {"XDG_RUNTIME_DIR": runtime}
    directory = default_directory(environ)
    assert directory.is_absolute()
    assert directory.name == f"kvstore-{os.getuid()}"


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("ipc:///run/kv/a.sock", "ipc:///run/kv/a.sock"),
        ("/run/kv/a.sock", "ipc:///run/kv/a.sock"),
        (Path("/run/kv/a.sock"), "ipc:///run/kv/a.sock"),
        ("ipc:///run/../run/kv/./a.sock", "ipc:///run/kv/a.sock"),
        ("ipc:///run/Käse/a b.sock", "ipc:///run/Käse/a b.sock"),
    ],
)
def test_check_endpoint_usable_forms_become_one(given, endpoint):
    assert check_endpoint(given) == endpoint
    assert check_endpoint(endpoint) == endpoint
    assert ipc_path(endpoint) == Path(endpoint.removeprefix("ipc://"))


def test_check_endpoint_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert check_endpoint("a.sock") == check_endpoint("ipc://a.sock") == f"ipc://{tmp_path}/a.sock"


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        (None, "endpoint must be 'ipc:///path/to/socket', got None"),
        (5, "got 5"),
        ("", "got ''"),
        (b"ipc:///a", "got b'ipc:///a'"),
        ("tcp://127.0.0.1:5555", "tcp:// needs encrypted, authenticated connections"),
        ("inproc://x", "unknown transport"),
        ("http://localhost", "unknown transport"),
        ("ipc://", "names no socket file"),
        ("ipc://@abstract", "names no socket file"),
        ("ipc:///run/kv/", "names no socket file"),
        ("ipc:///run/\0kv", "names no socket file"),
        ("ipc:///run/\ud800", "is no UTF-8 text"),
        ("ipc:///" + "x" * IPC_PATH_BYTES, f"has {IPC_PATH_BYTES + 1} bytes, a unix socket allows {IPC_PATH_BYTES}"),
        ("ipc:///" + "ä" * 54, "has 109 bytes"),
    ],
)
def test_check_endpoint_unusable_refused_with_reason(endpoint, message):
    with pytest.raises(InvalidArgument, match="endpoint") as caught:
        check_endpoint(endpoint)
    assert message in str(caught.value)


def test_check_endpoint_longest_path_accepted():
    endpoint = "ipc:///" + "x" * (IPC_PATH_BYTES - 1)
    assert check_endpoint(endpoint) == endpoint


def test_default_arena_directory_differs_by_endpoint():
    one, two = default_arena_directory("ipc:///run/a.sock"), default_arena_directory("ipc:///run/b.sock")
    assert one != two
    assert one.parent == Path("/dev/shm")
    assert one.name.startswith(f"kvstore-{os.getuid()}-")
    assert default_arena_directory("ipc:///run/a.sock") == one
