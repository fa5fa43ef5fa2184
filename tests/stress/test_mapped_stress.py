"""``kvstore verify --stress`` in CI: a minute of it, stage by stage, the controls that must fail, and the command."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest
from daemon_process import DaemonProcess, child_environment, warm_up

from kvstore.cli.stress.crew import Crew, WorkerDied
from kvstore.cli.stress.daemon_stages import DAEMON_STAGES, run_daemon_stage
from kvstore.cli.stress.index_stages import CONTROLS, INDEX_STAGES, IndexStage, run_index_stage
from kvstore.cli.stress.report import StageReport
from kvstore_client import AsyncClient

INDEX_S = 4.0
CONTROL_S = 10.0
DAEMON_S = 11.0


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    warm_up()


def told(report: StageReport) -> str:
    return f"{report.name}: {report.outcome}; {report.details}; " + "; ".join(report.problems)


def test_index_under_constant_overwriting_gives_no_wrong_word():
    """Copies, batches, views; 64 KiB, 1 MiB and mixed; every stage must also have seen what it is there to see."""
    with Crew() as crew:
        reports = [run_index_stage(crew, stage, INDEX_S, seed) for seed, stage in enumerate(INDEX_STAGES)]
    for report in reports:
        assert report.ok, told(report)
        assert report.reads > report.hits > 100, told(report)
        assert report.details["written"] > 200, told(report)
        assert report.details["moved"] > 10, told(report)
    assert sum(report.retries or 0 for report in reports) > 20, "nothing was overwritten under a reader"
    assert sum(report.details["held_by_readers"] for report in reports) > 20, "nothing was read while it was to go"
    assert sum(report.details.get("overflows", 0) for report in reports) > 0, "no bucket was ever full"


@pytest.mark.parametrize("stage", CONTROLS, ids=lambda stage: stage.name)
def test_control_with_a_fault_is_seen_to_be_wrong(stage: IndexStage):
    with Crew() as crew:
        report = run_index_stage(crew, stage, CONTROL_S, 1)
    assert report.wrong_blocks > 0, told(report)
    assert report.wrong_bytes >= 8 * report.wrong_blocks
    assert report.ok, told(report)


@pytest.mark.parametrize("profile", DAEMON_STAGES)
def test_daemon_under_kills_and_eviction_gives_no_wrong_byte_and_leaks_no_slot(profile: str):
    with Crew() as crew:
        report = run_daemon_stage(crew, profile, DAEMON_S, 1)
    assert report.ok, told(report)
    details = report.details
    assert report.hits > 50, told(report)
    assert details["daemon_kills"] >= 1, told(report)
    assert details["clients_killed"] >= 1, told(report)
    assert details["clients_stopped"] >= 1, told(report)
    assert details["killed"] >= 5, told(report)
    assert details["evicted_blocks"] > 50, told(report)
    if profile == "mixed":
        assert details["moved_records"] > 0, told(report)


async def test_async_puts_of_several_sizes_at_once_harm_no_neighbour():
    """What the daemon stage found first: two operations took one lane for two sizes and wrote over a slot's end."""
    sizes = [1 << 20, 64 << 10, 4000, 300_000, 700_000, 20_000, 100_000, 500_000, 200_000, 900_000]
    with DaemonProcess("--slab", "2MiB", capacity="48MiB", grant="16MiB") as daemon:
        with daemon.connect() as client:
            for number in range(1, 100):
                client.put(bytes([number]) * 32, bytes([number]) * (64 << 10))
        for life in range(5):
            async with AsyncClient(daemon.endpoint) as client:
                await asyncio.gather(
                    *(client.put(bytes([100 + life, size % 251 + 1]) * 16, bytes(size)) for size in sizes)
                )
                assert (await client.verify()).problems == []


def test_worker_that_hangs_is_ended_by_its_own_alarm():
    with Crew() as crew:
        (worker,) = crew.hire(1)
        worker._tell({"role": "churn", "limit_s": 0.2, "arguments": {}})
        with pytest.raises(WorkerDied, match="TypeError"):
            worker.wait("done", time.monotonic() + 10.0)
        # A stopped process takes no commands; its alarm goes off all the same.
        worker.signal(signal.SIGSTOP)
        worker.signal(signal.SIGALRM)
        worker.signal(signal.SIGCONT)
        with pytest.raises(WorkerDied, match="SIGALRM"):
            worker.wait("done", time.monotonic() + 10.0)


# ------------------------------------------------------------------ the command


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "kvstore", "verify", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )


def test_verify_stress_interrupted_ends_at_once_and_leaves_nothing_behind():
    process = command("--stress", "60")
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("index, copy, 64 KiB: ")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=15.0)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "kvstore: error: interrupted"
    assert not output


def test_verify_stress_with_an_endpoint_is_refused():
    process = command("--stress", "60", "--endpoint", "/tmp/kv.sock", "--json")
    output, errors = process.communicate(timeout=30.0)
    assert process.returncode == 2
    assert "--stress takes no --endpoint" in errors
    assert not output


def test_verify_stress_runs_every_stage_and_exits_by_the_outcome(monkeypatch, capsys):
    from kvstore.cli import main
    from kvstore.cli.stress import plan

    def without_daemon(crew: Crew, profile: str, seconds: float, seed: int) -> StageReport:
        return StageReport(phase="daemon", name=profile, processes=4, reads=2, hits=2, problems=["a slot was lost"])

    monkeypatch.setattr(plan, "INDEX_STAGES", INDEX_STAGES[-1:])
    monkeypatch.setattr(plan, "CONTROLS", CONTROLS[1:2])
    monkeypatch.setattr(plan, "run_daemon_stage", without_daemon)
    monkeypatch.setattr(plan, "_INDEX_SHARE", 0.05)
    assert main._run(["verify", "--stress", "30", "--json"], debug=True) == 1
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["ok"] is False
    assert [stage["phase"] for stage in report["stages"]] == ["index", "control", "daemon", "daemon", "daemon"]
    assert [stage["problems"] for stage in report["stages"]] == [[], []] + [["a slot was lost"]] * 3
    assert report["stages"][0]["hits"] > 0
    assert "index, copy and views, 8 slots: " in shown.err
    assert "daemon, mixed: 2 hits checked in 0 s, 0 wrong bytes: FAILED: a slot was lost" in shown.err
