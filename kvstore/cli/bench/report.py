"""What a benchmark reports: rows beside a baseline, as one JSON object or as a table."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType

from kvstore.cli import render
from kvstore.cli.bench.machine import MachineFacts

__all__ = ["Report", "Row", "facts_of", "outcome", "percentile", "table_of", "us", "verdict"]


class Row(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One measurement; fields that do not apply are absent from the JSON.

    Attributes:
        op: what was measured.
        codec: name of the codec that did it.
        size_bytes: payload of a block; with a codec, of the block as the engine holds it.
        batch: keys in a request, blocks in a call of a codec, or clients where clients are what is counted.
        cache: "cold" or "hot": whether the block can be in the processor's caches.
        memory: "contiguous" or "paged": where a codec reads or writes the engine's KV. "typed" or "opaque": what is
            known of the records that are transcoded.
        threads: that a codec uses.
        buffers: "one" or "rotating": what the client copies into or out of.
        depth: requests under way at once, where that is more than one.
        samples: exchanges measured on each side.
        median_us: median time of an exchange with the daemon, or of a call.
        p99_us: 99th percentile of the same.
        ops_per_s: exchanges a second with the daemon.
        gb_per_s: 10**9 payload bytes a second.
        baseline: what this row is compared with, where a report has several.
        baseline_median_us: the baseline's median.
        baseline_ops_per_s: the baseline's exchanges a second.
        baseline_gb_per_s: the baseline's bytes a second.
        ratio: the baseline's time / the time measured; 1.0 is as fast as the baseline.
        ratios: that of each round, where ``ratio`` is their median.
        scale: the time of one thread / the time measured.
        stored_ratio: bytes on the lower tier / bytes in memory, of records that are transcoded.
        limit: what is aimed at: the least ``ratio``, or the most ``core_share``.
        hoped: a ``ratio`` that would be better still; nothing is missed below it.
        seconds: length of the measurement, where it was chosen.
        core_share: CPU time of all processes together / seconds; 1.0 is one busy core.
        daemon_cpu_us: the daemon's CPU time for each block.
        others_share: cores that processes which are not measured used meanwhile.
        note: why there is nothing else.
    """

    op: str
    codec: str | None = None
    size_bytes: int | None = None
    batch: int
    cache: str | None = None
    memory: str | None = None
    threads: int | None = None
    buffers: str | None = None
    depth: int | None = None
    samples: int | None = None
    median_us: float | None = None
    p99_us: float | None = None
    ops_per_s: float | None = None
    gb_per_s: float | None = None
    baseline: str | None = None
    baseline_median_us: float | None = None
    baseline_ops_per_s: float | None = None
    baseline_gb_per_s: float | None = None
    ratio: float | None = None
    ratios: list[float] | None = None
    scale: float | None = None
    stored_ratio: float | None = None
    limit: float | None = None
    hoped: float | None = None
    seconds: float | None = None
    core_share: float | None = None
    daemon_cpu_us: float | None = None
    others_share: float | None = None
    note: str | None = None

    @property
    def within_limit(self) -> bool:
        """Whether what is aimed at was reached."""
        if self.limit is None:
            return True
        if self.core_share is not None:
            return self.core_share <= self.limit
        return self.ratio is not None and self.ratio >= self.limit


class Report(msgspec.Struct, kw_only=True):
    """All rows of one run on one machine."""

    machine: MachineFacts
    baseline: str
    rows: list[Row]


def percentile(sorted_values: Sequence[int | float], fraction: float) -> float:
    """The value that ``fraction`` of the sorted values do not exceed (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    if not sorted_values:
        raise ValueError("no values, no percentile")
    return float(sorted_values[min(len(sorted_values) - 1, int(fraction * len(sorted_values)))])


def table_of(report: Report, title: str) -> RenderableType:
    """A report for people."""
    made = render.table(title, ["request", "daemon", "p99", "echo", "ratio", render.text_column("aim")])
    for row in report.rows:
        if row.core_share is not None:
            continue
        latency_row = row.median_us is not None
        keys = f" {row.batch:,} key{'s' if row.batch > 1 else ''}" if row.batch else ""
        made.add_row(
            row.op + keys + (f", {row.depth} at once" if row.depth else ""),
            us(row.median_us) if latency_row else _per_second(row.ops_per_s),
            us(row.p99_us),
            us(row.baseline_median_us) if latency_row else _per_second(row.baseline_ops_per_s),
            *outcome(row),
        )
    return Group(made, "", facts_of(report))


def verdict(row: Row) -> tuple[str, str, str]:
    """A row's ratio, what is aimed at, and whether that was reached."""
    return (
        render.NOTHING if row.ratio is None else f"{row.ratio:.2f}",
        render.NOTHING if row.limit is None else f">= {row.limit:.2f}",
        "met" if row.within_limit else "MISSED",
    )


def outcome(row: Row) -> tuple[str, str]:
    """A row's ratio, and what is aimed at with whether that was reached, in one cell."""
    ratio, _, reached = verdict(row)
    return ratio, "" if row.limit is None else f"{row.limit:.2f} {reached}"


def facts_of(report: Report, more: Sequence[tuple[str, str]] = ()) -> RenderableType:
    """What stands below a table: baseline, what idling costs, the machine."""
    machine = report.machine
    load = " ".join(f"{value:.2f}" for value in machine.load_average)
    software = f"Python {machine.python}, pyzmq {machine.pyzmq}, libzmq {machine.libzmq}, uvloop {machine.uvloop}"
    if machine.numba:
        software += f", numba {machine.numba}"
    notes = [
        ("baseline", report.baseline),
        ("ratio", "the baseline's time / the time measured; 1.00 is as fast as the baseline"),
        *more,
        *(
            (
                row.op,
                f"{render.percent(row.core_share)} of a core, {row.batch} clients and the daemon over "
                f"{render.duration(row.seconds or 0)} (aim: <= {render.percent(row.limit or 0)}, "
                f"{'met' if row.within_limit else 'MISSED'})",
            )
            for row in report.rows
            if row.core_share is not None
        ),
        *((row.op, row.note) for row in report.rows if row.note is not None),
        ("machine", f"{machine.cpu}, {machine.cores} cores, {render.size(machine.memory_bytes)}, {machine.kernel}"),
        ("software", software),
        ("load average", load),
    ]
    return render.facts("", notes)


def us(value_us: float | None) -> str:
    """A time in microseconds, for people."""
    return render.NOTHING if value_us is None else render.latency(value_us / 1e6)


def _per_second(value: float | None) -> str:
    return render.NOTHING if value is None else f"{value:,.0f}/s"
