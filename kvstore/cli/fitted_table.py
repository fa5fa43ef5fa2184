"""Tables that fit a narrow terminal without cutting a figure off: ``1,…`` could be anything.

First bars shrink and then go, then long texts lose their middles, and then the columns stand in several tables one
below the other, each of which begins with the columns that say what a row is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvstore.cli.bar import Bar

__all__ = ["FittedTable", "shortened"]

_LOOK: Final[dict[str, Any]] = {
    "box": box.SIMPLE_HEAD,
    "show_edge": False,
    "pad_edge": False,
    "padding": (0, 1),
    "header_style": "dim",
    "border_style": "dim",
}
_GAP: Final = 3
"""Cells between two columns."""
_LEAST_BAR: Final = 4
_LEAST_TEXT: Final = 20


def shortened(text: str, cells: int) -> str:
    """A name that is too long for its column, without its middle: paths and versions differ at their ends."""
    if len(text) <= cells:
        return text
    if cells < 2:
        return "…"[:cells]
    head = (cells - 1) // 2
    return f"{text[:head]}…{text[-(cells - 1 - head) :]}"


class FittedTable(Table):
    """A table whose title stands on lines of its own, and which takes the width that there is.

    Args:
        title: above, at the left; it may be wider than the table.
        key_columns: leading columns that say what a row is of, and are repeated where the columns do not fit beside
            each other.
        show_header: whether there are headings.
    """

    def __init__(self, title: Text, *, key_columns: int = 1, show_header: bool = True) -> None:
        super().__init__(show_header=show_header, **_LOOK)
        self.heading = title
        self.key_columns = key_columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading.plain:
            yield self.heading
        if not all(column.no_wrap for column in self.columns):
            # Its cells take several lines.
            yield from super().__rich_console__(console, options)
            return
        widths = self._natural_widths(console, options)
        for number, part in enumerate(self._parts(widths, options.max_width)):
            if number:
                yield Text()
                yield self.heading
            yield self._part(part)

    def _natural_widths(self, console: Console, options: ConsoleOptions) -> list[int]:
        wide = options.update(max_width=1 << 20)
        return [
            max(
                (
                    Measurement.get(console, wide, cell).maximum
                    for cell in ([column.header] if self.show_header else []) + list(column.cells)
                ),
                default=0,
            )
            for column in self.columns
        ]

    def _parts(self, widths: Sequence[int], room: int) -> Iterator[dict[int, int]]:
        """Columns of each table, with their widths in cells."""
        whole = dict(enumerate(widths))
        for column in range(len(self.columns)):
            excess = _wide(whole) - room
            if excess > 0 and self._has_bars(column):
                whole[column] -= excess
                if whole[column] < _LEAST_BAR:
                    del whole[column]
        texts = [column for column in whole if self._is_text(column)]
        while (excess := _wide(whole) - room) > 0:
            longest = max(texts, key=whole.__getitem__, default=None)
            if longest is None or whole[longest] <= _LEAST_TEXT:
                break
            whole[longest] -= 1
        if excess <= 0:
            yield whole
            return
        keys = {column: widths[column] for column in whole if column < self.key_columns}
        for column in keys:
            if self._is_text(column):
                keys[column] = min(keys[column], max(_LEAST_TEXT, room // 2))
        part = dict(keys)
        for column in whole:
            if column in keys:
                continue
            least = _wide(keys) + _GAP
            width = min(widths[column], max(room - least, _LEAST_TEXT)) if self._is_text(column) else widths[column]
            if len(part) > len(keys) and _wide(part) + _GAP + width > room:
                yield part
                part = dict(keys)
            part[column] = width
        yield part

    def _has_bars(self, column: int) -> bool:
        cells = list(self.columns[column].cells)
        return any(isinstance(cell, Bar) for cell in cells) and all(isinstance(cell, Bar) or not cell for cell in cells)

    def _is_text(self, column: int) -> bool:
        return self.columns[column].justify == "left" and not self._has_bars(column)

    def _part(self, widths: dict[int, int]) -> Table:
        made = Table(show_header=self.show_header, **_LOOK)
        for at in widths:
            column = self.columns[at]
            made.add_column(column.header, justify=column.justify, no_wrap=True, overflow=column.overflow)
        cells = [[self._cell(cell, at, cells) for cell in self.columns[at].cells] for at, cells in widths.items()]
        for row, in_row in zip(self.rows, zip(*cells, strict=True), strict=True):
            made.add_row(*in_row, style=row.style, end_section=row.end_section)
        return made

    def _cell(self, cell: RenderableType, column: int, cells: int) -> RenderableType:
        if isinstance(cell, Bar):
            return Bar(cell.fraction, cells)
        if self._is_text(column) and isinstance(cell, str):
            return shortened(cell, cells)
        if self._is_text(column) and isinstance(cell, Text) and cell.cell_len > cells:
            return Text(shortened(cell.plain, cells), style=cell.style)
        return cell


def _wide(widths: dict[int, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)
