"""The widget that shows a panel: its border, its lines, and scrolling where it has more of them than rows."""

from __future__ import annotations

from typing import Any, ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from kvstore.cli.top.arrangement import Box
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.lines_widget import LinesWidget
from kvstore.cli.top.panel import Panel

__all__ = ["PanelWidget"]


class PanelWidget(LinesWidget, can_focus=True):
    """One panel, at a place that it is given."""

    DEFAULT_CSS = """
    PanelWidget {
        position: absolute;
        border: round $frame;
        border-title-color: $text;
        border-title-style: bold;
        border-subtitle-color: $faint;
        padding: 0 1;
        background: $ground;
        color: $text;
    }
    PanelWidget:focus { border: round $accent; border-title-color: $accent; }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab,right,l", "app.next_panel(1)", show=False),
        Binding("shift+tab,left,h", "app.next_panel(-1)", show=False),
        Binding("up,k", "scroll_lines(-1)", show=False),
        Binding("down,j", "scroll_lines(1)", show=False),
        Binding("pageup", "scroll_pages(-1)", show=False),
        Binding("pagedown", "scroll_pages(1)", show=False),
        Binding("home", "scroll_lines(-1000000)", show=False),
        Binding("end", "scroll_lines(1000000)", show=False),
    ]

    class Chosen(Message):
        """Somebody moved to this panel."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def __init__(self, panel: Panel, number: int) -> None:
        super().__init__(id=panel.name)
        self.panel = panel
        self._title = f"{number} {panel.title}"
        self.border_title = self._title
        self._frame: Frame | None = None
        self._box = Box(0, 0, 0, 0)
        self._zoomed = False
        self._first = 0

    def place(self, box: Box | None, *, zoomed: bool) -> None:
        """Move it to a box, or away."""
        self.display = box is not None
        if box is None or (box, zoomed) == (self._box, self._zoomed):
            return
        if zoomed != self._zoomed:
            self._first = 0
        self._box, self._zoomed = box, zoomed
        self.styles.offset = (box.x, box.y)
        self.styles.width, self.styles.height = box.width, box.height

    def show_frame(self, frame: Frame) -> None:
        """Draw a frame, if the panel is on the screen."""
        self._frame = frame
        if self.display:
            self._draw()

    @property
    def _room(self) -> tuple[int, int]:
        """Cells inside border and padding, by the box: the layout may still be that of before."""
        return max(self._box.width - 4, 1), max(self._box.height - 2, 1)

    def _draw(self) -> None:
        frame, panel = self._frame, self.panel
        if frame is None:
            return
        width, rows = self._room
        draw = panel.details if self._zoomed and panel.details is not None else panel.draw
        lines = list(draw(frame, width, rows))
        hidden = max(len(lines) - rows, 0)
        self._first = min(self._first, hidden)
        if hidden:
            pinned = min(panel.pinned, rows)
            lines = lines[:pinned] + lines[pinned + self._first :][: rows - pinned]
        note = panel.note(frame) if panel.note is not None else ""
        if hidden:
            where = f"{self._first + 1}-{self._first + rows} of {hidden + rows}" if self._first else f"{hidden} more ↓"
            note = f"{note} · {where}" if note else where
        if note != self.border_subtitle:
            self.border_subtitle = note
        self.show([one.truncate(width) if one.cell_length > width else one for one in lines])

    def action_scroll_lines(self, rows: int) -> None:
        """Show lines further down, or up."""
        self._first = max(self._first + rows, 0)
        self._draw()

    def action_scroll_pages(self, pages: int) -> None:
        """The same by as many lines as it shows."""
        self.action_scroll_lines(pages * max(self._room[1] - self.panel.pinned, 1))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """The wheel."""
        event.stop()
        self.action_scroll_lines(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """The wheel."""
        event.stop()
        self.action_scroll_lines(-3)

    def on_focus(self) -> None:
        """By a click or a key."""
        self.post_message(self.Chosen(self.panel.name))

    def on_resize(self, event: Any) -> None:
        """The layout has caught up with the box."""
        self._draw()
        self.refresh()
