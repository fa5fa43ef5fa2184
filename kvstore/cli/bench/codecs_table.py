"""The codecs' benchmark for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.bench.codecs_memory import PAGED
from kvstore.cli.bench.codecs_store import CODEC_ALONE
from kvstore.cli.bench.local_reads import MEMMOVE
from kvstore.cli.bench.report import Report, Row, facts_of, us, verdict

__all__ = ["codecs_table"]

_GB: Final = "10^9 bytes of unquantised KV a second, by one thread"
_PAGED: Final = (
    "KV read from or written to an engine's pages of 16 tokens in random order, else one tensor of all blocks"
)


def codecs_table(report: Report) -> RenderableType:
    """One line for each operation, with a ratio for each number of threads."""
    rows = [row for row in report.rows if row.baseline == MEMMOVE]
    through_store = [row for row in report.rows if row.baseline == CODEC_ALONE]
    threads = sorted({row.threads or 1 for row in rows})
    columns: list[str | render.Column] = ["codec", render.text_column("op"), "GB/s"]
    for number in threads:
        columns += ["ratio", "aim"] if number == 1 else [f"{number} threads", "aim", "scale"]
    made = render.table("Codecs on the CPU", [*columns, render.text_column("")], key_columns=2)
    lines: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault((row.codec or "", row.op, row.memory or ""), {})[row.threads or 1] = row
    shown = ""
    for (codec, operation, memory), by_threads in lines.items():
        operation = f" {PAGED}" if memory == PAGED else operation
        made.add_row("" if codec == shown else codec, operation, *_cells(by_threads, threads))
        shown = codec
    parts: list[RenderableType] = [made, ""]
    if through_store:
        parts += [_store_table(through_store), ""]
    return Group(*parts, facts_of(report, [*_meanings(rows), *_copies(report.rows)]))


def _store_table(rows: Sequence[Row]) -> RenderableType:
    made = render.table(
        "Through the store", ["", "blocks", "time", CODEC_ALONE, "ratio", "aim", render.text_column("")]
    )
    for row in rows:
        ratio, limit, outcome = verdict(row)
        made.add_row(
            f"{row.codec}, {row.op}",
            render.count(row.batch),
            us(row.median_us),
            us(row.baseline_median_us),
            ratio,
            "" if row.limit is None else limit,
            "" if row.limit is None else Text(outcome, style="" if row.within_limit else "red"),
        )
    return made


def _cells(by_threads: dict[int, Row], threads: Sequence[int]) -> list[str | Text]:
    first = by_threads.get(1)
    cells: list[str | Text] = [render.NOTHING if first is None else _short(first.gb_per_s or 0)]
    aimed = missed = False
    for number in threads:
        row = by_threads.get(number)
        if row is None:
            cells += [render.NOTHING] * (2 if number == 1 else 3)
            continue
        aimed |= row.limit is not None
        missed |= not row.within_limit
        cells += [
            Text(f"{row.ratio or 0:.2f}", style="" if row.within_limit else "red"),
            Text("" if row.limit is None else f"{row.limit:.2f}", style="dim"),
        ]
        if number != 1:
            cells.append(render.NOTHING if row.scale is None else f"{row.scale:.2f}")
    return [*cells, Text("MISSED", style="red") if missed else "met" if aimed else ""]


def _copies(rows: Sequence[Row]) -> list[tuple[str, str]]:
    copies = [row for row in rows if row.op == MEMMOVE]
    rates = (f"{row.gb_per_s or 0:.1f} GB/s in calls of {render.size(row.size_bytes or 0)}" for row in copies)
    facts = [(MEMMOVE, ", ".join(rates))] if copies else []
    shares = [row.others_share for row in rows if row.others_share is not None]
    if shares:
        used = f"used {min(shares):.1f} to {max(shares):.1f} cores meanwhile; each thread needs one for itself"
        facts.append(("others", used))
    return facts


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _meanings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    sizes = {row.size_bytes for row in rows if row.size_bytes}
    calls = {row.batch for row in rows if row.size_bytes}
    meanings = [("GB/s", _GB), ("paged", _PAGED), ("scale", "one thread's time / the time of so many threads")]
    meanings.append((CODEC_ALONE, "encoding and decoding the same pages without the store, by one thread"))
    if sizes and calls:
        meanings.append(("call", f"{max(calls)} blocks of {render.size(max(sizes))}, cold"))
    return meanings
