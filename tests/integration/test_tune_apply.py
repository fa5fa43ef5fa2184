"""``kvstore tune --apply``: the running daemon's policy changes, and what cannot change is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from synthetic_trace import synthetic_requests, write_trace
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.errors import DaemonUnavailable
from kvstore_client import Client

CAPACITY_BYTES = 64 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    root = tmp_path_factory.mktemp("apply")
    below = ["--ssd", str(root / "below"), "--ssd-capacity", "64MiB", "--set", "ssd.reserve_bytes=0"]
    with DaemonProcess(*below, capacity=str(CAPACITY_BYTES)) as started:
        yield started


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "trace.jsonl", synthetic_requests(300, seed=4))


def tune(trace: Path, endpoint: str, *arguments: str) -> str:
    common = [
        "tune",
        str(trace),
        "--apply",
        "--endpoint",
        endpoint,
        "--block-bytes",
        "1MiB",
        "--policies",
        "s3fifo,opt",
    ]
    result = CliRunner().invoke(app, [*common, *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_recommended_policy_is_that_of_the_daemon_afterwards(daemon: DaemonProcess, trace: Path) -> None:
    with Client(daemon.endpoint) as client:
        assert client.configure(policy="lru", ssd_policy="lru").policy == "lru"
        found = json.loads(tune(trace, daemon.endpoint, "--json"))
        advice, applied = found["recommendation"], found["applied"]
        # The daemon's own capacity is what it is about, and one of those that were tried.
        assert advice["capacity_bytes"] == CAPACITY_BYTES
        assert CAPACITY_BYTES in {row["capacity_bytes"] for row in found["rows"]}
        assert (applied["policy_before"], applied["policy"]) == ("lru", "s3fifo")
        # No SSD was simulated, so that tier is left alone.
        assert (applied["ssd_policy_before"], applied["ssd_policy"]) == ("lru", "lru")
        assert client.stats().eviction.policy == "s3fifo"
        assert client.stats().eviction.ssd_policy == "lru"
        said = " ".join(applied["not_changed"])
        assert '[eviction] policy = "s3fifo"' in said
        assert "The SSD stays as it is, 64.0 MiB" in said
        assert "DRAM stays" not in said
        shown = tune(trace, daemon.endpoint, "--have", "128MiB", "--codecs", "kivi4", "--decode-gb-per-s", "10")
        shown = " ".join(shown.split())
        assert "s3fifo, as it was" in shown
        assert "capacity_bytes = 134217728" in shown
        assert "TensorStore(layout, 'kivi4'" in shown


def test_daemon_that_is_not_there_is_said_before_anything_is_simulated(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailable):
        tune(trace, f"ipc://{tmp_path}/none.sock", "--timeout", "0.5")
