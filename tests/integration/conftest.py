"""Daemons that the tests of a module share, and clients of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest
from client_adapter import CLIENTS, AnyClient, Connect
from daemon_process import DaemonProcess, warm_up

_names = count()


@pytest.fixture(scope="session", autouse=True)
def _warm_up() -> None:
    warm_up()


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """A daemon with room for everything that a module's tests store."""
    with DaemonProcess(capacity="192MiB", grant="32MiB") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def small_daemon() -> Iterator[DaemonProcess]:
    """A daemon for 16 slots of 64 KiB, all of whose checksums are verified on reads."""
    with DaemonProcess("--slab", "128KiB", "--verify", "always", capacity="1MiB", grant="512KiB") as daemon:
        yield daemon


@pytest.fixture(params=list(CLIENTS))
def kind(request: pytest.FixtureRequest) -> str:
    """Which client a test runs against."""
    name: str = request.param
    return name


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"test-{next(_names)}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def connect(kind: str, namespace: str, stack: ExitStack, daemon: DaemonProcess) -> Connect:
    """Makes clients of the module's daemon, in the test's namespace unless another is given."""

    def make(**options: Any) -> AnyClient:
        return stack.enter_context(CLIENTS[kind](daemon.endpoint, **{"namespace": namespace, **options}))

    return make


@pytest.fixture
def connect_small(kind: str, namespace: str, stack: ExitStack, small_daemon: DaemonProcess) -> Connect:
    """Makes clients of the module's small daemon, which is empty before and after."""

    def make(**options: Any) -> AnyClient:
        client = stack.enter_context(CLIENTS[kind](small_daemon.endpoint, **{"namespace": namespace, **options}))
        stack.callback(client.clear)
        return client

    return make
