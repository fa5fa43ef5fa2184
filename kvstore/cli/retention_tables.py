"""What ``kvstore stats`` shows of retention, leases and quotas; nothing where nobody uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvstore.cli import render
from kvstore.protocol.statistics import RetentionStats, TenantStats

__all__ = ["quota_table", "retention_facts"]

_MOST_ROWS: Final = 16
_BAR_CELLS: Final = 8


def retention_facts(retention: RetentionStats | None) -> Table | None:
    """What is retained and leased, and what became of it; None where nothing ever was."""
    if retention is None:
        return None
    facts: list[tuple[str, str]] = []
    if retention.retained_blocks or retention.over_budget_blocks or retention.gave_way_blocks:
        share = render.ratio(retention.retained_bytes, retention.budget_bytes)
        held = f"{render.blocks(retention.retained_blocks)}, {render.size(retention.retained_bytes)}"
        facts.append(("retained", f"{held} of {render.size(retention.budget_bytes)} ({share})"))
    if retention.leased_bytes or retention.leases_cut or retention.leases_refused:
        share = render.ratio(retention.leased_bytes, retention.lease_limit_bytes)
        leased = f"{render.size(retention.leased_bytes)} of {render.size(retention.lease_limit_bytes)} ({share})"
        facts.append(("leased", leased))
    for name, numbers in (
        ("others", {"of low priority": retention.low_blocks, "not in DRAM now": retention.waiting_blocks}),
        ("lost", {"over the budget": retention.over_budget_blocks, "for room": retention.gave_way_blocks}),
        ("expired", {"normal again": retention.ended_blocks, "dropped": retention.dropped_blocks}),
        ("leases", {"cut short": retention.leases_cut, "refused": retention.leases_refused}),
    ):
        told = ", ".join(f"{render.count(number)} {what}" for what, number in numbers.items() if number)
        if told:
            facts.append((name, told))
    return render.facts("Retention", facts) if facts else None


def quota_table(tenants: Sequence[TenantStats]) -> RenderableType | None:
    """What tenants have and may have, those nearest to their limits first."""
    if not tenants:
        return None
    rows: list[tuple[float, str, str, int, int, str, str]] = []
    for tenant in tenants:
        refused = render.count(tenant.refused_puts)
        for tier, used, limit, evicted in (
            ("dram", tenant.used_bytes, tenant.limit_bytes, tenant.evicted_blocks),
            ("ssd", tenant.ssd_used_bytes, tenant.ssd_limit_bytes, tenant.ssd_evicted_blocks),
        ):
            if limit:
                counts = (render.count(evicted), refused if tier == "dram" else "")
                rows.append((used / limit, tenant.name, tier, used, limit, *counts))
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    made = render.table(
        "Quotas",
        ["tenant", "tier", "used", "quota", render.text_column(""), "full", "evicted", "refused"],
        key_columns=2,
    )
    for full, name, tier, used, limit, evicted_blocks, refused_puts in rows[:_MOST_ROWS]:
        made.add_row(
            render.plain(name),
            tier,
            render.size(used),
            render.size(limit),
            render.Bar(full, _BAR_CELLS),
            render.ratio(used, limit),
            evicted_blocks,
            refused_puts,
        )
    if len(rows) <= _MOST_ROWS:
        return made
    return Group(made, Text(f"... {render.count(len(rows) - _MOST_ROWS)} more, --json has them all", style="dim"))
