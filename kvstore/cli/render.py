"""How the commands look: one console, one table style, one way to write numbers.

Covers: what ``stats``, ``verify``, ``replay``, ``demo`` and ``bench`` print for people. Does not cover
``--json``, which prints plain objects. A terminal gets colour and its own width; a pipe gets neither, and
never a wrapped line. A narrow terminal gets smaller bars and tables of fewer columns, never a part of a figure.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.console import Console
from rich.text import Text

from kvstore.cli.bar import Bar
from kvstore.cli.fitted_table import FittedTable, shortened
from kvstore.sizes import format_size

__all__ = [
    "NOTHING",
    "Bar",
    "Column",
    "FittedTable",
    "blocks",
    "console",
    "count",
    "duration",
    "facts",
    "latency",
    "percent",
    "plain",
    "rate",
    "ratio",
    "shortened",
    "size",
    "table",
    "text_column",
    "throughput",
]

NOTHING: Final = "-"
"""Stands where there is no value, for example a hit rate before the first lookup."""

_PIPE_WIDTH: Final = 1000
_SECOND_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, and whether its cells are numbers (right) or text (left)."""

    heading: str
    align: Literal["left", "right"] = "right"


def text_column(heading: str) -> Column:
    """A left-aligned column."""
    return Column(heading, "left")


def console(*, stderr: bool = False) -> Console:
    """The console for results (stdout) or for progress and notes (stderr).

    On a terminal it has the terminal's width and colours (``NO_COLOR`` is honoured); elsewhere it is wide
    enough that nothing is wrapped, unless ``COLUMNS`` says otherwise.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, emoji=False, markup=False)


def table(
    title: str, columns: Sequence[str | Column], *, show_header: bool = True, key_columns: int = 1
) -> FittedTable:
    """An empty table in the shared style; fill it with ``add_row``.

    Args:
        title: printed above, at the left.
        columns: headings; a plain string is text in the first place and a number behind it.
        show_header: False for a list of facts, where the headings say nothing.
        key_columns: leading columns that say what a row is of: repeated where a narrow terminal parts the columns.
    """
    made = FittedTable(Text(title, style="bold"), key_columns=key_columns, show_header=show_header)
    for index, given in enumerate(columns):
        column = given if isinstance(given, Column) else Column(given, "right" if index else "left")
        made.add_column(column.heading, justify=column.align, no_wrap=True, overflow="ellipsis")
    return made


def facts(title: str, rows: Iterable[tuple[str, str]]) -> FittedTable:
    """A two-column table of names and values, without headings; on a narrow terminal long values take several lines."""
    made = table(title, ["", text_column("")], show_header=False)
    made.columns[1].no_wrap, made.columns[1].overflow = False, "fold"
    for name, value in rows:
        made.add_row(Text(name, style="dim"), value)
    return made


def plain(text: str) -> Text:
    """Text from elsewhere (a name, a path) as a cell, whose square brackets are no markup."""
    return Text(text)


def size(size_bytes: int | float) -> str:
    """Bytes for people: ``8.0 GiB``."""
    return format_size(size_bytes)


def blocks(number: int) -> str:
    """A number of blocks: ``1 block``, ``12,031 blocks``."""
    return f"{count(number)} {'block' if number == 1 else 'blocks'}"


def count(value: int) -> str:
    """A whole number with separators: ``12,345``."""
    return f"{value:,}"


def percent(fraction: float) -> str:
    """A fraction as a percentage; what is neither none nor all never looks like it: ``99.9 %``."""
    tenths = round(fraction * 1000)
    if tenths == 0 and fraction > 0:
        return "<0.1 %"
    if tenths == 1000 and fraction < 1:
        return ">99.9 %"
    return f"{tenths / 10:.1f} %"


def ratio(part: int, whole: int) -> str:
    """``part / whole`` as a percentage, ``-`` where the whole is nothing."""
    return percent(part / whole) if whole else NOTHING


def latency(seconds: float) -> str:
    """A short time with three digits: ``11.2 us``, ``3.40 ms``, ``1.25 s``."""
    if not math.isfinite(seconds):
        return NOTHING
    nanoseconds = seconds * _SECOND_NS
    for unit, unit_ns in (("ns", 1), ("us", 1_000), ("ms", 1_000_000)):
        value = nanoseconds / unit_ns
        if abs(value) < 999.5:
            return f"{_three_digits(value)} {unit}" if unit_ns > 1 else f"{value:.0f} ns"
    return f"{_three_digits(seconds)} s"


def duration(seconds: float) -> str:
    """A length of time for people: ``420 ms``, ``12.3 s``, ``4 min 05 s``, ``3 h 07 min``, ``12 d 04 h``."""
    if seconds < 1:
        return latency(seconds) if seconds > 0 else "0 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit_s, unit, minor_s, minor in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // minor_s:02d} {minor}"
    return f"{whole} s"


def rate(events: int, seconds: float) -> str:
    """Events a second: ``12,345 /s``; ``-`` where no time passed."""
    if seconds <= 0:
        return NOTHING
    value = events / seconds
    return f"{value:,.0f} /s" if value >= 100 or value == 0 else f"{_three_digits(value)} /s"


def throughput(size_bytes: int | float, seconds: float) -> str:
    """Bytes a second in decimal gigabytes or megabytes: ``3.21 GB/s``; ``-`` where no time passed."""
    if seconds <= 0:
        return NOTHING
    value = size_bytes / seconds
    if value == 0:
        return "0 MB/s"
    return f"{_three_digits(value / 1e9)} GB/s" if value >= 1e9 else f"{_three_digits(value / 1e6)} MB/s"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"
