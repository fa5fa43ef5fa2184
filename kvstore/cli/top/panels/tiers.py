"""Tiers: what fills them, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import Segment, bar
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.panels.slots import SLOTS, slot_lines
from kvstore.cli.top.text import ends, flow, line, plain
from kvstore.protocol.statistics import DaemonStats, SsdStats

__all__ = ["TIERS"]

_NAME_CELLS: Final = 6
_LEAST_BAR_CELLS: Final = 16


class _Kind(NamedTuple):
    """A kind of use of a tier's bytes."""

    name: str
    size_bytes: int
    glyph: str
    style: str


def _dram(stats: DaemonStats) -> list[_Kind]:
    dram, ssd = stats.dram, stats.ssd
    retired = min(ssd.retired_bytes, dram.resident_bytes) if ssd is not None else 0
    kinds = [_Kind("resident", dram.resident_bytes - retired, "█", "$dram")]
    if ssd is not None:
        kinds.append(_Kind("retired", retired, "▓", "$retired"))
    kinds.append(_Kind("granted", dram.granted_bytes, "▒", "$put"))
    kinds.append(_Kind("limbo", dram.limbo_bytes, "▪", "$warn"))
    return kinds


def _ssd(ssd: SsdStats) -> list[_Kind]:
    return [
        _Kind("stored", ssd.resident_bytes, "█", "$ssd"),
        _Kind("writing", ssd.writing_bytes, "▒", "$put"),
        _Kind("leaving", ssd.leaving_bytes, "▪", "$warn"),
        _Kind("log", ssd.log_bytes, "≡", "$faint"),
    ]


def _row(name: str, kinds: Sequence[_Kind], whole: int, used: int, capacity: int, blocks: int, width: int) -> Content:
    full = render.ratio(used, capacity)
    figures = f"{render.size(used)} of {render.size(capacity)}"
    right = f"{full:>8}" + (f"{render.count(blocks):>12} blocks" if width >= 76 else "")
    left = line((f"{name:<{_NAME_CELLS}}", "bold"), f"{figures:<22} ")
    cells = width - left.cell_length - len(right)
    if cells < _LEAST_BAR_CELLS:
        left, right = line((f"{name:<{_NAME_CELLS}}", "bold")), f"{full:>8}"
        cells = width - left.cell_length - len(right)
    segments = [Segment(kind.size_bytes / whole if whole else 0.0, kind.glyph, kind.style) for kind in kinds]
    style = "$bad bold" if used > capacity else "bold"
    return left + bar(segments, max(cells, 1)) + Content.styled(right, style)


def _legend(kinds: Sequence[_Kind], free_bytes: int, width: int, rows: int) -> list[Content]:
    """What the bar's glyphs mean, on as many lines as there are; where there is little room, only of what there is."""
    every = [*kinds, _Kind("free", free_bytes, "░", "$faint")]
    some = [kind for kind in every if kind.size_bytes]
    lines = _flow(every, every, width, gap=2)
    if len(lines) <= max(rows, 1):
        return lines
    for gap, figures in ((2, some), (1, some), (1, some[1:]), (1, some[1:-1])):
        lines = _flow(some, figures, width, gap=gap)
        if len(lines) <= 1:
            break
    return lines[:1]


def _flow(kinds: Sequence[_Kind], figures: Sequence[_Kind], width: int, *, gap: int) -> list[Content]:
    """Glyphs and names, and sizes of those in ``figures``."""
    parts = [
        line(
            (f"{kind.glyph} ", kind.style),
            kind.name,
            (f" {render.size(kind.size_bytes)}" * (kind in figures), "$faint"),
        )
        for kind in kinds
    ]
    return flow(parts, width, gap=gap, indent=_NAME_CELLS)


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    stats = frame.stats
    dram, ssd = stats.dram, stats.ssd
    kinds = _dram(stats)
    # Grants and limbo have room beyond the capacity, so the bar is the whole arena.
    whole = max(dram.arena_bytes, sum(kind.size_bytes for kind in kinds))
    legend_rows = 1 + max(rows - _wanted(frame), 0) // (1 if ssd is None else 2)
    lines = [
        _row("DRAM", kinds, whole, dram.resident_bytes, dram.capacity_bytes, dram.blocks, width),
        *_legend(kinds, whole - sum(kind.size_bytes for kind in kinds), width, legend_rows),
    ]
    if dram.problem:
        lines.append(line((f"{'':<{_NAME_CELLS}}{plain(dram.problem)}", "$bad bold")))
    if ssd is not None:
        below = _ssd(ssd)
        taken = sum(kind.size_bytes for kind in below)
        whole = max(ssd.capacity_bytes, taken)
        if rows > _wanted(frame):
            lines.append(Content(""))
        lines.append(_row("SSD", below, whole, taken, ssd.capacity_bytes, ssd.blocks, width))
        lines += _legend(below, whole - taken, width, legend_rows)
        if ssd.state != "ok" or ssd.problem:
            problem = f"{ssd.state}: {plain(ssd.problem) or 'see the log of the daemon'}"
            lines.append(line((f"{'':<{_NAME_CELLS}}{problem}", "$bad bold")))
    slots = slot_lines(frame, width)
    if len(slots) > 1 and len(lines) + 1 + len(slots) <= rows:
        lines += [Content(""), *slots]
    return lines


def _wanted(frame: Frame) -> int:
    ssd = frame.stats.ssd
    rows = 2 + bool(frame.stats.dram.problem)
    return rows if ssd is None else rows + 2 + (ssd.state != "ok" or bool(ssd.problem))


def _details(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    dram = frame.stats.dram
    populated = render.ratio(dram.populated_bytes, dram.arena_bytes)
    lines = [*_draw(frame, width, _wanted(frame) + 1), Content("")]
    for name, value in (
        ("arena", f"{render.size(dram.arena_bytes)}, {populated} populated"),
        (
            "records",
            f"{render.count(dram.records)}, {render.ratio(dram.record_bytes, dram.resident_bytes)} of their slots",
        ),
        ("slabs", f"{render.size(dram.slab_bytes)} each, {render.count(dram.free_slabs)} free"),
        (
            "index",
            f"{render.size(dram.index_bytes)}, for {render.count(dram.max_records)} records"
            if dram.index_bytes
            else "none, clients do not map",
        ),
    ):
        lines.append(line((f"{name:<10}", "$faint"), value))
    lines += [Content(""), ends(line(("Slots", "bold")), Content(""), width), *slot_lines(frame, width)]
    return lines


TIERS: Final = Panel(
    "tiers", "Tiers", _draw, least=2, wanted=_wanted, details=_details, sorts=tuple(SLOTS.sortable), order=SLOTS.order
)
