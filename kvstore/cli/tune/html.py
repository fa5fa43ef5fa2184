"""The report as one page of HTML: no script, nothing from elsewhere, light and dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

import kvstore
from kvstore.cli import render
from kvstore.cli.tune.report import TuneReport, TuneRow
from kvstore.cli.tune.series import Series, group_name, groups_of, series_of, short_count
from kvstore.cli.tune.svg import Chart, Line
from kvstore.errors import InvalidArgument

__all__ = ["check_html", "html_report", "write_html"]

_STYLE: Final = """
:root { color-scheme: light dark; --paper: #fbfcfd; --card: #ffffff; --ink: #1f2933; --soft: #66727e; --rule: #e3e8ec;
  --beyond: #eef1f4; --accent: #0b6e99; --good: #2f7d4f; --good-paper: #edf7f0; %(light)s }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --card: #1b2126; --ink: #e4e9ed; --soft: #97a3ae;
  --rule: #2c343b; --beyond: #20272d; --accent: #5bb8e0; --good: #7fc99b; --good-paper: #17281f; %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 40px 0 10px; }
.kicker { color: var(--accent); font-size: 12px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; }
.sub, .note { color: var(--soft); }
.note { font-size: 13px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 24px 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.facts div { background: var(--card); padding: 12px 16px; }
.facts b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 12.5px; }
.advice { background: var(--good-paper); border-left: 4px solid var(--good); border-radius: 0 10px 10px 0;
  padding: 18px 22px; }
.advice h2 { margin: 0 0 2px; font-size: 20px; color: var(--good); }
.advice ul { margin: 12px 0; padding-left: 20px; }
.advice li { margin: 5px 0; }
pre { margin: 0; padding: 12px 14px; overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
figure { margin: 0; padding: 16px 16px 8px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
figure + figure { margin-top: 14px; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; margin: 0 0 8px; }
figcaption b { margin-right: auto; }
.key { font-size: 13px; white-space: nowrap; }
.key i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; margin-right: 6px;
  vertical-align: middle; border-radius: 2px; }
.key i.dashed { border-top-style: dashed; border-top-width: 2px; }
svg { display: block; width: 100%%; height: auto; font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--ink); font-variant-numeric: tabular-nums; }
.faint { fill: var(--soft); font-size: 11px; }
.beyond { fill: var(--beyond); }
.ceiling { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dashed { stroke-dasharray: 6 4; stroke-width: 1.5; }
.mark { stroke: var(--card); stroke-width: 1.5; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; width: 100%%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
td.best { color: var(--good); font-weight: 600; }
td.bound { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 13.5px; }
dt { color: var(--soft); }
dd { margin: 0; }
footer { margin-top: 48px; padding-top: 14px; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: 12.5px; }
%(series)s
"""


def check_html(path: Path) -> None:
    """See that a report can be written before anything is simulated.

    Raises:
        InvalidArgument: the directory will not do.
    """
    if not path.parent.is_dir():
        raise InvalidArgument(f"--html: there is no directory {str(path.parent)!r}")


def write_html(report: TuneReport, path: Path) -> None:
    """Write the report.

    Raises:
        InvalidArgument: it cannot be written.
    """
    try:
        path.write_text(html_report(report), encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"--html: cannot write {path}: {error.strerror or error}") from None


def html_report(report: TuneReport) -> str:
    """The page."""
    groups = groups_of(report)
    series = {key: series_of(report, rows) for key, rows in groups.items()}
    name = Path(report.trace.name).name
    body = [
        '<p class="kicker">kvstore tune</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{render.count(report.trace.requests)} requests in {render.duration(report.trace.seconds)}, '
        f"{report.trace.input_tokens:,.0f} tokens of prompt on average, blocks of {report.trace.block_tokens} tokens "
        f"({render.size(report.assumptions.block_bytes)}, {escape(report.assumptions.block)})</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in report.trace.notes),
        _facts(report),
        _advice(report),
        "<h2>What is hit</h2>",
        *(_hit_rates(report, key, series[key]) for key in groups),
        "<h2>Time to the first token, estimated</h2>",
        *(_times(key, series[key]) for key in groups),
        "<h2>All figures</h2>",
        *(_table(key, rows, series[key]) for key, rows in groups.items()),
        "<h2>What this rests on</h2>",
        _assumptions(report),
        f"<footer>kvstore {escape(kvstore.__version__)}, {escape(report.machine.cpu)}, {report.machine.cores} cores, "
        f"{render.duration(report.seconds)}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: kvstore tune</title><style>{_style(series.values())}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _style(groups: Iterable[Sequence[Series]]) -> str:
    known = {one.policy: one for series in groups for one in series}
    light = " ".join(f"--{_css(policy)}: {one.colour};" for policy, one in known.items())
    dark = " ".join(f"--{_css(policy)}: {one.dark_colour};" for policy, one in known.items())
    rules = [
        f"path.{_css(policy)} {{ stroke: var(--{_css(policy)}); }} circle.{_css(policy)} "
        f"{{ fill: var(--{_css(policy)}); }} i.{_css(policy)} {{ border-color: var(--{_css(policy)}); }}"
        for policy in known
    ]
    return _STYLE % {"light": light, "dark": dark, "series": "\n".join(rules)}


def _css(policy: str) -> str:
    return "p-" + "".join(letter if letter.isalnum() else "-" for letter in policy)


def _facts(report: TuneReport) -> str:
    trace = report.trace
    once = trace.distinct_blocks / trace.asked_blocks
    cells = [
        (render.count(trace.asked_blocks), "blocks asked for"),
        (render.percent(once), "of them for the first time"),
        (render.percent(trace.hit_rate), "is the most any cache hits"),
        (render.percent(trace.hit_rate_second_half), "in the second half, warm"),
    ]
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in cells)
        + "</div>"
    )


def _advice(report: TuneReport) -> str:
    advice = report.recommendation
    if advice is None:
        return '<section class="advice"><p>None of these policies runs in a daemon.</p></section>'
    below = f", an SSD of {render.size(advice.ssd_bytes)}" if advice.ssd_bytes else ""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in advice.reasons)
    return (
        f'<section class="advice"><h2>{escape(advice.policy)}, {escape(advice.codec)}{below}</h2>'
        f'<p class="sub">recommended at {render.size(advice.capacity_bytes)} of DRAM: hits '
        f"{render.percent(advice.hit_rate)}, first token in about {render.latency(advice.first_token_s)}</p>"
        f"<ul>{reasons}</ul><pre>{escape(chr(10).join(advice.settings))}</pre></section>"
    )


def _hit_rates(report: TuneReport, key: tuple[str, int], series: Sequence[Series]) -> str:
    lines = [
        Line(
            _css(one.policy),
            one.points,
            [
                (
                    float(row.capacity_bytes),
                    100 * row.hit_rate,
                    f"{one.policy} at {render.size(row.capacity_bytes)} ({render.blocks(row.capacity_blocks)}): "
                    f"{100 * row.hit_rate:.2f} %, second half {100 * row.hit_rate_second_half:.2f} %",
                )
                for row in one.rows
            ],
            dashed=one.bound,
            shaded=one.bound,
        )
        for one in _behind_first(series)
    ]
    at_best = 100 * report.trace.hit_rate
    chart = Chart(
        f"Hit rate over DRAM, {group_name(*key)}",
        lines,
        _ticks(series),
        lambda value: f"{value:g} %",
        ceiling=(at_best, f"{at_best:.1f} %: no cache hits more"),
    )
    return _figure(f"Blocks hit over DRAM: {group_name(*key)}", chart, series)


def _times(key: tuple[str, int], series: Sequence[Series]) -> str:
    own = [one for one in series if not one.bound]
    lines = [
        Line(
            _css(one.policy),
            [(float(row.capacity_bytes), row.first_token_s) for row in one.rows],
            [
                (
                    float(row.capacity_bytes),
                    row.first_token_s,
                    f"{one.policy} at {render.size(row.capacity_bytes)}: {render.latency(row.first_token_s)}",
                )
                for row in one.rows
            ],
        )
        for one in _behind_first(own)
    ]
    chart = Chart(
        f"Estimated time to the first token over DRAM, {group_name(*key)}",
        lines,
        _ticks(own),
        lambda value: f"{value:g} s",
        height=260,
    )
    return _figure(f"Seconds over DRAM: {group_name(*key)}", chart, own)


def _behind_first(series: Sequence[Series]) -> list[Series]:
    return list(reversed(series))


def _ticks(series: Sequence[Series]) -> list[tuple[float, str, str]]:
    return [
        (float(row.capacity_bytes), render.size(row.capacity_bytes), f"{short_count(row.capacity_blocks)} blocks")
        for row in series[0].rows
    ]


def _figure(title: str, chart: Chart, series: Sequence[Series]) -> str:
    keys = "".join(
        f'<span class="key"><i class="{_css(one.policy)}{" dashed" if one.bound else ""}"></i>{escape(one.policy)}'
        f"{' (bound)' if one.bound else ''}</span>"
        for one in series
    )
    return f"<figure><figcaption><b>{escape(title)}</b>{keys}</figcaption>{chart.svg()}</figure>"


def _table(key: tuple[str, int], rows: Sequence[TuneRow], series: Sequence[Series]) -> str:
    by_capacity: dict[int, dict[str, TuneRow]] = {}
    for row in rows:
        by_capacity.setdefault(row.capacity_bytes, {})[row.policy] = row
    head = "".join(f"<th>{escape(one.policy)}</th>" for one in series)
    body = []
    for size in sorted(by_capacity):
        found = by_capacity[size]
        best = max((row.hit_rate for row in found.values() if row.policy in _own(series)), default=0.0)
        cells = []
        for one in series:
            row = found[one.policy]
            css = "bound" if one.bound else "best" if row.hit_rate == best else ""
            cells.append(
                f'<td class="{css}" title="second half {100 * row.hit_rate_second_half:.2f} %, first token '
                f'{render.latency(row.first_token_s)}">{100 * row.hit_rate:.2f}</td>'
            )
        blocks = next(iter(found.values())).capacity_blocks
        body.append(f"<tr><td>{render.size(size)}</td><td>{render.count(blocks)}</td>{''.join(cells)}</tr>")
    return (
        f'<p class="note">Percent of blocks hit: {escape(group_name(*key))}</p><div class="scroll"><table><thead><tr>'
        f"<th>DRAM</th><th>blocks</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _own(series: Sequence[Series]) -> set[str]:
    return {one.policy for one in series if not one.bound}


def _assumptions(report: TuneReport) -> str:
    assumed = report.assumptions
    slots = ", ".join(f"{codec} {render.size(size)}" for codec, size in assumed.slot_bytes.items())
    sampled = sorted({row.rate for row in report.rows if row.rate < 1})
    decoding = ", ".join(f"{codec} {rate:g} GB/s" for codec, rate in assumed.decode_gb_per_s.items()) or "free"
    facts = [
        ("a block", f"{render.size(assumed.block_bytes)} unquantised ({assumed.block}); in a slot: {slots}"),
        ("prefill", f"{assumed.prefill_tokens_per_s:,.0f} tokens a second"),
        (
            "loads",
            f"DRAM {assumed.dram_gb_per_s:g} GB/s, SSD {assumed.ssd_gb_per_s:g} GB/s; nothing queues or hides",
        ),
        ("decoding", decoding),
        (
            "simulation",
            f"samples of {', '.join(f'{rate:.3g}' for rate in sampled)} of the blocks, off by some tenths of a point, "
            "at worst by one"
            if sampled
            else "every block",
        ),
        ("hit rate", "usable prefix: a block counts where all before it were there, too; from an empty cache on"),
    ]
    return "<dl>" + "".join(f"<dt>{escape(what)}</dt><dd>{escape(says)}</dd>" for what, says in facts) + "</dl>"
