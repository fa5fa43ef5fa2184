"""The SSD tier's benchmark for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.bench.report import Row, facts_of, outcome, us
from kvstore.cli.bench.ssd import UNDISTURBED, SsdReport

__all__ = ["ssd_table"]

_GET: Final = "get_into "
_ALL: Final = "sustained "
_BESIDE: Final = {"fio randwrite": "fio", "fio randread": "fio", UNDISTURBED: "alone"}

_GB: Final = "10^9 bytes a second as an engine holds them: with a codec, of the KV before it"
_DEMOTION: Final = "blocks put without end; counted when their group's fdatasync is done, from commit to commit"
_PROMOTION: Final = (
    "chains that are on the SSD only, prefetched by two clients; records checked; the bytes compared after"
)
_GETS: Final = "get_into of leased blocks of 1 MiB by another process, beside itself alone: the median of single reads"
_SUSTAINED: Final = (
    "the bytes a second of all these reads together, which also lose what other processes take of the cores"
)


def ssd_table(report: SsdReport) -> RenderableType:
    """One line for each operation, in 80 columns."""
    beside, aim = render.text_column("beside"), render.text_column("aim")
    made = render.table("SSD tier", ["operation", "GB/s", beside, "ratio", "of rounds", aim])
    for row in report.rows:
        ratio, reached = outcome(row)
        ratios = row.ratios or [row.ratio or 0.0]
        made.add_row(
            f"{row.codec}, {row.op}" if row.codec else _operation(row.op),
            _rate(row.gb_per_s),
            f"{_BESIDE.get(row.baseline or '', row.baseline)} {_rate(row.baseline_gb_per_s)}",
            ratio,
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            Text(reached, style="" if row.within_limit else "red"),
        )
    return Group(made, "", facts_of(report, [*_meanings(report.rows), *_facts(report)]))


def _operation(op: str) -> str:
    """Reads of DRAM by what goes on meanwhile."""
    during = op.removeprefix(_GET)
    return f"{during.removeprefix(_ALL)}, all" if during.startswith(_ALL) else during


def _meanings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    rounds = max((row.samples or 0 for row in rows), default=0)
    return [
        ("GB/s", _GB),
        ("rounds", f"{rounds}, each with a baseline of its own: the ratio is the median of theirs"),
        ("demotion", _DEMOTION),
        ("promotion", _PROMOTION),
        ("during", _GETS),
        ("all", _SUSTAINED),
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
