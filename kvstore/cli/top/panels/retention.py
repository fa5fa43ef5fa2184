"""Retention: what may not leave as the policy would have it, and the quotas of tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import slim
from kvstore.cli.top.frame import Frame, Order
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.table import Column, Table, matching
from kvstore.cli.top.text import line, plain
from kvstore.protocol.statistics import RetentionStats, TenantStats

__all__ = ["RETENTION"]

_NAME_CELLS: Final = 10
_BAR_CELLS: Final = 12
_TENANT_BAR_CELLS: Final = 8
_FULL: Final = 0.9
"""Share of a limit from which it is about to tell."""


def _share(used: int, limit: int) -> float:
    return used / limit if limit else 0.0


def _style(used: int, limit: int) -> str:
    return "$warn" if _share(used, limit) >= _FULL else "$dram"


def _use(name: str, used: int, limit: int, width: int) -> Content:
    figures = f" {render.size(used)} of {render.size(limit)}"
    cells = min(max(width - _NAME_CELLS - len(figures), 4), 2 * _BAR_CELLS)
    return (
        line((f"{name:<{_NAME_CELLS}}", "$faint"))
        + slim(_share(used, limit), cells, _style(used, limit))
        + line(figures)
    )


def _limit(used: int, limit: int) -> Content:
    if not limit:
        return line(render.size(used), (", no limit", "$faint"))
    return line(render.size(used), (f" of {render.size(limit)}", "$faint"))


_TENANTS: Final[Table[TenantStats]] = Table(
    [
        Column("tenant", lambda one: plain(one.name), lambda one: one.name, left=True, ascending=True, style="bold"),
        Column("DRAM", lambda one: _limit(one.used_bytes, one.limit_bytes), lambda one: one.used_bytes, rank=1),
        Column(
            "",
            lambda one: slim(
                _share(one.used_bytes, one.limit_bytes), _TENANT_BAR_CELLS, _style(one.used_bytes, one.limit_bytes)
            ),
            rank=3,
        ),
        Column(
            "full",
            lambda one: render.ratio(one.used_bytes, one.limit_bytes),
            lambda one: _share(one.used_bytes, one.limit_bytes),
        ),
        Column(
            "SSD", lambda one: _limit(one.ssd_used_bytes, one.ssd_limit_bytes), lambda one: one.ssd_used_bytes, rank=4
        ),
        Column("evicted", lambda one: render.count(one.evicted_blocks), lambda one: one.evicted_blocks, rank=2),
        Column("refused", lambda one: render.count(one.refused_puts), lambda one: one.refused_puts, rank=5),
    ],
    Order("full"),
)


def _budgets(stats: RetentionStats, width: int) -> list[Content]:
    return [
        _use("retained", stats.retained_bytes, stats.budget_bytes, width),
        _use("leased", stats.leased_bytes, stats.lease_limit_bytes, width),
    ]


def _counts(stats: RetentionStats) -> list[Content]:
    lines = []
    for name, numbers, style in (
        (
            "blocks",
            {
                "retained": stats.retained_blocks,
                "low priority": stats.low_blocks,
                "to come back": stats.waiting_blocks,
            },
            "",
        ),
        (
            "ended",
            {
                "normal again": stats.ended_blocks,
                "dropped": stats.dropped_blocks,
                "over budget": stats.over_budget_blocks,
                "gave way": stats.gave_way_blocks,
            },
            "",
        ),
        ("leases", {"cut": stats.leases_cut, "refused": stats.leases_refused}, "$warn"),
    ):
        told = ", ".join(f"{render.count(number)} {what}" for what, number in numbers.items() if number)
        if told:
            lines.append(line((f"{name:<{_NAME_CELLS}}", "$faint"), (told, style)))
    return lines


def _quotas(frame: Frame, width: int) -> list[Content]:
    tenants = frame.stats.tenants
    found = [one for one in tenants if matching(frame.needle, one.name)]
    if not found:
        return [Content.styled(f"None of {len(tenants)} tenants matches the filter.", "$faint")]
    return _TENANTS.lines(found, width, frame.orders.get("retention"))


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    stats, tenants = frame.stats.retention, frame.stats.tenants
    parts = [] if stats is None else [_budgets(stats, width)]
    if tenants:
        parts.append(_quotas(frame, width))
    if stats is not None and (counts := _counts(stats)):
        parts.append(counts)
    # Apart from each other where there is room.
    apart = sum(map(len, parts)) + len(parts) - 1 <= rows
    lines: list[Content] = []
    for part in parts:
        lines += [Content(""), *part] if lines and apart else part
    return lines


def _wanted(frame: Frame) -> int:
    facts = 5 if frame.stats.retention is not None else 0
    return facts + (len(frame.stats.tenants) + 3 if frame.stats.tenants else 0)


RETENTION: Final = Panel(
    "retention",
    "Retention",
    _draw,
    least=3,
    wanted=_wanted,
    there=lambda frame: frame.stats.retention is not None or bool(frame.stats.tenants),
    sorts=tuple(_TENANTS.sortable),
    order=_TENANTS.order,
)
