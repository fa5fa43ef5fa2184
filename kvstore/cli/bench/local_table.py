"""The local benchmark's report for people."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType

from kvstore.cli import render
from kvstore.cli.bench.report import Report, Row, facts_of, us, verdict

__all__ = ["local_table"]

_BUFFERS: Final = "one: the same in each call, as for staging; rotating: in random order, as an engine's cache"
_CACHE: Final = "cold: a set larger than the caches, in random order; hot: one block again and again"
_PUTS: Final = "not waited for, into a full tier; without the checksum the time of put_checksum is taken off"


def local_table(report: Report) -> RenderableType:
    """All rows, and what their words mean."""
    columns = ["operation", "size", "keys", "cache", "buffers", "time", "p99", "GB/s", "beside", "its time"]
    columns += ["ratio", "aim", ""]
    texts = {"cache", "buffers", "beside", ""}
    made = render.table("Mapped path", [render.text_column(name) if name in texts else name for name in columns])
    for row in report.rows:
        if row.core_share is None and row.note is None:
            made.add_row(*_cells(row))
    meanings = [("buffers", _BUFFERS), ("cache", _CACHE), ("put", _PUTS)]
    sustained = [row for row in report.rows if row.daemon_cpu_us is not None]
    cpu = ", ".join(f"{us(row.daemon_cpu_us)} at {render.size(row.size_bytes or 0)}" for row in sustained)
    others = ", ".join(f"{row.others_share or 0:.1f}" for row in sustained)
    meanings.append(("put_sustained", f"until flush() returns; the daemon's CPU time a put: {cpu}"))
    meanings.append(
        ("", f"needs a core for the client and one for the daemon; cores that others used meanwhile: {others}")
    )
    return Group(made, "", facts_of(report, meanings))


def _cells(row: Row) -> list[str]:
    ratio, aim, outcome = verdict(row)
    if row.hoped is not None:
        aim += f" ({row.hoped:.1f})"
    return [
        row.op,
        render.NOTHING if row.size_bytes is None else render.size(row.size_bytes),
        render.count(row.batch),
        row.cache or "",
        row.buffers or "",
        us(row.median_us),
        us(row.p99_us),
        render.NOTHING if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
        row.baseline or "",
        us(row.baseline_median_us),
        ratio,
        aim,
        "" if row.limit is None else outcome,
    ]
