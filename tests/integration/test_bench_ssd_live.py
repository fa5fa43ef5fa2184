"""The SSD tier's benchmark with a daemon: its form and its checks, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.cli.bench.process import ChildProcess
from kvstore.cli.bench.report import Row
from kvstore.cli.bench.ssd import UNDISTURBED, SsdExtent, SsdReport, measure_ssd
from kvstore.cli.bench.ssd_blocks import BLOCK_BYTES, CHAIN_BLOCKS, Blocks, CodedBlocks, RawBlocks, blocks_of, keys_of
from kvstore.cli.bench.ssd_fio import why_not
from kvstore.cli.bench.ssd_getter import LIMITS, Gets
from kvstore.cli.bench.ssd_place import check_place
from kvstore.cli.bench.ssd_putter import GO, STOP
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import DaemonUnavailable, InvalidArgument, RemoteError
from kvstore_client import Client
from kvstore_kernels.layout import KVLayout

MIB = 1 << 20
SMALL_LAYOUT = KVLayout(2, 2, 64, "bfloat16", 64)


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    """A daemon without an SSD tier: what puts, reads and checks blocks needs none."""
    with PrivateDaemon(capacity_bytes=128 * MIB, grant_bytes=128 * MIB, arguments=LIMITS) as daemon:
        yield daemon


@pytest.fixture(params=["", "kivi4"])
def blocks(request: pytest.FixtureRequest, daemon: PrivateDaemon) -> Iterator[Blocks]:
    codec: str = request.param
    made: Blocks = CodedBlocks(daemon.endpoint, codec, SMALL_LAYOUT) if codec else RawBlocks(daemon.endpoint)
    made.client.clear()
    yield made
    made.close()


# ------------------------------------------------------------------ blocks


def test_chains_that_were_put_are_found_whole(blocks: Blocks) -> None:
    for chain in (0, 7):
        blocks.put(chain)
        assert blocks.client.match(keys_of(chain)).hits == CHAIN_BLOCKS
        blocks.check(chain)
    blocks.put(7)  # is there already
    assert blocks.client.stats().dram.record_bytes >= 2 * CHAIN_BLOCKS * blocks.record_bytes


def test_blocks_of_a_codec_are_smaller_than_the_engines(blocks: Blocks) -> None:
    if blocks.codec:
        assert 0.25 < blocks.record_bytes / blocks.block_bytes < 0.35
    else:
        assert blocks.record_bytes == blocks.block_bytes == BLOCK_BYTES


def test_chain_that_is_not_whole_is_found(blocks: Blocks) -> None:
    with pytest.raises(RemoteError, match="chain 1"):
        blocks.check(1)
    blocks.put(1)
    blocks.client.remove(keys_of(1)[-1:])
    with pytest.raises(RemoteError, match="chain 1"):
        blocks.check(1)


def test_raw_block_with_wrong_bytes_is_found(daemon: PrivateDaemon) -> None:
    made = RawBlocks(daemon.endpoint)
    try:
        made.put(3)
        for place in (0, BLOCK_BYTES - 1):  # another block's key, and a byte at the end
            made.check(3)
            data = made._buffers.arrays[5].copy()
            data[:32] = np.frombuffer(keys_of(3)[5], np.uint8)
            data[place] ^= 1
            made.client.remove(keys_of(3)[5:6])
            made.client.put(keys_of(3)[5], data, parent=keys_of(3)[4])
            with pytest.raises(RemoteError, match="wrong bytes"):
                made.check(3)
            made.client.clear()
            made.put(3)
    finally:
        made.client.clear()
        made.close()


def test_record_with_wrong_numbers_is_found(daemon: PrivateDaemon) -> None:
    made = CodedBlocks(daemon.endpoint, layout=SMALL_LAYOUT)
    try:
        made.put(3)
        made.check(3)
        made._decoded[2] ^= 1
        with pytest.raises(RemoteError, match="wrong numbers"):
            made.check(3)
    finally:
        made.client.clear()
        made.close()


# ------------------------------------------------------------------ the processes


def test_putting_client_puts_until_it_is_told_to_stop(daemon: PrivateDaemon) -> None:
    made = blocks_of("", daemon.endpoint)
    made.client.clear()
    with ChildProcess("the putting client", "kvstore.cli.bench.ssd_putter", "", daemon.endpoint) as putter:
        putter.wait_until_ready(time.monotonic() + 60)
        put = 0
        for _ in range(2):
            putter.tell(GO)
            assert not putter.has_answer(0.3)
            putter.tell(STOP)
            before, put = put, int(putter.answer(time.monotonic() + 60))
            assert put > before
            made.check(put - 1)
    made.client.clear()
    made.close()


def test_reading_client_tells_what_its_reads_took(daemon: PrivateDaemon) -> None:
    with ChildProcess("the reading client", "kvstore.cli.bench.ssd_getter", daemon.endpoint, "70") as getter:
        getter.wait_until_ready(time.monotonic() + 60)
        for seconds in (0.001, 0.2):
            getter.tell(str(seconds))
            gets = msgspec.json.decode(getter.answer(time.monotonic() + 60), type=Gets)
            assert gets.count >= 1
            assert gets.seconds >= seconds
            assert 0 < gets.median_us <= gets.seconds * 1e6
        with Client(daemon.endpoint) as client:
            assert client.stats().leases == 2  # one a chain of 64


def test_reading_client_whose_blocks_are_gone_says_so(daemon: PrivateDaemon) -> None:
    with ChildProcess("the reading client", "kvstore.cli.bench.ssd_getter", daemon.endpoint, "8") as getter:
        getter.wait_until_ready(time.monotonic() + 60)
        with Client(daemon.endpoint, namespace="bench ssd gets") as client:
            assert client.clear() >= 8
        getter.tell("0.1")
        assert "only 0 of 8 leased blocks" in getter.answer(time.monotonic() + 60)


def test_processes_that_reach_no_daemon_say_so(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/nobody.sock"
    for module, arguments in (("ssd_putter", ("", endpoint)), ("ssd_getter", (endpoint, "4"))):
        with (
            ChildProcess("the client", f"kvstore.cli.bench.{module}", *arguments) as child,
            pytest.raises(DaemonUnavailable, match="the client did not start: .*nobody"),
        ):
            child.wait_until_ready(time.monotonic() + 90)


# ------------------------------------------------------------------ all of it

SMALL = SsdExtent(size_bytes=640 * MIB, round_bytes=32 * MIB, rounds=2)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that can be measured."""
    if why_not():
        pytest.skip(why_not())
    directory = tmp_path_factory.mktemp("disk")
    try:
        check_place(directory, SMALL.needed_bytes)
    except InvalidArgument as unfit:
        pytest.skip(str(unfit))
    return directory


