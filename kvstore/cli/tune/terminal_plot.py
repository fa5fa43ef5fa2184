"""Curves in a terminal: lines of braille dots, eight to a cell, or of letters where a terminal knows no more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

__all__ = ["Curve", "Plot"]

_BRAILLE: Final = 0x2800
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a cell's dots, by row and column."""
_LEFT: Final = 6
"""Cells of the numbers beside the vertical axis."""
_LEAST_WIDTH: Final = 30
_LEGEND_GAP: Final = "   "


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through points.

    Attributes:
        name: for the legend; its first letter stands for it where there is no braille.
        style: colour.
        points: x above 0, and y; in the order of x.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]


class Plot:
    """Curves over a logarithmic axis, later ones in front.

    Args:
        title: above.
        curves: at least one, of at least one point each.
        x_ticks: places of marks on the horizontal axis, with what to write there.
        y_label: what the vertical axis shows, with a number of it as text.
        height: cells of the plot, without axis and legend.
    """

    def __init__(
        self, title: str, curves: Sequence[Curve], x_ticks: Sequence[tuple[float, str]], height: int = 14
    ) -> None:
        self._title = title
        self._curves = curves
        self._x_ticks = x_ticks
        self._height = height
        every = [point for curve in curves for point in curve.points]
        self._x_low = math.log(min(x for x, _ in every))
        self._x_high = max(math.log(max(x for x, _ in every)), self._x_low + 1e-9)
        self._step, self._y_high = _scale(max(y for _, y in every))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_LEAST_WIDTH, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(_LEAST_WIDTH, min(options.max_width, 80)) - _LEFT - 2
        ascii_only = options.ascii_only
        cells = self._cells(width, ascii_only=ascii_only)
        yield Text(self._title, style="bold")
        marks = {round(y / self._y_high * (self._height - 1)): y for y in self._y_ticks()}
        corner, bar, tick = ("+", "|", "+") if ascii_only else ("└", "│", "┤")
        for row in range(self._height):
            mark = marks.get(self._height - 1 - row)
            label = "" if mark is None else f"{mark:g} %"
            line = Text(f"{label:>{_LEFT}} {bar if mark is None else tick}", style="dim")
            for cell, style in cells[row]:
                line.append(cell, style=style)
            yield line
        yield Text(" " * (_LEFT + 1) + corner + self._axis(width, ascii_only=ascii_only), style="dim")
        yield Text(" " * (_LEFT + 2) + self._tick_labels(width), style="dim")
        yield from self._legend(options.max_width, ascii_only=ascii_only)

    def _legend(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        """Names of the curves, as many in a line as fit."""
        margin = " " * (_LEFT + 2)
        line = Text(margin)
        for curve in reversed(self._curves):
            entry = Text.assemble((curve.name[0] if ascii_only else "━━", curve.style), f" {curve.name}")
            if line.cell_len > len(margin):
                if line.cell_len + len(_LEGEND_GAP) + entry.cell_len <= width:
                    line.append(_LEGEND_GAP)
                else:
                    yield line
                    line = Text(margin)
            line.append_text(entry)
        yield line

    def _y_ticks(self) -> list[float]:
        return [self._step * number for number in range(round(self._y_high / self._step) + 1)]

    def _column(self, x: float, columns: int) -> int:
        return round((math.log(x) - self._x_low) / (self._x_high - self._x_low) * (columns - 1))

    def _cells(self, width: int, *, ascii_only: bool) -> list[list[tuple[str, str]]]:
        """Characters and styles, row by row from the top."""
        across, down = (1, 1) if ascii_only else (2, 4)
        bits = [[0] * width for _ in range(self._height)]
        styles = [[""] * width for _ in range(self._height)]
        letters = [[" "] * width for _ in range(self._height)]
        for curve in self._curves:
            for column, row in self._dots(curve, width * across, self._height * down):
                cell_row, cell = row // down, column // across
                if styles[cell_row][cell] != curve.style:
                    # Two curves in one cell have one colour: that of the one in front, and only its dots.
                    bits[cell_row][cell] = 0
                styles[cell_row][cell] = curve.style
                letters[cell_row][cell] = curve.name[0]
                if not ascii_only:
                    bits[cell_row][cell] |= _DOTS[row % 4][column % 2]
        if ascii_only:
            return [list(zip(*row, strict=True)) for row in zip(letters, styles, strict=True)]
        return [
            [(chr(_BRAILLE | cell) if cell else " ", style) for cell, style in zip(*row, strict=True)]
            for row in zip(bits, styles, strict=True)
        ]

    def _dots(self, curve: Curve, columns: int, rows: int) -> set[tuple[int, int]]:
        """Places of a curve's dots: straight between its points."""
        places = [
            (self._column(x, columns), rows - 1 - round(min(max(y / self._y_high, 0.0), 1.0) * (rows - 1)))
            for x, y in curve.points
        ]
        dots = set(places)
        for (left, above), (right, below) in pairwise(places):
            steps = max(abs(right - left), abs(below - above), 1)
            dots |= {
                (round(left + (right - left) * at / steps), round(above + (below - above) * at / steps))
                for at in range(steps + 1)
            }
        return dots

    def _axis(self, width: int, *, ascii_only: bool) -> str:
        line, mark = ("-", "+") if ascii_only else ("─", "┴")
        columns = {self._column(x, width) for x, _ in self._x_ticks}
        return "".join(mark if column in columns else line for column in range(width))

    def _tick_labels(self, width: int) -> str:
        labels = [" "] * width
        free = 0
        for x, text in self._x_ticks:
            begin = min(max(0, self._column(x, width) - len(text) // 2), width - len(text))
            if begin >= free:
                labels[begin : begin + len(text)] = text
                free = begin + len(text) + 1
        return "".join(labels).rstrip()


def _scale(highest: float) -> tuple[float, float]:
    """Step and end of an axis from 0 that holds a value: steps of 1, 2 or 5 times a power of ten."""
    if highest <= 0:
        return 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(step for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if highest / (step := factor * power) <= 6)
    return step, step * math.ceil(highest / step - 1e-9)
