"""A synthetic trace against a live daemon: the hits are exactly those of a plain model of tail-first LRU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_trace import lru_hits, synthetic_requests, write_trace

from kvstore.cli.block_bytes import BlockBytes
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.cli.replay import private_daemon_for
from kvstore.cli.replay_loop import ReplayReport, replay_namespace, replay_trace, slot_bytes
from kvstore.simulator.trace import TraceRequest, block_key
from kvstore_client import Client


def replayed(requests: list[TraceRequest], capacity_blocks: int, block_bytes: int) -> ReplayReport:
    with (
        private_daemon_for(block_bytes, capacity_blocks) as daemon,
        Client(
            daemon.endpoint,
            namespace=replay_namespace("replay", block_bytes),
            timeout=30.0,
            payload_bytes=(block_bytes,),
        ) as client,
    ):
        report = replay_trace(client, requests, trace="synthetic", block_bytes=block_bytes)
        assert client.verify().problems == []
        return report


def kvstore(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("capacity_blocks", [30, 100, 101, 1000])
@pytest.mark.parametrize("block_bytes", [4096, 1000])
def test_replay_hits_are_those_of_tail_first_lru(capacity_blocks: int, block_bytes: int) -> None:
    requests = synthetic_requests(300, seed=capacity_blocks)
    expected = lru_hits(requests, capacity_blocks)
    asked = sum(len(request.full_blocks) for request in requests)
    assert 0 < sum(expected) < asked
    report = replayed(requests, capacity_blocks, block_bytes)
    assert (report.blocks_hit, report.blocks_asked) == (sum(expected), asked)
    assert (report.wrong_bytes, report.blocks_lost) == (0, 0)
    assert report.puts == {"stored": asked - sum(expected), "exists": 0, "throttled": 0, "rejected": 0}
    assert report.bytes_read == sum(expected) * block_bytes
    assert (report.daemon.match_keys, report.daemon.match_hits) == (asked, sum(expected))
    assert report.capacity_blocks == capacity_blocks
    assert report.daemon.resident_bytes <= report.daemon.capacity_bytes == capacity_blocks * slot_bytes(block_bytes)
    distinct = len({block for request in requests for block in request.full_blocks})
    assert report.daemon.resident_blocks == min(capacity_blocks, distinct)


def test_replay_large_blocks_evict_alike(tmp_path: Path) -> None:
    requests = synthetic_requests(60, seed=3)
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    # A process of its own: pyzmq's thread for large zero-copy frames, once started, lives as long as its process.
    done = kvstore("replay", str(trace), "--block-bytes", "64KiB", "--capacity-blocks", "64", "--json")
    report = json.loads(done.stdout)
    assert report["blocks_hit"] == sum(lru_hits(requests, 64))
    assert (report["wrong_bytes"], report["puts"]["throttled"], report["puts"]["rejected"]) == (0, 0, 0)


def test_replay_prompt_longer_than_the_capacity_keeps_its_beginning() -> None:
    requests = synthetic_requests(60, seed=5, longest_blocks=24)
    capacity_blocks = 12
    assert max(len(request.full_blocks) for request in requests) > capacity_blocks
    report = replayed(requests, capacity_blocks, 4096)
    assert report.blocks_hit == sum(lru_hits(requests, capacity_blocks))
    assert report.wrong_bytes == 0
    assert report.puts["rejected"] + report.puts["throttled"] > 0


def test_replay_command_prints_one_json_object(tmp_path: Path) -> None:
    requests = synthetic_requests(80, seed=7)
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    done = kvstore("replay", str(trace), "--capacity-blocks", "50", "--limit", "70", "--json")
    report = json.loads(done.stdout)
    assert report["blocks_hit"] == sum(lru_hits(requests[:70], 50))
    assert (report["requests"], report["wrong_bytes"], report["block_bytes"]) == (70, 0, 4096)
    assert done.stderr == ""


def test_replay_command_prints_a_table(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", synthetic_requests(30))
    shown = kvstore("replay", str(trace), "--block-bytes", "64KiB", "--capacity-blocks", "200").stdout
    for words in ("blocks hit / asked", "wrong bytes", "match", "p99", "The daemon's view", "64.0 KiB of payload"):
        assert words in shown


def test_replay_by_codecs_hits_as_many_as_fit_and_checks_every_byte(tmp_path: Path) -> None:
    requests = synthetic_requests(80, seed=9)
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    codecs = ("--codec", "kivi4", "--codec", "int8", "--codec", "raw")
    done = kvstore("replay", str(trace), *codecs, "--block-bytes", "32KiB", "--capacity-blocks", "60", "--json")
    report = json.loads(done.stdout)
    assert list(report["replays"]) == ["raw", "kivi4", "int8"]
    assert report["capacity_bytes"] == 60 * slot_bytes(32 << 10)
    for codec, bits in (("raw", 16), ("kivi4", 4.5), ("int8", 8.25)):
        one = report["replays"][codec]
        assert one["slot_bytes"] == slot_bytes(int((32 << 10) * bits / 16))
        assert one["capacity_blocks"] == report["capacity_bytes"] // one["slot_bytes"]
        assert one["blocks_hit"] == sum(lru_hits(requests, one["capacity_blocks"]))
        assert (one["wrong_bytes"], one["blocks_lost"], one["corrupt_records"]) == (0, 0, 0)
        assert one["bytes_read"] == one["blocks_hit"] * (32 << 10)
    assert report["replays"]["kivi4"]["blocks_hit"] > report["replays"]["raw"]["blocks_hit"]


def test_replay_command_one_wrong_byte_exits_with_1(tmp_path: Path) -> None:
    requests = synthetic_requests(20)
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    first = block_key(requests[0].full_blocks[0])
    altered = bytearray(BlockBytes(4096, 1).derive([first])[0])
    altered[4000] ^= 4
    with PrivateDaemon(capacity_bytes=16 << 20) as daemon:
        with Client(daemon.endpoint, namespace=replay_namespace("mine", 4096)) as client:
            client.put(first, altered)
        arguments = ("replay", str(trace), "--endpoint", daemon.endpoint, "--json", "--namespace")
        report = json.loads(kvstore(*arguments, "mine", code=1).stdout)
        asking = sum(first == block_key(request.full_blocks[0]) for request in requests if request.full_blocks)
        assert report["wrong_bytes"] == asking > 0
        assert json.loads(kvstore(*arguments, "other").stdout)["wrong_bytes"] == 0


def test_replay_command_other_block_size_on_the_same_daemon_is_not_wrong(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", synthetic_requests(20))
    with PrivateDaemon(capacity_bytes=32 << 20) as daemon:
        for size in ("4096", "8KiB"):
            done = kvstore("replay", str(trace), "--endpoint", daemon.endpoint, "--block-bytes", size, "--json")
            assert json.loads(done.stdout)["wrong_bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("none.jsonl",), "none.jsonl"),
        (("bad.jsonl",), "bad.jsonl:1: "),
        (("good.jsonl", "--block-bytes", "4Kb"), "--block-bytes: '4Kb' has the unknown unit 'Kb' (did you mean KB?)"),
        (("good.jsonl", "--block-bytes", "1GiB"), "--block-bytes: 1GiB is more than 64 MiB a block"),
        (("good.jsonl", "--endpoint", "ipc:///tmp/x", "--capacity-blocks", "9"), "--capacity-blocks sizes a private"),
        (("good.jsonl", "--endpoint", "ipc:///tmp/x", "--codec", "int8"), "--codec compares daemons of its own"),
        (("good.jsonl", "--codec", "zip"), "--codec: unknown codec 'zip'; known are raw"),
        (("good.jsonl", "--codec", "int8", "--block-bytes", "20KiB"), "--block-bytes: with --codec a block has whole"),
        (
            ("good.jsonl", "--endpoint", "ipc:///tmp/kvstore-nobody.sock", "--timeout", "0.3"),
            "/tmp/kvstore-nobody.sock",
        ),
    ],
)
def test_replay_command_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    write_trace(tmp_path / "good.jsonl", synthetic_requests(5))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    name, *rest = arguments
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", "replay", name, *rest],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode not in (0, 1) or done.stderr, done.stdout
    assert what in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
