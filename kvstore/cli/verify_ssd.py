"""``kvstore verify --ssd DIR``: the files of an SSD tier that no daemon uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.server.ssd_offline import SsdReport

__all__ = ["ssd_tables", "verify_files"]


def verify_files(directory: Path, *, repair: bool, as_json: bool) -> None:
    """Verify the directory and print what was found; status 1 where something is wrong, repaired or not."""
    import msgspec

    from kvstore.cli import render
    from kvstore.server.ssd_offline import verify_directory

    report = verify_directory(directory, repair=repair)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(ssd_tables(report, repair=repair))
    if report.problems:
        raise typer.Exit(1)


def ssd_tables(report: SsdReport, *, repair: bool) -> RenderableType:
    """What was checked, what is remarkable, and the problems."""
    from kvstore.cli import render
    from kvstore.cli.verify import with_list

    checkpoint = render.size(report.checkpoint_bytes) if report.checkpoint_bytes else "none"
    logs = f"{render.count(report.logs)} ({render.size(report.log_bytes)})"
    rows = [
        ("directory", report.directory),
        ("files", render.size(report.file_bytes)),
        ("slabs", f"{render.count(report.slabs)} of {render.size(report.slab_bytes)}"),
        ("free in them", render.size(report.free_bytes)),
        ("checkpoint", f"{checkpoint}, logs behind it: {logs}"),
        ("blocks", f"{render.count(report.blocks)} of {render.count(report.namespaces)} namespaces"),
        ("records read", render.count(report.records)),
        ("bytes", render.size(report.bytes)),
        ("time", f"{render.duration(report.seconds)} ({render.throughput(report.bytes, report.seconds)})"),
        ("problems", render.count(len(report.problems)) if report.problems else "none"),
    ]
    if report.dropped:
        rows.append(("records lost", f"{render.count(report.dropped)}{_fate(repair)}"))
    found = with_list(render.facts("Verified", rows), "Notes", report.notes)
    return with_list(found, "Problems, repaired" if report.repaired else "Problems", report.problems)


def _fate(repair: bool) -> str:
    return ", dropped" if repair else "; --repair drops them, and so does a daemon when it reads them"
