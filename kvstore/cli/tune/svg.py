"""Curves as SVG for a page: colours are CSS variables, so that one drawing serves light and dark.

Covers: one chart with a logarithmic axis from left to right. Values show when the pointer rests on a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Chart", "Line"]

_WIDTH: Final = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 36, 18, 52
_MOST_TICKS: Final = 10
_MOST_STEPS: Final = 7


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        css_class: gives its colour.
        points: of the line, in the order of x.
        marks: points that are marked, each with what it says.
        dashed: whether the line is.
        shaded: whether what is above it is out of reach.
    """

    css_class: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, str]]
    dashed: bool = False
    shaded: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart.

    Attributes:
        label: what it shows, for those who cannot see it.
        lines: the first ones behind.
        ticks: places on the horizontal axis, with two lines of text.
        y_text: writes a value of the vertical axis.
        height: in pixels of 760 in width.
        ceiling: a value that a horizontal line marks, with its text.
    """

    label: str
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str, str]]
    y_text: Callable[[float], str]
    height: int = 340
    ceiling: tuple[float, str] | None = None

    def svg(self) -> str:
        """The drawing."""
        every = [point for line in self.lines for point in line.points]
        low = math.log(min(x for x, _ in every))
        high = max(math.log(max(x for x, _ in every)), low + 1e-9)
        highest = max([y for _, y in every] + ([self.ceiling[0]] if self.ceiling else []))
        step, top = _scale(highest * 1.04)
        bottom = self.height - _BOTTOM

        def across(x: float) -> float:
            return _LEFT + (math.log(x) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

        def down(y: float) -> float:
            return bottom - min(max(y / top, 0.0), 1.0) * (bottom - _TOP)

        parts = [
            f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img" aria-label="{escape(self.label)}" '
            'xmlns="http://www.w3.org/2000/svg">'
        ]
        for number in range(round(top / step) + 1):
            y = down(number * step)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            text = escape(self.y_text(number * step))
            parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        every_nth = -(-len(self.ticks) // _MOST_TICKS)
        for x, first, second in self.ticks[::every_nth]:
            at = across(x)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(first)}'
                f'<tspan class="faint" x="{at:.1f}" dy="15">{escape(second)}</tspan></text>'
            )
        for line in self.lines:
            places = [(across(x), down(y)) for x, y in line.points]
            if line.shaded:
                outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                right, left = places[-1][0], places[0][0]
                parts.append(f'<polygon class="beyond" points="{left:.1f},{_TOP} {outline} {right:.1f},{_TOP}"/>')
            path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            dashed = " dashed" if line.dashed else ""
            parts.append(f'<path class="line {line.css_class}{dashed}" d="{path}"/>')
        if self.ceiling is not None:
            value, text = self.ceiling
            y = down(value)
            parts.append(f'<line class="ceiling" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT + 6}" y="{y - 5:.1f}">{escape(text)}</text>')
        for line in self.lines:
            parts += [
                f'<circle class="mark {line.css_class}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.6">'
                f"<title>{escape(says)}</title></circle>"
                for x, y, says in line.marks
            ]
        return "".join([*parts, "</svg>"])


def _scale(highest: float) -> tuple[float, float]:
    """Step and end of an axis from 0: steps of 1, 2 or 5 times a power of ten."""
    if highest <= 0:
        return 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(step for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if highest / (step := factor * power) <= _MOST_STEPS)
    return step, step * math.ceil(highest / step - 1e-9)
