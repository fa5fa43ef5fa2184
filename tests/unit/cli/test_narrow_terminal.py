"""On a narrow terminal no figure is cut off, and plots are as wide as the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType
from sample_stats import (
    sample_curve,
    sample_loading,
    sample_prefetch,
    sample_retention,
    sample_stats,
    sample_tenants,
)
from synthetic_trace import synthetic_requests, write_trace

from kvstore.cli import render
from kvstore.cli.curve import curve_view
from kvstore.cli.miss_tables import miss_tables
from kvstore.cli.stats_tables import stats_tables
from kvstore.cli.tune.options import Capacity
from kvstore.cli.tune.report import TuneReport
from kvstore.cli.tune.sizes import given_sizes
from kvstore.cli.tune.tables import tune_tables
from kvstore.cli.tune.tuning import Asked, tuned
from kvstore.core.misses import EXTRA_MULTIPLES
from kvstore.protocol.misses import MissCause
from kvstore.protocol.statistics import CauseStats, DaemonStats, MissStats
from kvstore.simulator.trace_files import read_requests

POLICIES = ["lru", "adaptive", "opt", "arc", "s3fifo", "lfu-kept", "gdsf-kept", "w-tinylfu"]


def shown(renderable: RenderableType, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def busy() -> DaemonStats:
    """Statistics with all that tables are made of, and numbers of many digits."""
    stats = sample_stats(ssd=True, curve=True, events=True)
    assert stats.ssd is not None
    stats.retention, stats.tenants = sample_retention(), sample_tenants()
    stats.prefetch, stats.loading = sample_prefetch(), sample_loading()
    stats.dram.resident_bytes, stats.dram.capacity_bytes = 1023 << 20, 1023 << 20
    stats.dram.blocks, stats.dram.records = 12_345_678, 24_691_356
    stats.misses = MissStats(
        requests=9_876_543,
        blocks=123_456_789,
        causes={
            cause.value: CauseStats(requests=1_234_567 + rank, blocks=12_345_678 + rank)
            for rank, cause in enumerate(MissCause)
        },
        multiples=list(EXTRA_MULTIPLES),
        extra_blocks=[1_234_567] * (len(EXTRA_MULTIPLES) + 1),
        ghosts=1200,
        ghost_bytes=105_600,
        ghost_limit_bytes=32 << 20,
        oldest_ghost_s=125.0,
    )
    return stats


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TuneReport:
    trace = write_trace(tmp_path_factory.mktemp("tune") / "trace.jsonl", synthetic_requests(600, seed=11))
    asked = Asked(
        policies=POLICIES,
        capacities=[Capacity(50), Capacity(200)],
        codecs=["raw"],
        ssd=[Capacity()],
        have=None,
        exact=True,
        prefill_tokens_per_s=8000.0,
        dram_gb_per_s=25.0,
        ssd_gb_per_s=6.0,
        decode_gb_per_s={},
    )
    return tuned(read_requests(trace), given_sizes(160 << 20, ["raw", "kivi4"]), asked)


def assert_whole(text: list[str], width: int) -> None:
    assert max(map(len, text)) <= width
    assert not [line for line in text if "…" in line]


@pytest.mark.parametrize("width", [60, 66, 72, 80])
def test_tables_of_stats_show_every_figure(width: int) -> None:
    text = shown(stats_tables(busy(), sample_stats(ssd=True)), width)
    assert_whole(text, width)
    cells = {cell for line in text for cell in line.replace("   ", "\t").split("\t")}
    assert {"12,345,678", "24,691,356", "1023.0 MiB"} <= {cell.strip() for cell in cells}


@pytest.mark.parametrize("width", [60, 66, 72, 80])
def test_tables_of_misses_show_every_figure(width: int) -> None:
    text = shown(miss_tables(busy()), width)
    assert_whole(text, width)
    assert all(any(f"{12_345_678 + rank:,}" in line for line in text) for rank in range(len(MissCause)))
    assert "Evicted from SSD: what more capacity would have kept" in text


@pytest.mark.parametrize("width", [60, 80])
def test_tables_of_tune_show_every_figure_and_policy(report: TuneReport, width: int) -> None:
    text = shown(tune_tables(report), width)
    assert_whole(text, width)
    words = {word for line in text for word in line.split()}
    assert set(POLICIES) <= words
    for row in report.rows:
        assert f"{row.hit_rate * 100:.2f}" in words
    names = [line for line in text if "━━" in line]
    assert all(any(f"━━ {policy}" in line for line in names) for policy in POLICIES)


@pytest.mark.parametrize("width", [40, 60, 70, 80])
def test_curve_takes_the_width_that_there_is(width: int) -> None:
    stats = busy()
    stats.curve = sample_curve(ssd=True)
    text = shown(curve_view(stats), width)
    assert_whole(text, width)
    rows = [line for line in text if line[9:10] in {"┤", "│"}]
    assert len(rows) == 10
    (marks,) = (line for line in text if line.startswith("         └"))
    assert marks.count("┴") == 6


@pytest.mark.parametrize("width", range(1, 60, 7))
def test_narrower_still_nothing_crashes(report: TuneReport, width: int) -> None:
    stats = busy()
    for made in (stats_tables(stats, sample_stats()), miss_tables(stats), curve_view(stats), tune_tables(report)):
        assert shown(made, width)


def test_bars_shrink_before_they_go() -> None:
    table = render.table("", ["tier", "used", render.text_column(""), "full"])
    table.add_row("dram", "12,345", render.Bar(0.5, 16), "50.0 %")
    whole = "dram   12,345   ████████░░░░░░░░   50.0 %"
    assert shown(table, len(whole))[-1] == whole
    assert shown(table, len(whole) - 8)[-1] == "dram   12,345   ████░░░░   50.0 %"
    assert shown(table, len(whole) - 13)[-1] == "dram   12,345   50.0 %"


def test_columns_that_do_not_fit_come_below_with_what_says_whose_they_are() -> None:
    table = render.table("Sizes", ["name", "bytes", "blocks"])
    table.add_row("one", "1,234,567,890", "1,234,567")
    table.add_section()
    table.add_row("all", "2,345,678,901", "2,345,678")
    assert shown(table, 30) == [
        "Sizes",
        "name           bytes",
        "────────────────────",
        "one    1,234,567,890",
        "",
        "all    2,345,678,901",
        "",
        "Sizes",
        "name      blocks",
        "────────────────",
        "one    1,234,567",
        "",
        "all    2,345,678",
    ]


def test_long_names_lose_their_middle_before_columns_part() -> None:
    table = render.table("Names", ["name", "blocks"])
    table.add_row("models/" + "n" * 60 + "/v2", "1,234,567")
    (row,) = shown(table, 40)[3:]
    assert row.startswith("models/n")
    assert row.endswith("/v2   1,234,567")
    assert len(row) == 40


def test_title_is_not_broken_at_the_width_of_its_table() -> None:
    table = render.table("A title that is much wider than its table", ["name"])
    table.add_row("x")
    assert shown(table, 60)[0] == "A title that is much wider than its table"
