"""The benchmark of transcoding: its form and its checks, not its figures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from daemon_process import child_environment
from rich.console import Console

from kvstore.cli.bench import transcode as bench
from kvstore.cli.bench.report import Report
from kvstore.cli.bench.transcode import OPAQUE, TYPED, TranscodeExtent, measure_transcoding
from kvstore.cli.bench.transcode_table import transcode_table
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore.transcode.pairs import PAIRS

MIB = 1 << 20
SMALL = TranscodeExtent(total_bytes=8 * MIB, rounds=2)


@pytest.fixture(scope="module")
def measured() -> tuple[Report, int]:
    rounds: list[None] = []
    report = measure_transcoding(SMALL, lambda: rounds.append(None))
    return report, len(rounds)


def test_bench_transcode_has_a_row_for_each_pair_form_and_direction(measured: tuple[Report, int]) -> None:
    report, rounds = measured
    assert rounds == SMALL.steps == 10
    expected = [
        (name, form, op)
        for name, pair in PAIRS.items()
        for form in ((TYPED, OPAQUE) if pair.restored else (TYPED,))
        for op in (("transcode", "restore") if pair.restored else ("transcode",))
    ]
    assert [(row.codec, row.memory, row.op) for row in report.rows] == expected
    for row in report.rows:
        assert row.samples == 2
        assert row.median_us is not None
        assert row.baseline_median_us is not None
        assert row.ratio == pytest.approx(row.baseline_median_us / row.median_us, rel=0.01)
        assert row.stored_ratio is not None
        assert 0.5 < row.stored_ratio < 0.9


def test_bench_transcode_as_a_table_names_pairs(measured: tuple[Report, int]) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(transcode_table(measured[0]))
    text = console.export_text()
    assert all(name in text for name in PAIRS)
    console.file.close()


def test_bench_transcode_of_wrong_bytes_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(record: memoryview, out: memoryview) -> memoryview:
        back = restore(record, out)
        back[1000] ^= 1
        return back

    restore = bench.restore
    monkeypatch.setattr(bench, "restore", damaged)
    with pytest.raises(KVStoreError, match="did not give record 0 back as it was"):
        measure_transcoding(TranscodeExtent(total_bytes=8 * MIB, pairs=("raw>lossless",), rounds=1))


def test_bench_transcode_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="unknown pair of codecs 'raw>zip'"):
        TranscodeExtent(pairs=("raw>zip",))
    with pytest.raises(InvalidArgument, match="--pair: give at least one"):
        TranscodeExtent(pairs=())
    with pytest.raises(InvalidArgument, match="--dtype: 'int8' is none of"):
        TranscodeExtent(dtype="int8")
    with pytest.raises(InvalidArgument, match="--mib: at least 8, four blocks"):
        TranscodeExtent(total_bytes=MIB)


def test_bench_transcode_prints_one_json_object() -> None:
    command = [sys.executable, "-m", "kvstore", "bench", "transcode", "--mib", "8", "--rounds", "1", "--json"]
    done = subprocess.run(
        [*command, "--pair", "raw>lossless-zstd"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in json.loads(done.stdout)["rows"]} == {"transcode", "restore"}
