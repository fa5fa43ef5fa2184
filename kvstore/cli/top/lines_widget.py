"""A widget of lines, of which only those that changed are written to the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.geometry import Region
from textual.widget import Widget

__all__ = ["LinesWidget"]


class LinesWidget(Widget):
    """Shows lines, one a row, cut at its width."""

    DEFAULT_CSS = "LinesWidget { text-wrap: nowrap; text-overflow: clip; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._lines: list[Content] = []

    @property
    def lines(self) -> Sequence[Content]:
        """What it shows."""
        return self._lines

    def show(self, lines: Sequence[Content]) -> None:
        """Show these lines; what stays the same is not drawn again."""
        new, old = list(lines), self._lines
        if len(new) != len(old):
            self._lines = new
            self.refresh()
            return
        width = self.content_size.width
        changed = [at for at, (one, other) in enumerate(zip(new, old, strict=True)) if not one.is_same(other)]
        self._lines = new
        if changed:
            self.refresh(*(Region(0, at, width, 1) for at in changed))

    def render(self) -> Content:
        """All lines."""
        return Content("\n").join(self._lines)
