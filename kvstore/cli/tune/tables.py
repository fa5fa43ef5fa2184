"""What ``kvstore tune`` prints for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.tune.report import Applied, TuneReport, TuneRow
from kvstore.cli.tune.runs import LRU
from kvstore.cli.tune.series import group_name, series_of, short_count
from kvstore.cli.tune.terminal_plot import Curve, Plot
from kvstore.simulator.clairvoyant import CLAIRVOYANT

__all__ = ["applied_facts", "tune_tables"]

_NONE: Final = "Nothing to recommend: none of these policies runs in a daemon."
_WORTH_A_PLOT: Final = 0.02
"""Hit rates that differ by less are a flat line."""


def applied_facts(applied: Applied) -> RenderableType:
    """What ``--apply`` did."""

    def change(before: str, after: str) -> str:
        return f"{before} -> {after}" if before != after else f"{after}, as it was"

    rows = [("eviction from DRAM", change(applied.policy_before, applied.policy))]
    if applied.ssd_policy:
        rows.append(("eviction from the SSD", change(applied.ssd_policy_before, applied.ssd_policy)))
    notes = Table.grid(padding=(0, 1))
    for note in applied.not_changed:
        notes.add_row("-", Text(note))
    return Group(render.facts("Applied to the running daemon", rows), notes)


def tune_tables(report: TuneReport) -> RenderableType:
    """All of it."""
    parts: list[RenderableType] = [_trace(report), ""]
    for (ssd_bytes, codec), group in groupby(report.rows, key=lambda row: (row.ssd_bytes, row.codec)):
        rows = list(group)
        title = f"Hit rate with {codec}" + (f", an SSD of {render.size(ssd_bytes)} below" if ssd_bytes else "")
        parts += [_hit_rates(title, rows, _policies(rows)), ""]
        timed = [name for name in _policies(rows) if name != CLAIRVOYANT]
        parts += [_times(f"Estimated time to the first token with {codec}", rows, timed), ""]
        if len(_by_capacity(rows)) > 1 and _spread(rows) >= _WORTH_A_PLOT:
            parts += [_plot(report, codec, ssd_bytes, rows), ""]
    parts += [_advice(report), "", _meanings(report)]
    if report.applied is not None:
        parts += ["", applied_facts(report.applied)]
    return Group(*parts)


def _trace(report: TuneReport) -> Table:
    trace = report.trace
    once = trace.asked_blocks and trace.distinct_blocks / trace.asked_blocks
    facts = [
        ("requests", f"{render.count(trace.requests)} in {render.duration(trace.seconds)} ({trace.format})"),
        ("prompt", f"{trace.input_tokens:,.0f} tokens on average, {trace.block_tokens} a block"),
        (
            "blocks asked for",
            f"{render.count(trace.asked_blocks)}, {render.count(trace.distinct_blocks)} of them for the first time "
            f"({render.percent(once)})",
        ),
        ("hit at best", f"{render.percent(trace.hit_rate)}, {render.percent(trace.hit_rate_second_half)} in 2nd half"),
        ("a block", f"{render.size(report.assumptions.block_bytes)} ({report.assumptions.block})"),
        *(("note", note) for note in trace.notes),
    ]
    return render.facts(f"Trace {trace.name}", facts)


def _policies(rows: Iterable[TuneRow]) -> list[str]:
    """LRU first and the bound last, whatever the order asked for."""
    names = list(dict.fromkeys(row.policy for row in rows))
    return sorted(names, key=lambda name: (name == CLAIRVOYANT) - (name == LRU))


def _hit_rates(title: str, rows: Sequence[TuneRow], policies: Sequence[str]) -> Table:
    table = render.table(title, [render.Column("DRAM"), "blocks", *policies], key_columns=2)
    for by_policy in _by_capacity(rows):
        best = max((row.hit_rate for row in by_policy.values() if row.policy != CLAIRVOYANT), default=0.0)
        cells = []
        for policy in policies:
            rate = by_policy[policy].hit_rate
            style = "dim" if policy == CLAIRVOYANT else "bold green" if rate == best else ""
            cells.append(Text(f"{rate * 100:.2f}", style=style))
        table.add_row(*_capacity(by_policy), *cells)
    return table


def _times(title: str, rows: Sequence[TuneRow], policies: Sequence[str]) -> Table:
    table = render.table(title, [render.Column("DRAM"), "blocks", *policies], key_columns=2)
    for by_policy in _by_capacity(rows):
        least = min(row.first_token_s for row in by_policy.values() if row.policy != CLAIRVOYANT)
        cells = [
            Text(render.latency(row.first_token_s), style="bold green" if row.first_token_s == least else "")
            for row in (by_policy[policy] for policy in policies)
        ]
        table.add_row(*_capacity(by_policy), *cells)
    return table


def _spread(rows: Sequence[TuneRow]) -> float:
    rates = [row.hit_rate for row in rows]
    return max(rates) - min(rates)


def _plot(report: TuneReport, codec: str, ssd_bytes: int, rows: Sequence[TuneRow]) -> Plot:
    # The bound is behind all others, and what was named first in front.
    drawn = [Curve(one.policy, one.style, one.points) for one in reversed(series_of(report, rows))]
    ticks = sorted({(float(row.capacity_bytes), short_count(row.capacity_blocks)) for row in rows})
    return Plot(
        f"Hit rate over DRAM, in blocks that fit: {group_name(codec, ssd_bytes)}",
        drawn,
        ticks,
    )


def _by_capacity(rows: Sequence[TuneRow]) -> list[dict[str, TuneRow]]:
    grouped: dict[int, dict[str, TuneRow]] = {}
    for row in rows:
        grouped.setdefault(row.capacity_bytes, {})[row.policy] = row
    return [grouped[size] for size in sorted(grouped)]


def _capacity(by_policy: dict[str, TuneRow]) -> tuple[str, str]:
    row = next(iter(by_policy.values()))
    return render.size(row.capacity_bytes), render.count(row.capacity_blocks)


def _advice(report: TuneReport) -> RenderableType:
    advice = report.recommendation
    if advice is None:
        return Text(_NONE, style="bold")
    below = f", an SSD of {render.size(advice.ssd_bytes)}" if advice.ssd_bytes else ""
    heading = Text.assemble(
        ("Recommended at " + render.size(advice.capacity_bytes) + ": ", "bold"),
        (f"{advice.policy}, {advice.codec}{below}", "bold green"),
        f" (hits {render.percent(advice.hit_rate)}, first token in about {render.latency(advice.first_token_s)})",
    )
    reasons = Table.grid(padding=(0, 1))
    for reason in advice.reasons:
        reasons.add_row("-", Text(reason))
    settings = Text("\n".join(f"  {line}" for line in advice.settings), style="cyan")
    return Group(heading, reasons, "", settings)


def _meanings(report: TuneReport) -> Table:
    assumed = report.assumptions
    rates = [f"DRAM {assumed.dram_gb_per_s:g} GB/s"]
    if any(row.ssd_bytes for row in report.rows):
        rates.append(f"SSD {assumed.ssd_gb_per_s:g} GB/s")
    rates += [f"{codec} decodes to {rate:.3g} GB/s" for codec, rate in assumed.decode_gb_per_s.items()]
    sampled = sorted({row.rate for row in report.rows if row.rate < 1})
    how = f"samples of {', '.join(f'{rate:.3g}' for rate in sampled)} of the blocks" if sampled else "every block"
    meanings = [
        ("hit rate", "percent of the blocks asked for, all requests, from an empty cache on"),
        ("first token", f"{assumed.prefill_tokens_per_s:,.0f} tokens/s of prefill, {', '.join(rates)}; no queue"),
        ("simulated", f"{how}, in {render.duration(report.seconds)}"),
    ]
    if any(row.policy == CLAIRVOYANT for row in report.rows):
        meanings.insert(1, (CLAIRVOYANT, "the bound: what a policy would hit that knew the future"))
    return render.facts("", meanings)
