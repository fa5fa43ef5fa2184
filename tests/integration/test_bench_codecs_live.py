"""The codecs' benchmark with the kernels and a daemon: its form and its checks, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from ctypes import c_ubyte
from typing import Any

import numpy as np
import pytest

from kvstore.cli.bench.codecs import CodecExtent, measure_codecs
from kvstore.cli.bench.codecs_memory import KVMemory
from kvstore.cli.bench.codecs_store import CODEC_ALONE, SAVE_AND_LOAD
from kvstore.cli.bench.codecs_work import CodecWork, Payloads
from kvstore.cli.bench.report import Report, Row
from kvstore.errors import RemoteError
from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout

MIB = 1 << 20
LAYOUT = KVLayout(2, 2, 64, "bfloat16", 64)
SMALL = CodecExtent(total_bytes=16 * MIB, call_bytes=4 * MIB, codecs=("int8", "kivi4"), rounds=2)


@pytest.fixture(scope="module")
def measured() -> tuple[Report, int]:
    rounds: list[None] = []
    report = measure_codecs(SMALL, lambda: rounds.append(None))
    return report, len(rounds)


def test_bench_codecs_reports_each_operation_form_and_number_of_threads(measured: tuple[Report, int]) -> None:
    report, rounds = measured
    assert rounds == SMALL.steps == 6
    found = [(row.codec, row.op, row.memory, row.threads) for row in report.rows if row.baseline == "memmove"]
    assert found == [
        (codec, op, memory, threads)
        for codec in SMALL.codecs
        for op in ("encode", "decode")
        for memory in ("contiguous", "paged")
        for threads in (1, 2)
    ]
    copies = [(row.size_bytes, row.samples) for row in report.rows if row.op == "memmove"]
    assert copies == [(SMALL.call_bytes, 4), (SMALL.total_bytes, 4)]
    assert [row.op for row in report.rows if row.baseline == CODEC_ALONE] == ["save", "load", SAVE_AND_LOAD]


def test_bench_codecs_ratios_are_of_the_medians(measured: tuple[Report, int]) -> None:
    for row in measured[0].rows:
        if row.op == "memmove":
            continue
        assert row.median_us is not None
        assert row.baseline_median_us is not None
        assert row.ratio is not None
        assert row.size_bytes == 2 * MIB
        assert row.ratio == pytest.approx(row.baseline_median_us / row.median_us, rel=0.02, abs=0.01)
        assert row.gb_per_s == pytest.approx(row.size_bytes * row.batch / row.median_us / 1e3, rel=0.02)
        if row.baseline == CODEC_ALONE:
            assert (row.batch, row.limit) == (8, 0.8 if row.op == SAVE_AND_LOAD else None)
        elif row.threads == 2:
            assert row.scale is not None
            one = next(
                other
                for other in measured[0].rows
                if (other.codec, other.op, other.memory, other.threads) == (row.codec, row.op, row.memory, 1)
            )
            assert row.scale == pytest.approx((one.median_us or 0) / row.median_us, rel=0.02)
        else:
            assert (row.batch, row.scale, row.samples) == (2, None, 2)


# ------------------------------------------------------------------ checks


def made(codec: str = "int8") -> CodecWork:
    memory = KVMemory(LAYOUT, 4)
    return CodecWork(get_codec(codec), memory, Payloads(2 * LAYOUT.block_bytes, 4))


@pytest.mark.parametrize("codec", ["raw", "lossless", "fp8", "kivi2", "turbo4-3"])
def test_codec_that_does_its_work_passes(codec: str) -> None:
    work = made(codec)
    work.check_payloads(1, work.section_bytes[1:3], "an encoder")
    work.check_decoded(work.memory.paged, 0, 4, "a decoder")


def test_encoder_that_differs_from_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = cpu.encode

    def wrong(codec: Any, kv: Any, pages: Any, payloads: Any, **options: Any) -> Any:
        encoded = encode(codec, kv, pages, payloads, **options)
        for payload in payloads.tolist():
            c_ubyte.from_address(payload + 77).value ^= 1
        return encoded

    monkeypatch.setattr(cpu, "encode", wrong)
    with pytest.raises(RemoteError, match="int8 gave block 0 other bytes than its reference implementation"):
        made()


def test_decoder_that_differs_from_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = cpu.decode

    def wrong(codec: Any, kv: Any, *arguments: Any, **options: Any) -> None:
        decode(codec, kv, *arguments, **options)
        c_ubyte.from_address(int(kv.sections[0].bases[0])).value ^= 1

    monkeypatch.setattr(cpu, "decode", wrong)
    with pytest.raises(RemoteError, match="int8 gave block 0 other numbers than its reference implementation"):
        made()


def test_encoder_that_takes_other_pages_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = cpu.encode

    def wrong(codec: Any, kv: Any, pages: Any, payloads: Any, **options: Any) -> Any:
        return encode(codec, kv, np.ascontiguousarray(pages[:, ::-1]), payloads, **options)

    monkeypatch.setattr(cpu, "encode", wrong)
    with pytest.raises(RemoteError, match="int8 with pages gave block 0 other bytes"):
        made()


def test_work_that_was_not_done_is_found() -> None:
    work = made()
    work.payloads.spoil(2, 3)
    work.check_payloads(0, work.section_bytes[:2], "an encoder")
    with pytest.raises(RemoteError, match="an encoder gave block 2 other bytes than before"):
        work.check_payloads(0, work.section_bytes[:3], "an encoder")
    with pytest.raises(RemoteError, match="sections of other lengths to blocks 0 to 1"):
        work.check_payloads(0, work.section_bytes[:2] + 1, "an encoder")
    work.memory.paged.spoil_target(3, 4)
    with pytest.raises(RemoteError, match="a decoder gave block 3 other numbers than before"):
        work.check_decoded(work.memory.paged, 1, 4, "a decoder")


# ------------------------------------------------------------------ the command


def kvstore(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return subprocess.run(
        [sys.executable, "-P", "-m", "kvstore", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_bench_codecs_command_prints_one_json_object() -> None:
    done = kvstore("bench", "codecs", "--codec", "int4", "--mib", "32", "--rounds", "1", "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == {"machine", "baseline", "rows"}
    assert "memmove" in report["baseline"]
    assert set(report["rows"][0]) == {
        "op", "codec", "size_bytes", "batch", "cache", "memory", "threads", "samples", "median_us", "p99_us",
        "gb_per_s", "baseline", "baseline_median_us", "ratio", "limit", "others_share",
    }  # fmt: skip
    assert all(set(row) <= set(Row.__struct_fields__) for row in report["rows"])


def test_bench_codecs_command_refuses_in_one_line() -> None:
    for arguments, message in (
        (("--codec", "zip"), "--codec: unknown codec 'zip'; known are raw"),
        (("--mib", "1000000"), "use at most --mib "),
        (("--threads", "many"), "--threads: write numbers"),
    ):
        done = kvstore("bench", "codecs", *arguments)
        assert done.returncode in (1, 2)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert message in line
