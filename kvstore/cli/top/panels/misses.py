"""Misses: why blocks that were asked for were not there, by cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.miss_tables import cause_words, left_tier
from kvstore.cli.top.charts import slim
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.table import Column, Table
from kvstore.cli.top.text import line, plain, spread
from kvstore.protocol.misses import MissCause
from kvstore.protocol.statistics import DaemonStats, MissStats

__all__ = ["MISSES"]

_BAR_CELLS: Final = 14
_STYLES: Final = {
    MissCause.NEVER_SEEN.value: "$faint",
    MissCause.DIVERGED.value: "$put",
    MissCause.EVICTED.value: "$miss",
    MissCause.QUOTA.value: "$warn",
    MissCause.EXPIRED.value: "$warn",
    MissCause.CORRUPT.value: "$bad",
    MissCause.FAILED_LOAD.value: "$bad",
}
"""What nobody can help is quiet, what is wrong is loud."""

_MORE: Final = (0.25, 1.0, 4.0)
"""Further capacity, as multiples of what there is, that is worth naming."""


class _Cause(NamedTuple):
    name: str
    recent: int
    recent_share: float
    blocks: int
    share: float


def _recent(one: _Cause) -> str | Content:
    return (
        Content.styled(render.percent(one.recent_share), "bold")
        if one.recent
        else Content.styled(render.NOTHING, "$faint")
    )


_TABLE: Final[Table[_Cause]] = Table(
    [
        Column(
            "cause",
            lambda one: plain(cause_words(one.name)),
            lambda one: cause_words(one.name),
            left=True,
            ascending=True,
        ),
        Column("", lambda one: slim(one.recent_share, _BAR_CELLS, _STYLES.get(one.name, "$ssd")), rank=2),
        Column("recent", _recent, lambda one: one.recent_share),
        Column("since start", lambda one: render.percent(one.share), lambda one: one.share, rank=1),
        Column("blocks", lambda one: render.count(one.blocks), lambda one: one.blocks, rank=3, style="$faint"),
    ],
    Order("recent"),
)


def _causes(frame: Frame, misses: MissStats) -> list[_Cause]:
    rates = frame.minute or frame.ten or frame.now
    recent = {} if rates is None else rates.misses
    whole = sum(recent.values())
    ranked = sorted(misses.causes.items(), key=lambda item: -item[1].blocks)
    return [
        _Cause(
            name,
            recent.get(name, 0),
            recent.get(name, 0) / whole if whole else 0.0,
            counted.blocks,
            counted.blocks / misses.blocks if misses.blocks else 0.0,
        )
        for name, counted in ranked
    ]


def _kept(stats: DaemonStats, misses: MissStats, width: int) -> Content | None:
    """What further capacity would have kept of what was evicted."""
    whole = sum(misses.extra_blocks)
    if not whole:
        return None
    parts = [line((f"more {left_tier(stats)[0]} would have kept", "$faint"))]
    kept = 0
    for multiple, blocks in zip(misses.multiples, misses.extra_blocks, strict=False):
        kept += blocks
        if multiple in _MORE:
            parts.append(line((f"+{multiple:.0%} ".replace("%", " %"), "$faint"), (render.ratio(kept, whole), "bold")))
    return spread(parts, width, gap=2)


def _remembered(misses: MissStats, width: int) -> Content:
    return spread(
        [
            line(
                (f"{render.count(misses.ghosts)} departures remembered, ", "$faint"),
                (f"{render.size(misses.ghost_bytes)} of {render.size(misses.ghost_limit_bytes)}", "$faint"),
            ),
            line((f"oldest {render.duration(misses.oldest_ghost_s)} ago" if misses.ghosts else "", "$faint")),
        ],
        width,
        gap=2,
    )


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    misses = frame.stats.misses
    if misses is None:
        return [Content.styled("This daemon does not explain misses.", "$faint")]
    if not misses.blocks:
        return [Content.styled("Nothing was missed yet.", "$faint")]
    lines = _TABLE.lines(_causes(frame, misses), width, frame.orders.get("misses"))
    kept = _kept(frame.stats, misses, width)
    if kept is not None:
        lines.append(kept)
    lines.append(_remembered(misses, width))
    return lines


def _note(frame: Frame) -> str:
    misses, rates = frame.stats.misses, frame.ten or frame.now
    if misses is None or rates is None:
        return ""
    return f"{render.rate(sum(rates.misses.values()), rates.seconds)} missed"


MISSES: Final = Panel(
    "misses",
    "Misses",
    _draw,
    least=5,
    wanted=lambda frame: 3 + len(frame.stats.misses.causes) if frame.stats.misses is not None else 1,
    there=lambda frame: frame.stats.misses is not None,
    pinned=1,
    sorts=tuple(_TABLE.sortable),
    order=_TABLE.order,
    note=_note,
)
