"""The SSD tier's benchmark for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.bench.report import Row, facts_of, us, verdict
from kvstore.cli.bench.ssd import SsdReport

__all__ = ["ssd_table"]

_GB: Final = "10^9 bytes a second as an engine holds them: with a codec, of the KV before it"
_DEMOTION: Final = "blocks put without end; counted when their group's fdatasync is done, from commit to commit"
_PROMOTION: Final = (
    "chains that are on the SSD only, prefetched by two clients; records checked; the bytes compared after"
)
_GETS: Final = (
    "reads of 1 MiB of leased blocks by another process, beside those just before: the median of single reads"
)
_SUSTAINED: Final = "the bytes a second of all of them, which also lose what other processes take of the cores"


def ssd_table(report: SsdReport) -> RenderableType:
    """One line for each operation."""
    aim = render.text_column("aim")
    made = render.table(
        "SSD tier", ["operation", "GB/s", render.text_column("beside"), "GB/s", "ratio", "from", "to", aim]
    )
    for row in report.rows:
        ratio, limit, outcome = verdict(row)
        ratios = row.ratios or [row.ratio or 0.0]
        made.add_row(
            f"{row.codec}, {row.op}" if row.codec else row.op,
            _rate(row.gb_per_s),
            row.baseline or "",
            _rate(row.baseline_gb_per_s),
            ratio,
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            "" if row.limit is None else Text(f"{limit} {outcome}", style="" if row.within_limit else "red"),
        )
    return Group(made, "", facts_of(report, [*_meanings(report.rows), *_facts(report)]))


def _meanings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    rounds = max((row.samples or 0 for row in rows), default=0)
    return [
        ("GB/s", _GB),
        ("ratio", f"median of the ratios of {rounds} rounds, the least and the greatest of them; 1.00 is as fast"),
        ("demotion", _DEMOTION),
        ("promotion", _PROMOTION),
        ("get_into", _GETS),
        ("sustained", _SUSTAINED),
    ]


def _facts(report: SsdReport) -> list[tuple[str, str]]:
    disk = report.disk
    facts = [
        (
            "disk",
            f"{disk.filesystem} on {disk.device}, {render.size(disk.size_bytes)} a side, {disk.depth} requests at "
            f"once, {disk.fio}",
        )
    ]
    moved = [row for row in report.rows if row.daemon_cpu_us is not None]
    if moved:
        cpu = ", ".join(
            f"{us(row.daemon_cpu_us)} a block by {row.op}" + (f" of {row.codec}" if row.codec else "") for row in moved
        )
        others = ", ".join(f"{row.others_share or 0:.1f}" for row in moved)
        facts.append(("CPU time", f"of the daemon: {cpu}; cores that others used meanwhile: {others}"))
    return facts


def _rate(value: float | None) -> str:
    return render.NOTHING if value is None else f"{value:.2f}"
