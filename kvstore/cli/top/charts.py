"""Bars and charts of text, drawn with block characters. Pure: from numbers to styled lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from textual.content import Content

__all__ = ["Segment", "bar", "columns", "nice_bucket_s", "segment_cells", "slim", "sparkline", "stacked"]

_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_NONE: Final = "·"
_BUCKETS_S: Final = (1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Segment(NamedTuple):
    """A part of a bar: how much of the whole, 0 to 1, and how it looks, with and without colours."""

    share: float
    glyph: str
    style: str


def segment_cells(shares: Sequence[float], width: int) -> list[int]:
    """Cells for each share of a bar: what is there has at least one, and the last is not full before it is.

    ``shares`` add up to at most 1 (what is more is cut off at the end). The sum of cells is at most ``width``.
    """
    exact = [max(share, 0.0) * width if math.isfinite(share) else 0.0 for share in shares]
    cells = [int(value) for value in exact]
    total = min(round(sum(exact)), width)
    for at in sorted(range(len(exact)), key=lambda at: cells[at] - exact[at]):
        if sum(cells) < total:
            cells[at] += 1
    for at, value in enumerate(exact):
        if value > 0 and cells[at] == 0:
            cells[at] = 1
    most = width if sum(exact) >= width - 1e-9 else width - 1
    while sum(cells) > most and max(cells) > 1:
        cells[cells.index(max(cells))] -= 1
    return cells


def bar(segments: Sequence[Segment], width: int, *, rest: str = "░", rest_style: str = "$track") -> Content:
    """A bar of exactly ``width`` cells; what no segment takes is ``rest``."""
    cells = segment_cells([one.share for one in segments], width)
    parts = [(one.glyph * count, one.style) for one, count in zip(segments, cells, strict=True) if count]
    left = width - sum(cells)
    if left:
        parts.append((rest * left, rest_style))
    return Content.assemble(*parts)


def slim(share: float, width: int, style: str) -> Content:
    """A thin bar for rows of a table: ``share`` of the whole, 0 to 1, in steps of half a cell."""
    halves = round(min(max(share, 0.0), 1.0) * width * 2) if math.isfinite(share) else 0
    if share > 0 and halves == 0:
        halves = 1
    if share < 1 and halves == width * 2:
        halves -= 1
    full, half = divmod(halves, 2)
    return Content.assemble(("━" * full + "╸" * half, style), ("─" * (width - full - half), "$track"))


def sparkline(values: Sequence[float | None], *, style: str) -> Content:
    """One row of columns, a value each, with a gap to the row above."""
    return columns(values, 1, style=style, gap=True)[0]


def columns(values: Sequence[float | None], rows: int, *, style: str, gap: bool = False) -> list[Content]:
    """Rows of a column chart, the upper one first.

    The largest value reaches the top, or with ``gap`` stays an eighth of a row below it. A value above 0 shows; None,
    nothing known, is blank.
    """
    highest = max((value for value in values if value is not None), default=0.0)
    top = highest * 8 * rows / (8 * rows - gap)
    eighths = [_eighths(value, top, rows) for value in values]
    lines = []
    for row in reversed(range(rows)):
        parts: list[tuple[str, str]] = []
        for value in eighths:
            if value is None:
                parts.append((" ", style))
            else:
                parts.append((_EIGHTHS[min(max(value - 8 * row, 0), 8)], style))
        lines.append(_joined(parts))
    return lines


def stacked(
    lower: Sequence[float | None], upper: Sequence[float | None], rows: int, *, lower_style: str, upper_style: str
) -> list[Content]:
    """Rows of a column chart of two shares, 0 to 1, of which the second stands on the first.

    None, nothing known, is blank; NaN, there was nothing to have a share of, is a dot at the bottom.
    """
    lines = []
    heights: list[tuple[int, int] | str] = []
    for below, above in zip(lower, upper, strict=True):
        if below is None or above is None:
            heights.append(" ")
            continue
        if math.isnan(below + above):
            heights.append(_NONE)
            continue
        low = _eighths(below, 1.0, rows) or 0
        both = max(_eighths(below + above, 1.0, rows) or 0, low + (above > 0))
        heights.append((min(low, 8 * rows), min(both, 8 * rows)))
    for row in reversed(range(rows)):
        parts: list[tuple[str, str]] = []
        for height in heights:
            if isinstance(height, str):
                parts.append((height if row == 0 else " ", "$track"))
                continue
            low, both = (min(max(one - 8 * row, 0), 8) for one in height)
            if low == 8:
                parts.append(("█", lower_style))
            elif low == 0:
                parts.append((_EIGHTHS[both], upper_style))
            elif both - low >= 8 - both and both > low:
                # The cell has both: the upper one is what lies behind the lower one.
                parts.append((_EIGHTHS[low], f"{lower_style} on {upper_style}"))
            elif both - low >= low:
                parts.append((_EIGHTHS[both], upper_style))
            else:
                parts.append((_EIGHTHS[low], lower_style))
        lines.append(_joined(parts))
    return lines


def nice_bucket_s(width: int, least_span_s: float, interval_s: float) -> float:
    """Seconds for each column of a chart ``width`` wide: it spans enough, and no column lies between two polls."""
    wanted = max(least_span_s / max(width, 1), interval_s)
    return next((bucket for bucket in _BUCKETS_S if bucket >= wanted - 1e-9), _BUCKETS_S[-1])


def _eighths(value: float | None, top: float, rows: int) -> int | None:
    if value is None or not math.isfinite(value):
        return None
    if value <= 0 or top <= 0:
        return 0
    return min(max(round(value / top * rows * 8), 1), rows * 8)


def _joined(parts: Sequence[tuple[str, str]]) -> Content:
    """Neighbours of one style as one span, which keeps lines short on the wire."""
    merged: list[tuple[str, str]] = []
    for text, style in parts:
        if merged and merged[-1][1] == style:
            merged[-1] = (merged[-1][0] + text, style)
        else:
            merged.append((text, style))
    return Content.assemble(*merged)
