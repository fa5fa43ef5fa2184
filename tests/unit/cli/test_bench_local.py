from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence

import numpy as np
import pytest

from kvstore.cli import render
from kvstore.cli.bench import local_redis_server
from kvstore.cli.bench.local import Extent
from kvstore.cli.bench.local_blocks import Buffers
from kvstore.cli.bench.local_sides import Kind, Side, Walk, chunk_of, row_of, take_turns
from kvstore.cli.bench.local_sustained import machine_busy_ns, process_cpu_ns
from kvstore.cli.bench.local_table import local_table
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Report, Row
from kvstore.errors import InvalidArgument

MIB = 1 << 20


class FakeSide(Side):
    """Remembers what it did, together with the others."""

    def __init__(self, name: str, log: list[tuple[str, list[int]]]) -> None:
        super().__init__()
        self.name = name
        self.log = log
        self.checked = 0

    def run(self, numbers: Sequence[int]) -> None:
        self.log.append((self.name, list(numbers)))

    def check(self) -> None:
        self.checked += 1


# ------------------------------------------------------------------ turns


def test_walk_goes_through_all_places_in_a_random_order_again_and_again() -> None:
    walk = Walk(100, 7)
    way = walk.part(0, 100, 0.0)
    assert sorted(way) == list(range(100))
    assert way != sorted(way)
    assert walk.part(90, 20, 0.0) == way[90:] + way[:10]
    assert walk.part(0, 10, 0.5) == way[50:60]
    walk.forward(30)
    assert walk.part(0, 5, 0.0) == way[30:35]
    assert Walk(100, 7).part(0, 100, 0.0) == way


def test_take_turns_all_sides_do_as_much_and_alternate_who_is_first() -> None:
    log: list[tuple[str, list[int]]] = []
    sides = FakeSide("a", log), FakeSide("b", log)
    walk = Walk(40, 1)
    way = walk.part(0, 40, 0.0)
    take_turns(sides, walk, 10, 4)
    assert [name for name, _ in log] == ["a", "b", "b", "a", "a", "b"]
    done = {name: [number for other, numbers in log for number in numbers if other == name] for name in "ab"}
    assert done == {"a": way[:10], "b": way[20:30]}
    assert [side.checked for side in sides] == [3, 3]
    take_turns(sides, walk, 1, 4)
    assert log[-2:] == [("a", [way[10]]), ("b", [way[30]])]


@pytest.mark.parametrize(("operation_bytes", "chunk"), [(0, 32), (64 << 10, 32), (MIB, 4), (4 * MIB, 1), (64 * MIB, 1)])
def test_chunk_is_a_few_megabytes(operation_bytes: int, chunk: int) -> None:
    assert chunk_of(operation_bytes) == chunk


# ------------------------------------------------------------------ memory


def test_buffers_are_page_aligned_and_handed_out_in_one_order_by_whoever_asks() -> None:
    buffers = Buffers(5000, 10)
    assert all(address % mmap.PAGESIZE == 0 for address in buffers.addresses)
    assert [array.ctypes.data for array in buffers.arrays] == buffers.addresses
    first, second = buffers.take(6), buffers.take(6)
    assert sorted(first + second[:4]) == list(range(10))
    assert second[4:] == first[:2]
    assert Buffers(5000, 10).take(6) == first


def test_buffers_of_other_memory_share_it() -> None:
    pool = Buffers(4096, 8)
    part = Buffers(4096, 2, pool, 3)
    assert part.addresses == pool.addresses[3:5]
    part.arrays[0][:] = 77
    assert (pool.arrays[3] == 77).all()
    assert not (pool.arrays[5] == 77).any()


def test_buffers_derived_differ_from_each_other() -> None:
    buffers = Buffers(4096, 4)
    buffers.derive()
    assert len({array.tobytes() for array in buffers.arrays}) == 4
    assert all(np.count_nonzero(array) > 4000 for array in buffers.arrays)


# ------------------------------------------------------------------ rows, extent, table


def test_row_has_medians_ratio_and_rate() -> None:
    row = row_of(Kind("get_into", 1000, 2, "cold", "one"), [100, 200, 900], "memmove", [90, 100, 110], limit=0.95)
    assert (row.op, row.size_bytes, row.batch, row.cache, row.buffers) == ("get_into", 1000, 2, "cold", "one")
    assert (row.median_us, row.p99_us, row.baseline_median_us, row.samples) == (0.2, 0.9, 0.1, 3)
    assert (row.ratio, row.gb_per_s, row.limit) == (0.5, 10.0, 0.95)
    assert not row.within_limit
    assert row_of(Kind("view", 1000), [1], "pin", [1], moves_bytes=False).gb_per_s is None


def test_extent_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 1024 bytes"):
        Extent(sizes_bytes=())
    with pytest.raises(InvalidArgument, match="at least 1024 bytes"):
        Extent(sizes_bytes=(1023,))
    with pytest.raises(InvalidArgument, match="less than two blocks"):
        Extent(sizes_bytes=(4 * MIB,), set_bytes=7 * MIB)


def test_table_shows_each_row_the_cpu_time_and_what_was_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        row_of(Kind("get_many_into", MIB, 16, "cold", "rotating"), [10**6], "memmove", [10**6], limit=0.95, hoped=1.2),
        row_of(Kind("get_into", MIB, 1, "cold", "one"), [10**6], "memmove", [10**5], limit=0.95),
        Row(op="put_sustained", size_bytes=MIB, batch=512, median_us=150.0, daemon_cpu_us=32.6, others_share=0.5),
        Row(
            op="match", batch=256, median_us=9.13, baseline="mapped=False", baseline_median_us=118, ratio=12.96, limit=8
        ),
        Row(op="match", batch=256, median_us=9.13, baseline="dict loop", baseline_median_us=9.2, ratio=1.01),
        Row(op="get_many_into", size_bytes=MIB, batch=16, median_us=5, baseline="redis MGET of 16", ratio=8.16),
        Row(op="redis", batch=1, note="not measured: redis-server is not installed"),
        Row(op="idle", batch=16, seconds=60.0, core_share=0.004, limit=0.01),
    ]
    render.console().print(local_table(Report(machine=machine_facts(), baseline="a copy", rows=rows)))
    shown = capsys.readouterr().out
    for words in (
        "1.0 MiB",
        "rotating",
        "get_many_into 16",
        "0.95 met",
        "0.95 MISSED",
        "MISSED",
        "32.6 us at 1.0 MiB",
        "others used meanwhile: 0.5",
        "9.13 us",
        "256 keys",
        "12.96 8.00 met",
        "MGET of 16",
        "redis-server is not installed",
        "0.4 % of a core, 16 clients and the daemon over",
        "numba",
    ):
        assert words in " ".join(shown.split())
    assert shown.count("MISSED") == 1
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


# ------------------------------------------------------------------ cpu time, redis


def test_process_cpu_time_grows_with_work() -> None:
    before, machine_before, end = process_cpu_ns(os.getpid()), machine_busy_ns(), time.thread_time() + 0.1
    while time.thread_time() < end:
        pass
    assert 80e6 < process_cpu_ns(os.getpid()) - before < 10e9
    assert machine_busy_ns() - machine_before > 50e6


def test_redis_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_redis_server, "_SERVER", "no-such-server")
    assert local_redis_server.why_not() == "no-such-server is not installed"
