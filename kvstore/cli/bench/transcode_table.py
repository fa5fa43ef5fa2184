"""The benchmark of transcoding for people."""

from __future__ import annotations

from rich.console import Group, RenderableType

from kvstore.cli import render
from kvstore.cli.bench.local_reads import MEMMOVE
from kvstore.cli.bench.report import Report, facts_of

__all__ = ["transcode_table"]

_MEANINGS = [
    ("stored", "bytes on the lower tier / bytes in memory, in whole pages"),
    ("GB/s", "10^9 bytes of records in memory a second, by one thread"),
    ("typed, opaque", "records whose dtype is that of the KV, or bytes of which the store knows nothing"),
]


def transcode_table(report: Report) -> RenderableType:
    """One line for each pair, form of records and direction."""
    made = render.table(
        "Transcoding",
        ["pair", render.text_column("records"), render.text_column("op"), "stored", "GB/s", MEMMOVE, "ratio"],
        key_columns=3,
    )
    for row in report.rows:
        copied = (row.gb_per_s or 0) / row.ratio if row.ratio else 0
        made.add_row(
            row.codec or "",
            row.memory or "",
            row.op,
            f"{row.stored_ratio or 0:.3f}",
            f"{row.gb_per_s or 0:.2f}",
            f"{copied:.1f} GB/s",
            f"{row.ratio or 0:.3f}",
        )
    return Group(made, "", facts_of(report, _MEANINGS))
