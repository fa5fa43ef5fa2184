"""Hit-ratio curve: what the present load would hit in other capacities, with a mark where the tier is now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.curve import ceiling, four_bit_factor, hit_rate_at, points, too_few
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.text import line, spread
from kvstore.protocol.statistics import CurveStats

__all__ = ["CURVE"]

_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_SCALE_CELLS: Final = 7
_FACTORS: Final = ((0.25, "¼x"), (0.5, "½x"), (1.0, "1x"), (2.0, "2x"), (4.0, "4x"), (8.0, "8x"))
_ROWS_BESIDE: Final = 3
"""Heading, axis and sentence."""
_WORTH_COMPRESSING: Final = 1.1


def _heading(curve: CurveStats, width: int) -> Content:
    parts = [
        line((render.percent(curve.hit_rate), "bold"), (" with LRU in ", "$faint"), render.size(curve.capacity_bytes)),
    ]
    if curve.ssd_bytes:
        parts.append(line((render.percent(curve.ssd_hit_rate), "$ssd bold"), (" with the SSD", "$faint")))
    if too_few(curve):
        parts.append(Content.styled("few accesses yet", "$warn"))
    return spread(parts, width)


def _at(curve: CurveStats, capacity_bytes: float, cells: int) -> int:
    """The column of a capacity."""
    first, last = curve.capacities_bytes[0], curve.capacities_bytes[-1]
    share = math.log(max(capacity_bytes, first) / first) / math.log(last / first) if last > first else 0.0
    return min(round(share * (cells - 1)), cells - 1)


def _chart(curve: CurveStats, width: int, rows: int) -> list[Content]:
    """An area below the curve, the column of the present capacity bright, and factors of it below."""
    cells = max(width - _SCALE_CELLS, 2)
    first, last = curve.capacities_bytes[0], curve.capacities_bytes[-1]
    rates = [hit_rate_at(curve, first * (last / first) ** (cell / (cells - 1))) for cell in range(cells)]
    top = ceiling(max(*rates, 0.01))
    here = _at(curve, curve.capacity_bytes, cells)
    lines = []
    for row in reversed(range(rows)):
        drawn = "".join(_EIGHTHS[min(max(round(rate / top * rows * 8) - 8 * row, 0), 8)] for rate in rates)
        mark = drawn[here] if drawn[here] != " " else "┊"
        scale = render.percent(top) if row == rows - 1 else "0 %" if row == 0 else ""
        lines.append(
            line(
                (drawn[:here], "$dram"),
                (mark, "$accent bold"),
                (drawn[here + 1 :], "$retired"),
                (f"{scale:>{_SCALE_CELLS}}", "$faint"),
            )
        )
    names = [" "] * (cells + 2)
    for factor, name in _FACTORS:
        place = factor * curve.capacity_bytes
        column = _at(curve, place, cells)
        if first * 0.99 <= place <= last * 1.01 and all(one == " " for one in names[max(column - 1, 0) : column + 2]):
            names[column : column + 2] = name
    lines.append(Content.styled("".join(names)[:width], "$faint"))
    return lines


def _gains(frame: Frame, curve: CurveStats, width: int) -> Content:
    here = curve.hit_rate
    parts = [("2x", hit_rate_at(curve, 2 * curve.capacity_bytes))]
    factor = four_bit_factor(frame.stats)
    if factor > _WORTH_COMPRESSING:
        parts.append(("4-bit blocks", hit_rate_at(curve, factor * curve.capacity_bytes)))
    parts += [
        ("4x", hit_rate_at(curve, 4 * curve.capacity_bytes)),
        ("8x", hit_rate_at(curve, 8 * curve.capacity_bytes)),
    ]
    parts.insert(0, ("½x", hit_rate_at(curve, curve.capacity_bytes / 2)))
    told = [line((f"{name} ", "$faint"), (_change(rate - here), "bold")) for name, rate in parts]
    return spread([*told, Content.styled("points", "$faint")], width, gap=2)


def _change(change: float) -> str:
    """Percentage points, with a sign."""
    return points(change).removesuffix(" points").replace("nothing", "±0")


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    curve = frame.stats.curve
    if curve is None:
        return [Content.styled("This daemon keeps no curve.", "$faint")]
    if not curve.accesses or len(curve.capacities_bytes) < 2:
        return [Content.styled("Nothing was asked for yet.", "$faint")]
    lines = [_heading(curve, width)]
    if frame.charts:
        lines += _chart(curve, width, max(rows - _ROWS_BESIDE, 1))
    return [*lines, _gains(frame, curve, width)]


CURVE: Final = Panel(
    "curve",
    "Curve",
    _draw,
    least=6,
    wanted=lambda frame: 10,
    there=lambda frame: frame.stats.curve is not None,
)