@pytest.fixture(scope="module")
def measured(disk: Path) -> tuple[SsdReport, int]:
    rounds: list[None] = []
    report = measure_ssd(disk, SMALL, lambda: rounds.append(None))
    assert list(disk.iterdir()) == []
    return report, len(rounds)


def test_bench_ssd_reports_each_operation_beside_its_baseline(measured: tuple[SsdReport, int]) -> None:
    report, rounds = measured
    assert rounds == SMALL.steps == 4
    assert [(row.op, row.codec, row.baseline, row.limit) for row in report.rows] == [
        ("demotion", None, "fio randwrite", 0.8),
        ("promotion", None, "fio randread", 0.9),
        ("get_into during demotion", None, UNDISTURBED, 0.7),
        ("get_into sustained during demotion", None, UNDISTURBED, None),
        ("get_into during promotion", None, UNDISTURBED, 0.7),
        ("get_into sustained during promotion", None, UNDISTURBED, None),
        ("demotion", "kivi4", "fio randwrite", None),
        ("promotion", "kivi4", "fio randread", None),
    ]
    for row in report.rows:
        assert row.samples == len(row.ratios or ()) == 2
        assert row.gb_per_s is not None
        assert row.gb_per_s > 0
        assert row.baseline_gb_per_s is not None
        assert row.baseline_gb_per_s > 0
        assert row.ratio == pytest.approx(sum(row.ratios or ()) / 2, abs=1e-4)
        assert row.size_bytes == (4 * MIB if row.codec else MIB)
        assert (row.daemon_cpu_us is None) == (row.baseline == UNDISTURBED)
    assert report.disk.fio.startswith("fio-")
    assert (report.disk.size_bytes, report.disk.depth) == (640 * MIB, 8)


# ------------------------------------------------------------------ the command


def kvstore(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_bench_ssd_command_prints_one_json_object(disk: Path) -> None:
    done = kvstore(
        *(
            "bench",
            "ssd",
            "--dir",
            str(disk),
            "--size",
            "640MiB",
            "--mib",
            "32",
            "--rounds",
            "1",
            "--no-kivi4",
            "--json",
        )
    )
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == {"machine", "baseline", "rows", "disk"}
    assert "--iodepth=8" in report["baseline"]
    assert set(report["rows"][0]) == {
        "op", "size_bytes", "batch", "depth", "samples", "gb_per_s", "baseline", "baseline_gb_per_s", "ratio", "ratios",
        "limit", "daemon_cpu_us", "others_share",
    }  # fmt: skip
    assert all(set(row) <= set(Row.__struct_fields__) for row in report["rows"])
    assert list(disk.iterdir()) == []


def test_bench_ssd_command_refuses_in_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (("--dir", str(tmp_path / "nowhere")), "No such file or directory; name a directory on the SSD"),
        (("--dir", "/dev/shm"), "is on tmpfs, which is memory"),
        (("--size", "8GB"), "--size: give whole MiB"),
        (("--mib", "48"), "--mib: a round moves whole chains of 32 MiB"),
    ):
        done = kvstore("bench", "ssd", *arguments)
        assert done.returncode in (1, 2)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert message in line
