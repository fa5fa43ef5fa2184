"""A live daemon records what is looked up, and the recording gives the hit rates of the trace that was replayed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from synthetic_trace import synthetic_requests, write_trace
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.cli.replay_loop import replay_namespace, replay_trace
from kvstore.errors import InvalidArgument
from kvstore.simulator.arrivals import Arrival
from kvstore.simulator.prefix import simulate
from kvstore.simulator.trace import TraceRequest
from kvstore.simulator.trace_files import read_requests
from kvstore_client import Client

BLOCK_BYTES = 3840
REQUESTS = [request for request in synthetic_requests(250, seed=21, longest_blocks=60) if request.full_blocks]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recording") / "recordings"


@pytest.fixture(scope="module")
def daemon(recordings: Path) -> Iterator[DaemonProcess]:
    settings = ["--set", f"record.directory={recordings}", "--slab", "64KiB"]
    with DaemonProcess(*settings, capacity=str(150 * 4096), grant="4MiB") as started:
        yield started


def replayed(daemon: DaemonProcess, requests: list[TraceRequest], *, mapped: bool) -> float:
    """The hit rate of a replay that began with an empty namespace of its own."""
    with Client(
        daemon.endpoint,
        namespace=replay_namespace(f"mapped {mapped}", BLOCK_BYTES),
        payload_bytes=(BLOCK_BYTES,),
        mapped=mapped,
    ) as client:
        report = replay_trace(client, requests, trace="synthetic", block_bytes=BLOCK_BYTES)
        assert report.wrong_bytes == 0
        client.clear()
        return report.hit_rate


@pytest.mark.parametrize("mapped", [True, False])
def test_recording_gives_the_hit_rates_of_the_trace(
    daemon: DaemonProcess, recordings: Path, tmp_path: Path, mapped: bool
) -> None:
    with Client(daemon.endpoint) as client:
        assert client.record("start").state == "on"
        rate = replayed(daemon, REQUESTS, mapped=mapped)
        status = client.record("stop")
        assert (status.state, status.problem, status.dropped_requests) == ("off", "", 0)
    trace = read_requests(recordings)
    assert (trace.format, trace.block_tokens, trace.slot_bytes, trace.codec) == ("recording", 512, 4096, "raw")
    assert len(trace.requests) == len(REQUESTS)
    assert [len(request.ids) for request in trace.requests] == [len(request.full_blocks) for request in REQUESTS]
    original = [Arrival(request.timestamp_ms, request.full_blocks) for request in REQUESTS]
    for policy, capacity in (("lru", 150), ("clock", 60), ("s3fifo", 100)):
        assert list(simulate(trace.arrivals, policy, capacity).hits) == list(simulate(original, policy, capacity).hits)
    assert simulate(trace.arrivals, "lru", 150).hit_rate == pytest.approx(rate, abs=1e-6)
    assert any("the daemon itself hit" in note for note in trace.notes)
    # And so does the command.
    path = write_trace(tmp_path / "trace.jsonl", REQUESTS)
    arguments = ["--exact", "--json", "--capacities", "40,150,1000", "--policies", "lru,arc,opt"]
    found = [
        json.loads(CliRunner().invoke(app, ["tune", str(source), *arguments]).stdout)["rows"]
        for source in (recordings, path)
    ]
    for one, other in zip(*found, strict=True):
        for field in ("policy", "capacity_blocks", "hit_rate", "hit_rate_second_half"):
            assert one[field] == other[field]


def test_status_is_in_the_statistics_and_of_the_command(daemon: DaemonProcess, recordings: Path) -> None:
    runner = CliRunner()

    def told(action: str) -> dict[str, object]:
        result = runner.invoke(app, ["record", action, "--endpoint", daemon.endpoint, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    with Client(daemon.endpoint) as client:
        told("stop")
        assert told("status")["state"] == "off"
        assert told("start")["state"] == told("start")["state"] == "on"
        recording = client.stats().recording
        assert recording is not None
        assert (recording.state, recording.directory) == ("on", str(recordings))
        assert Path(recording.directory, recording.file).stat().st_mode & 0o777 == 0o600
        shown = runner.invoke(app, ["record", "status", "--endpoint", daemon.endpoint]).stdout
        assert "state" in shown
        assert str(recordings) in shown.replace("\n", "")
        told("stop")
        with pytest.raises(InvalidArgument, match="to start or to stop, not 'pause'"):
            client.record("pause")


def test_a_recording_whose_directory_is_removed_is_not_called_written(tmp_path: Path) -> None:
    directory = tmp_path / "recordings"
    settings = ["--set", f"record.directory={directory}", "--slab", "64KiB"]
    runner = CliRunner()
    with DaemonProcess(
        *settings, capacity=str(150 * 4096), grant="4MiB", expected_errors=("recording_failed",)
    ) as started:
        with Client(started.endpoint) as client:
            client.record("start")
            replayed(started, REQUESTS[:20], mapped=False)
            shutil.rmtree(directory)
        stopped = runner.invoke(app, ["record", "stop", "--endpoint", started.endpoint], env={"COLUMNS": "300"})
        assert stopped.exit_code == 1
        for action in ("stop", "status"):
            result = runner.invoke(app, ["record", action, "--endpoint", started.endpoint], env={"COLUMNS": "300"})
            assert result.exit_code == (action == "stop")
            shown = " ".join(result.stdout.split())
            assert shown == " ".join(stopped.stdout.split())
            assert "was removed or moved while it was written; nothing of the recording is left there" in shown
            assert "file none is left" in shown
            assert "next" not in shown
        (event,) = (event for event in started.events() if event["event"] == "recording_failed")
        assert str(directory) in event["why"]
        assert not directory.exists()


def test_replay_takes_recordings(daemon: DaemonProcess, recordings: Path) -> None:
    with Client(daemon.endpoint) as client:
        client.record("start")
        replayed(daemon, REQUESTS[:80], mapped=False)
        client.record("stop")
    result = CliRunner().invoke(app, ["replay", str(recordings), "--json", "--capacity-blocks", "150"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["wrong_bytes"] == 0
    assert report["hit_rate"] == pytest.approx(
        simulate(read_requests(recordings).arrivals, "lru", 150).hit_rate, abs=1e-6
    )


def test_recording_begins_with_the_daemon_and_survives_its_death(tmp_path: Path) -> None:
    settings = ["--set", f"record.directory={tmp_path}", "--set", "record.enabled=true", "--slab", "64KiB"]
    with DaemonProcess(*settings, capacity=str(150 * 4096), grant="4MiB") as started:
        replayed(started, REQUESTS[:20], mapped=False)
        with Client(started.endpoint) as client:
            client.record("stop")
            assert client.record("start").state == "on"
        assert started.process is not None
        os.kill(started.process.pid, signal.SIGTERM)
        assert started.process.wait(20) == 0
        replay = read_requests(sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_size)[-1])
        assert len(replay.requests) == 20
