"""The control benchmark against a live daemon: its form and its checks, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvstore.cli.bench.control import DEPTH, LONG_MATCH_KEYS, Samples, measure_control
from kvstore.cli.bench.idle import measure_idle
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import DaemonUnavailable
from kvstore_client import Client

SMALL = Samples(rounds=2, round_trips=20, long_matches=5, pipelined=100)


def test_bench_control_reports_each_operation_beside_the_echo() -> None:
    rounds: list[None] = []
    with PrivateDaemon(capacity_bytes=32 << 20) as daemon:
        report = measure_control(daemon.endpoint, SMALL, lambda: rounds.append(None))
        with Client(daemon.endpoint) as client:
            assert client.stats().dram.blocks == 0
    assert len(rounds) == 2
    assert [(row.op, row.batch, row.depth) for row in report.rows] == [
        ("ping", 0, None),
        ("match", 1, None),
        ("exists", 1, None),
        ("ping", 0, DEPTH),
        ("match", 1, DEPTH),
        ("exists", 1, DEPTH),
        ("match", LONG_MATCH_KEYS, None),
    ]
    for row in report.rows:
        assert row.ratio is not None
        assert row.ratio > 0
        assert row.ops_per_s is not None
        if row.depth is None:
            assert row.median_us is not None
            assert row.p99_us is not None
            assert row.p99_us >= row.median_us > 0
            assert row.baseline_median_us is not None
            assert row.ratio == pytest.approx(row.baseline_median_us / row.median_us, rel=0.02)
        else:
            assert row.baseline_ops_per_s is not None
            assert row.ratio == pytest.approx(row.ops_per_s / row.baseline_ops_per_s, rel=0.02)
    assert [row.samples for row in report.rows] == [40, 40, 40, 200, 200, 200, 10]


def test_bench_control_again_on_the_same_daemon_works() -> None:
    with PrivateDaemon(capacity_bytes=32 << 20) as daemon:
        first = measure_control(daemon.endpoint, SMALL)
        second = measure_control(daemon.endpoint, SMALL)
    assert len(first.rows) == len(second.rows)


def test_idle_clients_are_measured_with_the_daemon() -> None:
    with PrivateDaemon(capacity_bytes=32 << 20) as daemon:
        row = measure_idle(daemon.endpoint, daemon.pid, 1.0, clients=2, settle_seconds=0.1)
    assert (row.op, row.batch, row.limit) == ("idle", 2, 0.01)
    assert row.core_share is not None
    assert 0 <= row.core_share < 0.5
    assert row.seconds == pytest.approx(1.0, abs=0.5)


def test_idle_without_daemon_says_which_endpoint() -> None:
    with pytest.raises(DaemonUnavailable, match=r"idle client 0 did not start: .*/tmp/kvstore-nobody\.sock"):
        measure_idle("ipc:///tmp/kvstore-nobody.sock", os.getpid(), 0.1, clients=1)


def kvstore(*arguments: str) -> str:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_bench_control_command_prints_one_json_object() -> None:
    report = json.loads(kvstore("bench", "control", "--rounds", "1", "--seconds", "1", "--json"))
    assert set(report) == {"machine", "baseline", "rows"}
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert "ROUTER" in report["baseline"]
    assert len(report["rows"]) == 8
    assert set(report["rows"][-1]) == {"op", "batch", "seconds", "core_share", "limit"}


def test_bench_control_command_prints_a_table() -> None:
    shown = kvstore("bench", "control", "--rounds", "1")
    for words in ("request", "p99", "ratio", "aim", "baseline", "machine"):
        assert words in shown
