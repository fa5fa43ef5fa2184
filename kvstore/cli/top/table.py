"""Tables of panels: columns that give way where there is no room, rows that are sorted and filtered. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from textual.content import Content

from kvstore.cli.top.frame import Order

__all__ = ["MOST_ROWS", "Column", "Table", "matching"]

R = TypeVar("R")

MOST_ROWS: Final = 200
"""Rows that are drawn: more would make each frame slow, and nobody scrolls that far."""

_GAP: Final = 2
_LEAST_TEXT_CELLS: Final = 18


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    """A column.

    Attributes:
        heading: also its name for sorting.
        cell: what stands in a row; plain text, or something styled.
        key: what rows are sorted by; None for a column that they are not sorted by.
        rank: columns with a higher one go first where there is no room.
        left: aligned there, for text, which is also cut where there is no room.
        ascending: whether its own order is the smallest first.
        style: of plain cells.
    """

    heading: str
    cell: Callable[[R], str | Content]
    key: Callable[[R], float | str] | None = None
    rank: int = 0
    left: bool = False
    ascending: bool = False
    style: str = ""


class Table(Generic[R]):
    """A kind of table.

    Args:
        columns: the first one that is text takes the room that is left.
        order: how it is sorted unless somebody chose otherwise.
    """

    def __init__(self, columns: Sequence[Column[R]], order: Order) -> None:
        self.columns = tuple(columns)
        self.order = order

    @property
    def sortable(self) -> list[str]:
        """Headings of columns that it can be sorted by."""
        return [column.heading for column in self.columns if column.key is not None]

    def sorted(self, rows: Sequence[R], order: Order | None) -> list[R]:
        """The rows in an order; rows that are equal in it keep theirs."""
        order = order or self.order
        for column in self.columns:
            if column.heading == order.column and column.key is not None:
                return sorted(rows, key=column.key, reverse=column.ascending == order.reverse)
        return list(rows)

    def lines(self, rows: Sequence[R], width: int, order: Order | None) -> list[Content]:
        """The heading, then a line a row, sorted; each at most ``width`` cells. Of very many rows the first ones."""
        order = order or self.order
        ordered = self.sorted(rows, order)[:MOST_ROWS]
        cells = [[self._cell(column, row) for column in self.columns] for row in ordered]
        headings = [self._heading(column, order) for column in self.columns]
        widths = [max([len(heading), *(line[at].cell_length for line in cells)]) for at, heading in enumerate(headings)]
        shown = self._fitting(widths, width)
        lines = [self._line([Content.styled(heading, "$faint") for heading in headings], widths, shown)]
        lines += [self._line(line, widths, shown) for line in cells]
        if len(rows) > MOST_ROWS:
            lines.append(Content.styled(f"{len(rows) - MOST_ROWS:,} more; / filters", "$faint"))
        return [line.truncate(width) if line.cell_length > width else line for line in lines]

    def _heading(self, column: Column[R], order: Order) -> str:
        if column.heading != order.column:
            return column.heading
        arrow = "▲" if column.ascending != order.reverse else "▼"
        return f"{column.heading}{arrow}" if column.left else f"{arrow}{column.heading}"

    @staticmethod
    def _cell(column: Column[R], row: R) -> Content:
        made = column.cell(row)
        return made if isinstance(made, Content) else Content.styled(made, column.style)

    def _fitting(self, widths: list[int], width: int) -> list[int]:
        """Indices of the columns that are shown; ``widths`` of text columns shrink for that."""
        shown = list(range(len(widths)))
        flexible = next((at for at in shown if self.columns[at].left), None)
        while len(shown) > 1:
            excess = sum(widths[at] for at in shown) + _GAP * (len(shown) - 1) - width
            if excess <= 0:
                break
            if flexible is not None and widths[flexible] - excess >= min(_LEAST_TEXT_CELLS, widths[flexible]):
                widths[flexible] -= excess
                break
            shown.remove(max(shown, key=lambda at: (self.columns[at].rank, at)))
            if flexible not in shown:
                flexible = None
        return shown

    def _line(self, cells: list[Content], widths: list[int], shown: list[int]) -> Content:
        made = Content("")
        for place, at in enumerate(shown):
            cell = cells[at]
            if cell.cell_length > widths[at]:
                cell = cell.truncate(widths[at], ellipsis=True)
            blank = Content(" " * (widths[at] - cell.cell_length))
            gap = Content(" " * _GAP) if place else Content("")
            made = made + gap + (cell + blank if self.columns[at].left else blank + cell)
        return made


def matching(needle: str, *texts: str) -> bool:
    """Whether one of the texts contains what is looked for, in lower case; everything does where that is ""."""
    return not needle or any(needle in text.lower() for text in texts)
