"""The local benchmark against a live daemon: its form and its checks, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvstore.cli.bench.idle import measure_idle
from kvstore.cli.bench.local import Extent, local_daemon, measure_local
from kvstore.cli.bench.local_blocks import Buffers, StoredBlocks
from kvstore.cli.bench.local_puts import FullTier, Put
from kvstore.cli.bench.local_reads import GetInto, GetManyInto, PinUnpin, Reads, ViewInPlace
from kvstore.cli.bench.local_redis_server import why_not
from kvstore.cli.bench.report import Report, Row
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import DaemonUnavailable, KVStoreError, RemoteError
from kvstore_client import Client

KIB, MIB = 1 << 10, 1 << 20
SIZES = (16 * KIB, 64 * KIB)
SMALL = Extent(
    sizes_bytes=SIZES, rounds=2, set_bytes=8 * MIB, buffer_bytes=8 * MIB, round_bytes=512 * KIB, with_redis=False
)


@pytest.fixture(scope="module")
def measured() -> tuple[Report, int]:
    rounds: list[None] = []
    with local_daemon(SMALL) as daemon:
        report = measure_local(daemon, SMALL, lambda: rounds.append(None))
        with Client(daemon.endpoint) as client:
            assert client.stats().dram.blocks == 0
    return report, len(rounds)


def test_bench_local_reports_each_operation_of_each_size(measured: tuple[Report, int]) -> None:
    report, rounds = measured
    assert rounds == SMALL.steps
    found = [(row.op, row.size_bytes, row.cache, row.buffers, row.baseline) for row in report.rows if row.size_bytes]
    for size in SIZES:
        expected = []
        for op in ("get_into", "get_many_into", "get_many_into"):
            expected += [(op, size, "cold", buffers, "memmove") for buffers in ("one", "rotating")]
        expected += [
            ("get_into", size, "hot", "one", "memmove"),
            ("view", size, "cold", None, "compiled pin + unpin"),
        ]
        for buffers in ("one", "rotating"):
            expected += [
                ("put", size, "cold", buffers, "memmove"),
                ("put_without_checksum", size, "cold", buffers, "memmove"),
                ("put_checksum", size, "cold", buffers, None),
            ]
        expected.append(("put_sustained", size, "cold", "rotating", "memmove"))
        assert [entry for entry in found if entry[1] == size] == expected
    matches = [(row.batch, row.baseline) for row in report.rows if row.op == "match"]
    assert matches == [(count, name) for count in (1, 16, 256, 4096) for name in ("mapped=False", "dict loop")]
    assert [(row.op, row.note) for row in report.rows[-1:]] == [("redis", "not measured: it was not asked for")]


def test_bench_local_ratios_are_of_the_medians(measured: tuple[Report, int]) -> None:
    for row in measured[0].rows:
        if row.note is not None or row.op == "put_checksum":
            continue
        assert row.median_us is not None
        assert row.baseline_median_us is not None
        assert row.ratio is not None
        assert row.samples is not None
        if row.op == "put_sustained":
            assert row.daemon_cpu_us is not None
            assert row.daemon_cpu_us > 0
            assert row.others_share is not None
            assert row.others_share >= 0
            assert row.samples == SMALL.sustained_rounds
        else:
            assert row.p99_us is not None
            assert row.p99_us >= row.median_us > 0
            # Both are rounded to hundredths of a microsecond.
            assert row.ratio == pytest.approx(row.baseline_median_us / row.median_us, rel=0.02, abs=0.01)
        if row.gb_per_s is not None and row.op != "put_sustained":
            assert row.gb_per_s == pytest.approx((row.size_bytes or 0) * row.batch / row.median_us / 1e3, rel=0.02)


def test_bench_local_aims_are_only_for_sizes_they_were_set_for(measured: tuple[Report, int]) -> None:
    limits = {(row.op, row.size_bytes, row.batch): row.limit for row in measured[0].rows if row.cache == "cold"}
    assert limits["get_into", 64 * KIB, 1] == 0.85
    assert limits["get_many_into", 64 * KIB, 16] == 0.95
    assert limits["get_many_into", 64 * KIB, 64] is None
    assert limits["put_without_checksum", 64 * KIB, 1] == 0.8
    assert limits["put", 64 * KIB, 1] is None
    assert limits["get_into", 16 * KIB, 1] is None


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_bench_local_with_redis_compares_gets_and_puts() -> None:
    extent = Extent(sizes_bytes=SIZES[:1], rounds=1, set_bytes=MIB, buffer_bytes=MIB, round_bytes=256 * KIB)
    with local_daemon(extent) as daemon:
        report = measure_local(daemon, extent)
    found = [(row.op, row.batch, row.baseline) for row in report.rows if "redis" in (row.baseline or row.op)]
    assert found == [
        ("get_into", 1, "redis GET"),
        ("get_many_into", 16, "redis MGET of 16"),
        ("put", 1, "redis SET"),
    ]


# ------------------------------------------------------------------ checks


@contextmanager
def stored(size: int) -> Iterator[tuple[Client, StoredBlocks]]:
    with (
        PrivateDaemon(capacity_bytes=64 * MIB) as daemon,
        Client(daemon.endpoint, namespace="checks", timeout=30, mapped=True, payload_bytes=(size,)) as client,
    ):
        yield client, StoredBlocks(client, size, 128)


def test_reads_of_wrong_bytes_are_found() -> None:
    size = 4 * KIB
    with stored(size) as (client, blocks):
        pool = Buffers(size, 64)
        sides = GetInto(client, blocks, pool), GetManyInto(client, blocks, pool, 16), ViewInPlace(client, blocks)
        for side in sides:
            side.run([1])
            side.check()
        reads = Reads(client, blocks, pool, 64 * KIB)
        reads.round()
        reads.finish()
        blocks.checksums = [checksum ^ 1 for checksum in blocks.checksums]
        for side in sides:
            with pytest.raises(RemoteError, match="gave wrong bytes"):
                side.check()


def test_reads_of_blocks_that_are_gone_or_elsewhere_are_found() -> None:
    size = 4 * KIB
    with stored(size) as (client, blocks):
        pool = Buffers(size, 64)
        pin = PinUnpin(client, blocks)
        reads: list[tuple[Callable[[], None], str]] = [
            (lambda: GetInto(client, blocks, pool).run([1]), "get_into gave None bytes"),
            (lambda: GetManyInto(client, blocks, pool, 16).run([0]), "get_many_into gave lengths"),
            (lambda: ViewInPlace(client, blocks).run([1]), "a view found nothing"),
            (lambda: pin.run([1]), "a pin found nothing"),
        ]
        blocks.addresses[0] += 1
        with pytest.raises(RemoteError, match="moved"):
            blocks.check_places()
        client.remove(blocks.keys[1:2])
        for read, message in reads:
            with pytest.raises(RemoteError, match=message):
                read()
        pin.close()


def test_puts_of_other_bytes_are_found() -> None:
    size = 64 * KIB
    with stored(size) as (client, _):
        sources = Buffers(size, 4)
        sources.derive()
        tier = FullTier(client, sources, 64 * MIB, 32 * MIB)
        assert len(set(tier.addresses)) == len(tier.addresses)
        put = Put(tier, sources)
        put.run(range(4))
        put.check()
        put.run(range(4))
        for array in sources.arrays:
            array[-1] ^= 1
        with pytest.raises(RemoteError, match="is not what was put"):
            put.check()


# ------------------------------------------------------------------ idle, the command


def test_idle_mapped_clients_have_read_and_put_before() -> None:
    with PrivateDaemon(capacity_bytes=32 * MIB) as daemon:
        row = measure_idle(daemon.endpoint, daemon.pid, 1.0, clients=2, settle_seconds=0.1, kind="mapped")
        with Client(daemon.endpoint) as client:
            stats = client.stats()
    assert (row.op, row.batch, row.limit) == ("idle", 2, 0.01)
    assert row.core_share is not None
    assert 0 <= row.core_share < 0.5
    assert stats.puts.stored == 64
    assert stats.lookups.mapped_reads >= 2 * 4


def test_idle_mapped_client_that_cannot_map_says_why() -> None:
    with PrivateDaemon(capacity_bytes=32 * MIB, arguments=("--set", "dram.mapped=false")) as daemon:
        with pytest.raises(DaemonUnavailable, match=r"idle client 0 did not start: .*dram\.mapped is off"):
            measure_idle(daemon.endpoint, daemon.pid, 0.1, clients=1, kind="mapped")
        with pytest.raises(KVStoreError, match="dram.mapped is off"):
            measure_local(daemon, SMALL)


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


TINY = ("bench", "local", "--rounds", "1", "--sizes", "64KiB", "--set", "2MiB", "--no-redis")


def test_bench_local_command_prints_one_json_object() -> None:
    report: dict[str, Any] = json.loads(kvstore(*TINY, "--json"))
    assert set(report) == {"machine", "baseline", "rows"}
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert report["machine"]["numba"]
    assert "memmove" in report["baseline"]
    get = report["rows"][0]
    assert set(get) == {
        "op", "size_bytes", "batch", "cache", "buffers", "samples", "median_us", "p99_us", "gb_per_s", "baseline",
        "baseline_median_us", "ratio", "limit",
    }  # fmt: skip
    assert all(set(row) <= set(Row.__struct_fields__) for row in report["rows"])


def test_bench_local_command_prints_a_table() -> None:
    shown = kvstore(*TINY)
    for words in ("operation", "beside", "GB/s", "ratio", "aim", "rotating", "baseline", "machine", "put_sustained"):
        assert words in shown
