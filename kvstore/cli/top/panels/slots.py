"""Slots: the sizes that DRAM is cut into, and how full each is."""

from __future__ import annotations

from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import slim
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.table import Column, Table
from kvstore.protocol.statistics import SlotClassStats

__all__ = ["SLOTS", "slot_lines"]

_BAR_CELLS: Final = 16


def _use(one: SlotClassStats) -> float:
    slots = one.used_slots + one.free_slots
    return one.used_slots / slots if slots else 0.0


SLOTS: Final[Table[SlotClassStats]] = Table(
    [
        Column("slot", lambda one: render.size(one.slot_bytes), lambda one: one.slot_bytes, ascending=True),
        Column("slabs", lambda one: render.count(one.slabs), lambda one: one.slabs, rank=1),
        Column("used", lambda one: render.count(one.used_slots), lambda one: one.used_slots),
        Column("free", lambda one: render.count(one.free_slots), lambda one: one.free_slots),
        Column("", lambda one: slim(_use(one), _BAR_CELLS, "$dram"), rank=2),
        Column("in use", lambda one: render.ratio(one.used_slots, one.used_slots + one.free_slots), _use),
    ],
    Order("slot"),
)
"""The table of slot sizes."""


def slot_lines(frame: Frame, width: int) -> list[Content]:
    """The table, its heading first."""
    return SLOTS.lines(frame.stats.dram.classes, width, frame.orders.get("tiers"))
