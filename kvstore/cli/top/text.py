"""Lines of panels: how numbers and names stand on them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.rates import Rates

__all__ = ["Part", "cut", "ends", "flow", "hit_rate", "line", "per_s", "plain", "spread", "throughput"]

Part = str | tuple[str, str] | Content

_ELLIPSIS: Final = "…"


def line(*parts: Part) -> Content:
    """One line of texts and (text, style) pairs."""
    return Content.assemble(*parts)


def plain(text: str) -> str:
    """Text from elsewhere, without characters that a terminal would act on."""
    return "".join(char if char.isprintable() else "?" for char in text)


def cut(text: str, width: int, *, keep: str = "start") -> str:
    """Text of at most ``width`` characters; ``keep="end"`` keeps the end of a path."""
    if len(text) <= width:
        return text
    if width <= 1:
        return _ELLIPSIS[:width]
    return _ELLIPSIS + text[len(text) - width + 1 :] if keep == "end" else text[: width - 1] + _ELLIPSIS


def ends(left: Content, right: Content, width: int) -> Content:
    """A line with something at either end; where both do not fit, the left one alone."""
    space = width - left.cell_length - right.cell_length
    return left + Content(" " * space) + right if space >= 1 else left.truncate(width, ellipsis=True)


def spread(parts: Sequence[Content], width: int, *, gap: int = 3) -> Content:
    """As many parts as fit beside each other, the first ones first."""
    made = Content("")
    for part in parts:
        if not part.cell_length:
            continue
        wanted = part if not made.cell_length else Content(" " * gap) + part
        if made.cell_length + wanted.cell_length > width:
            break
        made = made + wanted
    return made


def flow(parts: Sequence[Content], width: int, *, gap: int = 2, indent: int = 0) -> list[Content]:
    """Parts beside each other, and on the next line where there is no more room."""
    lines: list[Content] = []
    for part in parts:
        if lines and lines[-1].cell_length + gap + part.cell_length <= width:
            lines[-1] = lines[-1] + Content(" " * gap) + part
        else:
            lines.append(Content(" " * indent) + part)
    return lines


def hit_rate(rate: float | None) -> str:
    """A share, ``-`` where nothing was asked."""
    return render.NOTHING if rate is None else render.percent(rate)


def per_s(rates: Rates | None, name: str) -> str:
    """A count's rate."""
    return render.NOTHING if rates is None else render.rate(getattr(rates.added, name), rates.seconds)


def throughput(rates: Rates | None, name: str) -> str:
    """A rate of bytes."""
    return render.NOTHING if rates is None else render.throughput(getattr(rates.added, name), rates.seconds)
