"""Namespaces: whose blocks fill DRAM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import slim
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.table import Column, Table, matching
from kvstore.cli.top.text import plain
from kvstore.protocol.statistics import NamespaceStats

__all__ = ["NAMESPACES"]

_BAR_CELLS: Final = 8


class _Namespace(NamedTuple):
    stats: NamespaceStats
    label: str
    share: float


_TABLE: Final[Table[_Namespace]] = Table(
    [
        Column("namespace", lambda one: one.label, lambda one: one.label, left=True, ascending=True, style="bold"),
        Column("blocks", lambda one: render.count(one.stats.blocks), lambda one: one.stats.blocks, rank=3),
        Column("bytes", lambda one: render.size(one.stats.slot_bytes), lambda one: one.stats.slot_bytes),
        Column("", lambda one: slim(one.share, _BAR_CELLS, "$dram"), rank=2),
        Column("share", lambda one: render.percent(one.share), lambda one: one.share),
        Column(
            "codec",
            lambda one: plain(one.stats.codec),
            lambda one: one.stats.codec,
            rank=4,
            left=True,
            ascending=True,
            style="$faint",
        ),
        Column("generation", lambda one: str(one.stats.generation), lambda one: one.stats.generation, rank=5),
    ],
    Order("bytes"),
)


def _rows(frame: Frame) -> list[_Namespace]:
    namespaces = frame.stats.namespaces
    labels = Counter(one.label for one in namespaces)
    resident = sum(one.slot_bytes for one in namespaces)
    rows = []
    for one in namespaces:
        # What differs in something else, such as the revision or a tenant's salt, is told apart by its digest.
        label = plain(one.label if labels[one.label] == 1 else f"{one.label} {one.digest}")
        if matching(frame.needle, label, one.model, one.codec):
            rows.append(_Namespace(one, label, one.slot_bytes / resident if resident else 0.0))
    return rows


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    if not frame.stats.namespaces:
        return [Content.styled("No namespace holds a block.", "$faint")]
    found = _rows(frame)
    if not found:
        return [Content.styled(f"None of {len(frame.stats.namespaces)} namespaces matches the filter.", "$faint")]
    return _TABLE.lines(found, width, frame.orders.get("namespaces"))


NAMESPACES: Final = Panel(
    "namespaces",
    "Namespaces",
    _draw,
    least=4,
    wanted=lambda frame: len(frame.stats.namespaces) + 1,
    pinned=1,
    sorts=tuple(_TABLE.sortable),
    order=_TABLE.order,
    note=lambda frame: f"{render.count(len(frame.stats.namespaces))} in all",
)
