from __future__ import annotations

import io

import pytest
from rich.console import Console
from sample_stats import sample_curve, sample_stats

from kvstore.cli.curve import curve_view, four_bit_factor, hit_rate_at
from kvstore.cli.tune.sizes import recorded_sizes
from kvstore.protocol.statistics import DaemonStats, NamespaceStats


def lines(stats: DaemonStats, width: int = 1000) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False).print(curve_view(stats))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_curve_says_in_words_what_other_capacities_would_give() -> None:
    text = lines(sample_stats(curve=True, ssd=True))
    assert "8.0 GiB of DRAM with LRU would hit 30.0 % of the blocks asked for." in text
    assert (
        "2x the DRAM would give +10.0 points, 4-bit blocks (3.56x as many) +18.3 points, 8x +30.0 points; "
        "half the DRAM -10.0 points." in text
    )
    assert "DRAM and SSD together (108.0 GiB) hit 62.0 %: +32.0 points come from the SSD." in text
    assert "4.0 % of it is 12 blocks that one request in a hundred or more uses (3.0 MiB)." in text
    assert text[-1] == "from 8,100 sampled blocks (12.5 %) and about 120,000 accesses, mostly of the last 2 h 00 min"


def test_curve_of_a_larger_ssd_than_it_reaches_says_at_least() -> None:
    stats = sample_stats(curve=True, ssd=True)
    assert stats.curve is not None
    stats.curve.ssd_bytes = 900 << 30
    assert "DRAM and SSD together (900.0 GiB) hit at least 62.0 %: +32.0 points come from the SSD." in lines(stats)


def test_curve_of_blocks_that_are_compressed_promises_nothing_of_compression() -> None:
    stats = sample_stats(curve=True)
    stats.namespaces = [NamespaceStats(name="small", generation=0, blocks=1, slot_bytes=1 << 20, codec="kivi4")]
    assert not any("4-bit" in line for line in lines(stats))
    stats.namespaces.append(NamespaceStats(name="large", generation=0, blocks=1, slot_bytes=1 << 20, codec="raw"))
    assert any("4-bit blocks (1.56x as many)" in line for line in lines(stats))


@pytest.mark.parametrize("slot_bytes", [8192, 65536, 69632, 1 << 20, 10_489_856])
def test_curve_and_tune_agree_on_how_many_blocks_compression_makes_of_one(slot_bytes: int) -> None:
    slots = recorded_sizes(slot_bytes, "raw", ["kivi4"]).slot_bytes
    stats = sample_stats()
    stats.namespaces = [NamespaceStats(name="n", generation=0, blocks=9, slot_bytes=9 * slot_bytes, codec="raw")]
    assert four_bit_factor(stats) == slots["raw"] / slots["kivi4"]


def test_compression_of_a_daemon_without_blocks_promises_nothing() -> None:
    stats = sample_stats()
    stats.namespaces = []
    assert four_bit_factor(stats) == 1.0


def test_curve_plot_is_80_columns_wide_and_grows_to_the_right() -> None:
    text = lines(sample_stats(curve=True, ssd=True), 80)
    assert max(map(len, text)) <= 80
    rows = [line[10:] for line in text if line[9:10] in {"┤", "│"}]
    heights = ["".join(column).strip() for column in zip(*[row.ljust(62) for row in reversed(rows)], strict=True)]
    assert len(rows) == 10
    assert sorted(map(len, heights)) == list(map(len, heights))
    marks = next(line for line in text if line.startswith("         └"))
    assert marks.count("┴") == 6


def test_curve_of_few_accesses_says_so() -> None:
    stats = sample_stats(curve=True)
    assert stats.curve is not None
    stats.curve.accesses = 900.0
    assert lines(stats)[-1].endswith("; too few to rely on")
    stats.curve.accesses = 0.0
    assert lines(stats)[1:] == ["nothing was asked for yet"]


def test_curve_of_an_older_daemon_is_not_there_and_it_says_what_to_do() -> None:
    assert lines(sample_stats()) == [
        "this daemon keeps no curve: it is older than kvstore stats --curve; upgrade it",
    ]


@pytest.mark.parametrize(("times", "rate"), [(0.1, 0.1), (0.25, 0.1), (1, 0.3), (1.5, 0.358), (8, 0.6), (99, 0.6)])
def test_curve_between_its_points_is_interpolated(times: float, rate: float) -> None:
    assert hit_rate_at(sample_curve(), times * (8 << 30)) == pytest.approx(rate, abs=0.001)
