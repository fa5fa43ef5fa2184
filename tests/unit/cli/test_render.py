from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvstore.cli import render


def printed(renderable: object, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width, highlight=False).print(renderable)
    stream.flush()
    return [line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()]


def test_table_printed_aligns_text_left_and_numbers_right() -> None:
    table = render.table("Tiers", ["tier", "used", render.text_column("state")])
    table.add_row("dram", render.size(3 << 20), "ok")
    table.add_row("ssd", render.size(1536 << 30), "full")
    assert printed(table) == [
        "Tiers",
        "tier      used   state",
        "──────────────────────",
        "dram   3.0 MiB   ok",
        "ssd    1.5 TiB   full",
    ]


def test_facts_printed_are_names_and_values() -> None:
    assert printed(render.facts("Daemon", [("pid", "7"), ("endpoint", "ipc:///x")])) == [
        "Daemon",
        "pid        7",
        "endpoint   ipc:///x",
    ]


def test_table_too_wide_is_cut_not_wrapped() -> None:
    table = render.table("Names", ["name", "blocks"])
    table.add_row("n" * 200, "12")
    assert len(printed(table)) == 4


def test_table_shows_square_brackets_as_they_are() -> None:
    table = render.table("[odd]", ["name"])
    table.add_row(render.plain("[bold]x"))
    assert printed(table)[0] == "[odd]"
    assert printed(table)[-1] == "[bold]x"


@pytest.mark.parametrize(
    ("fraction", "bar"),
    [
        (0, "░░░░"),
        (0.001, "█░░░"),
        (0.5, "██░░"),
        (0.999, "███░"),
        (1, "████"),
        (7, "████"),
        (-1, "░░░░"),
        (float("nan"), "░░░░"),
    ],
)
def test_bar_shows_none_and_all_only_when_it_is(fraction: float, bar: str) -> None:
    assert render.Bar(fraction, 4).text() == bar


def test_bar_where_only_ascii_is_known_is_ascii() -> None:
    assert printed(render.Bar(0.5, 4), encoding="ascii") == ["##.."]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ns"),
        (5e-9, "5 ns"),
        (11.23e-6, "11.2 us"),
        (0.9996e-3, "1.00 ms"),
        (3.4e-3, "3.40 ms"),
        (0.12, "120 ms"),
        (1.25, "1.25 s"),
        (83, "83.0 s"),
        (float("nan"), "-"),
    ],
)
def test_latency_has_three_digits(seconds: float, text: str) -> None:
    assert render.latency(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "420 ms"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (245, "4 min 05 s"),
        (11_220, "3 h 07 min"),
        (86400 * 12 + 4 * 3600 + 59, "12 d 04 h"),
    ],
)
def test_duration_is_two_units_at_most(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 9, "0.0 %"),
        (1, 3, "33.3 %"),
        (1, 10**6, "<0.1 %"),
        (10**6 - 1, 10**6, ">99.9 %"),
        (3, 3, "100.0 %"),
    ],
)
def test_ratio_never_rounds_to_none_or_all(part: int, whole: int, text: str) -> None:
    assert render.ratio(part, whole) == text


def test_rates_without_time_are_nothing() -> None:
    assert render.rate(5, 0) == render.throughput(5, 0) == render.NOTHING
    assert render.rate(12_345, 1) == "12,345 /s"
    assert render.rate(5, 2) == "2.50 /s"
    assert render.throughput(3.214e9, 1) == "3.21 GB/s"
    assert render.throughput(5e6, 1) == "5.00 MB/s"


def test_counts_and_sizes_are_readable() -> None:
    assert render.count(1_234_567) == "1,234,567"
    assert render.size(8 << 30) == "8.0 GiB"
