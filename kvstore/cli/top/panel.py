"""A panel: what it is called and how it draws. Pure; the widget that shows one is in ``panel_widget``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textual.content import Content

from kvstore.cli.top.frame import Frame, Order

__all__ = ["Panel"]


def _always(frame: Frame) -> bool:
    return True


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        name: unique.
        title: on its border.
        draw: its lines for a frame, a width and a number of rows. More lines than rows are scrolled through.
        least: rows without which it is not worth showing.
        wanted: rows that show all.
        details: like ``draw``, for a panel that has the screen to itself; None where that is the same.
        there: whether the daemon has anything to show in it.
        pinned: lines at its top that do not scroll.
        sorts, order: columns that it can be sorted by, and how it is without a choice.
        note: what stands on its lower border.
    """

    name: str
    title: str
    draw: Callable[[Frame, int, int], Sequence[Content]]
    least: int
    wanted: Callable[[Frame], int]
    details: Callable[[Frame, int, int], Sequence[Content]] | None = None
    there: Callable[[Frame], bool] = _always
    pinned: int = 0
    sorts: tuple[str, ...] = ()
    order: Order | None = None
    note: Callable[[Frame], str] | None = None
