"""A bar of text: how full something is."""

from __future__ import annotations

import math

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

__all__ = ["Bar"]


class Bar:
    """A bar of text: how full something is, with an ASCII form for terminals that know no more.

    Args:
        fraction: 0 to 1, clipped.
        width: cells.
    """

    def __init__(self, fraction: float, width: int = 20) -> None:
        self.fraction = min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0
        self.width = width

    def text(self, *, ascii_only: bool = False) -> str:
        """The bar as plain text of exactly ``width`` cells."""
        filled = round(self.fraction * self.width)
        if self.fraction > 0 and filled == 0:
            filled = 1
        if self.fraction < 1 and filled == self.width:
            filled = self.width - 1
        full, empty = ("#", ".") if ascii_only else ("█", "░")
        return full * filled + empty * (self.width - filled)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(ascii_only=options.ascii_only), style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.width, self.width)
