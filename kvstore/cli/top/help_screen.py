"""The keys and what the colours mean, over everything else."""

from __future__ import annotations

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvstore.cli.top.text import line

__all__ = ["HelpScreen"]

_KEYS: Final = (
    ("q, ctrl+c", "quit"),
    ("p, space", "pause the screen; polling goes on"),
    ("tab, ← →", "next panel, and back with shift+tab"),
    ("1 ... 9, 0", "that panel"),
    ("↑ ↓, pgup, pgdn", "scroll the panel"),
    ("d, enter", "details: the panel has the screen to itself"),
    ("esc", "back; clears the filter"),
    ("s, S", "sort by the next column; the other way round"),
    ("/", "filter clients, namespaces and tenants"),
    ("e", "another policy for the running daemon"),
    ("+ -", "poll less often; more often"),
    ("t", "dark or light"),
)
_MEANINGS: Final = (
    ("█", "$dram", "DRAM: resident blocks, and hits in memory"),
    ("█", "$ssd", "SSD: stored blocks, and hits that came up from there"),
    ("▓", "$retired", "retired: may leave DRAM, still readable"),
    ("▒", "$put", "granted: lent to clients for writing; on the SSD being written"),
    ("▪", "$warn", "limbo: left, perhaps still read"),
    ("░", "$track", "free; in the chart of hits, misses"),
    ("·", "$track", "nothing was asked"),
)


class HelpScreen(ModalScreen[None]):
    """Goes away with any of its keys."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; background: $ground 60%; }
    HelpScreen Static {
        width: auto; max-width: 100%; height: auto; max-height: 100%;
        border: round $accent; border-title-color: $accent; padding: 0 2; background: $ground; color: $text;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,enter,space", "dismiss", show=False),
    ]

    def compose(self) -> ComposeResult:
        """One box."""
        lines = [line((f"{keys:<16}", "$accent bold"), what) for keys, what in _KEYS]
        lines.append(Content(""))
        lines += [line((glyph, style), f"  {meaning}") for glyph, style, meaning in _MEANINGS]
        shown = Static(Content("\n").join(lines))
        shown.border_title = "kvstore top"
        shown.border_subtitle = "esc"
        yield shown
