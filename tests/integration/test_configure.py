"""Policies of a running daemon are changed, by the SDK and by the command: nothing is lost, wrong names are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.errors import InvalidArgument
from kvstore.policy.registry import POLICIES
from kvstore.protocol.messages import PutStatus
from kvstore_client import Client

BLOCK_BYTES = 4096 - 256
CAPACITY_BLOCKS = 64


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    root: Path = tmp_path_factory.mktemp("configure")
    below = ["--ssd", str(root / "below"), "--ssd-capacity", "64MiB", "--set", "ssd.reserve_bytes=0", "--slab", "64KiB"]
    with DaemonProcess(*below, capacity=str(CAPACITY_BLOCKS * 4096), grant="1MiB") as started:
        yield started


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def payload(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


def test_configure_without_names_says_what_there_is(daemon: DaemonProcess):
    with Client(daemon.endpoint) as client:
        now = client.configure()
        assert now.policy in POLICIES
        assert (now.ssd_policy, now.admission) == ("lru", "all")


def test_configure_every_policy_in_turn_keeps_every_block(daemon: DaemonProcess):
    with Client(daemon.endpoint, namespace="turns") as client:
        for number in range(1, 40):
            assert client.put(key(number), payload(number), parent=key(number - 1) if number > 1 else None) in (
                PutStatus.STORED,
                PutStatus.EXISTS,
            )
        for name in [*POLICIES, "lru"]:
            assert client.configure(policy=name, ssd_policy=name).policy == name
            for number in range(1, 40):
                assert client.get(key(number)) == payload(number), f"block {number} is lost with {name}"
            assert client.verify().problems == []
        client.configure(policy="adaptive")
        assert client.stats().eviction.following == "lru", "nothing was learned yet"
        client.configure(policy="lru")
        stats = client.stats()
        assert stats.eviction.policy == "lru"
        assert stats.eviction.following == ""
        assert stats.eviction.ssd_policy == "lru"
        assert stats.eviction.switched >= 2 * (len(POLICIES) - 1)


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda client: client.configure(policy=5), "policy must be text, got 5"),
        (lambda client: client.configure(ssd_policy=None), "ssd_policy must be text, got None"),
        (lambda client: client.configure(admission=b"all"), "admission must be text, got b'all'"),
        (lambda client: client.record(1), "action must be text, got 1"),
        (lambda client: client.why([], namespace=7), "namespace must be text, got 7"),
        (lambda client: client.why([], prefixes="0123456789"), "prefixes must be a sequence of texts"),
        (lambda client: client.why([], prefixes=["01234567", 5]), r"prefixes\[1\] must be text, got 5"),
    ],
)
def test_names_that_are_no_text_are_refused_by_their_arguments(
    daemon: DaemonProcess, ask: Callable[[Client], object], what: str
):
    with Client(daemon.endpoint) as client, pytest.raises(InvalidArgument, match=f"^{what}"):
        ask(client)


@pytest.mark.parametrize("option", ["--policy", "--ssd-policy", "--admission"])
def test_configure_with_an_empty_name_is_refused(daemon: DaemonProcess, option: str):
    result = CliRunner().invoke(app, ["configure", option, "", "--endpoint", daemon.endpoint])
    assert isinstance(result.exception, InvalidArgument)
    assert str(result.exception).startswith(f"{option}: the name is empty")


@pytest.mark.parametrize("wrong", [{"policy": "mru"}, {"ssd_policy": "mru"}, {"admission": "some"}])
def test_configure_unknown_name_is_refused_and_changes_nothing(daemon: DaemonProcess, wrong: dict[str, str]):
    with Client(daemon.endpoint) as client:
        before = client.configure()
        with pytest.raises(InvalidArgument, match=r"unknown .*there are: "):
            client.configure(**{"policy": "lru", **wrong})
        after = client.configure()
        assert (before.policy, before.ssd_policy, before.admission) == (after.policy, after.ssd_policy, after.admission)
