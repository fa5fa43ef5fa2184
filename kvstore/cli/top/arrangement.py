"""Which panels are on the screen, and where: a page of them, by what the terminal has room for. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Final, NamedTuple

__all__ = ["Arrangement", "Box", "Need", "arrange"]

_COLUMN_CELLS: Final = 58
"""Least width of a column of panels, where there are several."""
_SIDE_BY_SIDE_CELLS: Final = 76
_ALL_ABOVE_CELLS: Final = 170
_BORDER: Final = 2
_LEAST_DECK_ROWS: Final = 5
_MOST_ABOVE: Final = 40
"""Most of the height that charts take, in percent."""


class Box(NamedTuple):
    """A place on the screen, in cells."""

    x: int
    y: int
    width: int
    height: int


class Need(NamedTuple):
    """Rows that a panel wants for what it shows: at least, and at most to show all. Without its border."""

    name: str
    least: int
    wanted: int


@dataclass(frozen=True)
class Arrangement:
    """Where everything is.

    Attributes:
        boxes: of the panels that are shown.
        tabs_y: row of the list of panels, None where all are shown.
        pages: the panels below, page by page.
    """

    boxes: Mapping[str, Box] = field(default_factory=dict)
    tabs_y: int | None = None
    pages: Sequence[Sequence[str]] = ()


def arrange(
    width: int, height: int, *, above: Mapping[str, Need], deck: Sequence[Need], page_of: str, zoomed: str = ""
) -> Arrangement:
    """Places for panels in ``width`` x ``height`` cells, of which nothing is left over.

    Args:
        width: cells.
        height: cells.
        above: hit rate, traffic and tiers, which are always there.
        deck: the panels below them, in as many columns as are readable, and on as many pages as that takes.
        page_of: the page with this panel is shown; the first one where there is none.
        zoomed: this panel has all of it.
    """
    if zoomed:
        return Arrangement({zoomed: Box(0, 0, width, height)}, pages=_pages(deck, 1, height))
    tall = height // 4
    boxes, top = _above(width, tall, above)
    if height - top < _LEAST_DECK_ROWS or not deck:
        return Arrangement(_stretched(boxes, height), pages=_pages(deck, 1, _LEAST_DECK_ROWS))
    count = max(1, width // _COLUMN_CELLS)
    pages = _pages(deck, count, height - top)
    tab_rows = int(len(pages) > 1)
    if tab_rows:
        pages = _pages(deck, count, height - top - tab_rows)
    shown = next((page for page in pages if page_of in page), pages[0])
    needs = {need.name: need for need in deck}
    columns = _balanced([needs[name] for name in shown], min(count, len(shown)), height - top - tab_rows)
    spare = height - top - tab_rows - max(sum(need.wanted + _BORDER for need in column) for column in columns)
    if spare > 0:
        # Rows that no panel below wants make the charts above higher.
        boxes, top = _above(width, min(tall + spare, max(tall, height * _MOST_ABOVE // 100)), above)
    boxes |= _placed(columns, width, top + tab_rows, height - top - tab_rows)
    return Arrangement(boxes, top if tab_rows else None, pages)


def _above(width: int, tall: int, above: Mapping[str, Need]) -> tuple[dict[str, Box], int]:
    hits, traffic, tiers = above["hits"], above["traffic"], above["tiers"]
    charts = min(max(tall, hits.least + _BORDER), hits.wanted + _BORDER)
    below = tiers.wanted + _BORDER
    if width >= _ALL_ABOVE_CELLS:
        rows = max(charts, below)
        left, middle = width * 36 // 100, width * 30 // 100
        boxes = {
            "hits": Box(0, 0, left, rows),
            "traffic": Box(left, 0, middle, rows),
            "tiers": Box(left + middle, 0, width - left - middle, rows),
        }
        return boxes, rows
    if width >= _SIDE_BY_SIDE_CELLS:
        left = width * 52 // 100
        boxes = {
            "hits": Box(0, 0, left, charts),
            "traffic": Box(left, 0, width - left, charts),
            "tiers": Box(0, charts, width, below),
        }
        return boxes, charts + below
    other = traffic.least + _BORDER
    boxes = {
        "hits": Box(0, 0, width, charts),
        "traffic": Box(0, charts, width, other),
        "tiers": Box(0, charts + other, width, below),
    }
    return boxes, charts + other + below


def _stretched(boxes: Mapping[str, Box], height: int) -> dict[str, Box]:
    """Boxes without what is below the screen, and what touches its bottom as high as there is room."""
    cut = {name: box._replace(height=min(box.height, height - box.y)) for name, box in boxes.items()}
    bottom = max(box.y + box.height for box in cut.values())
    return {
        name: box._replace(height=height - box.y) if box.y + box.height == bottom else box
        for name, box in cut.items()
        if box.height > _BORDER
    }


def _pages(deck: Sequence[Need], columns: int, rows: int) -> list[list[str]]:
    """The deck cut into pages, in its order, each with as many panels as fit."""
    pages: list[list[str]] = []
    left = list(deck)
    while left:
        taken = next((n for n in range(len(left), 1, -1) if _fits(left[:n], columns, rows)), 1)
        pages.append([need.name for need in left[:taken]])
        left = left[taken:]
    return pages


def _fits(needs: Sequence[Need], columns: int, rows: int) -> bool:
    used, height = 1, 0
    for need in needs:
        box = need.least + _BORDER
        if height and height + box > rows:
            used, height = used + 1, 0
        height += box
        if used > columns or height > rows:
            return False
    return True


def _balanced(needs: Sequence[Need], columns: int, rows: int) -> list[list[Need]]:
    """Consecutive panels as columns, so that the one that wants most rows wants as few as possible."""
    if columns == 1:
        return [list(needs)]

    def excess(split: list[list[Need]]) -> tuple[int, int]:
        least = max(sum(need.least + _BORDER for need in column) for column in split)
        return max(least - rows, 0), max(sum(need.wanted + _BORDER for need in column) for column in split)

    return min(_splits(needs, columns), key=excess)


def _splits(needs: Sequence[Need], columns: int) -> Iterator[list[list[Need]]]:
    for cuts in combinations(range(1, len(needs)), columns - 1):
        edges = (0, *cuts, len(needs))
        yield [list(needs[left:right]) for left, right in pairwise(edges)]


def _placed(columns: Sequence[Sequence[Need]], width: int, top: int, rows: int) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    for at, column in enumerate(columns):
        left, right = width * at // len(columns), width * (at + 1) // len(columns)
        y = top
        for need, height in zip(column, _heights(column, rows), strict=True):
            if height > 0:
                boxes[need.name] = Box(left, y, right - left, height)
            y += height
    return boxes


def _heights(column: Sequence[Need], rows: int) -> list[int]:
    """Rows for each panel of a column, borders included: all of them, those that want more first."""
    heights = [need.least + _BORDER for need in column]
    spare = rows - sum(heights)
    while spare > 0:
        hungry = [at for at, need in enumerate(column) if heights[at] < need.wanted + _BORDER]
        if not hungry:
            break
        for at in hungry[:spare]:
            heights[at] += 1
        spare -= len(hungry[:spare])
    heights[-1] += spare
    if heights[-1] < 0:
        heights[-1] = 0
    return heights
