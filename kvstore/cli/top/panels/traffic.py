"""Traffic: bytes read and written, lookups, puts by answer, and what leaves, each with its last minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import columns, nice_bucket_s
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.rates import Rates
from kvstore.cli.top.text import cut, line, per_s, spread, throughput

__all__ = ["TRAFFIC"]

_NAME_CELLS: Final = 9
_VALUE_CELLS: Final = 11
_LEAST_CHART_CELLS: Final = 8
_LEAST_SPAN_S: Final = 60.0
_ANSWERS: Final = (("stored", "$good"), ("exists", ""), ("throttled", "$warn"), ("rejected", "$bad"))


def _sum_per_s(rates: Rates | None, *names: str) -> str:
    if rates is None:
        return render.NOTHING
    return render.rate(sum(getattr(rates.added, name) for name in names), rates.seconds)


def _series(frame: Frame) -> Iterator[tuple[str, str, str, Callable[[Rates], float]]]:
    """Name, value now, style and what the chart shows, the most important first."""
    now = frame.now
    yield "read", throughput(now, "bytes_out"), "$dram", lambda rates: rates.per_s("bytes_out")
    yield "written", throughput(now, "bytes_in"), "$put", lambda rates: rates.per_s("bytes_in")
    yield (
        "asked",
        _sum_per_s(now, "match_keys" if now and now.added.match_keys else "get_keys"),
        "$foreground",
        lambda rates: rates.asked / rates.seconds,
    )
    yield "evicted", per_s(now, "evicted_blocks"), "$miss", lambda rates: rates.per_s("evicted_blocks")
    if frame.stats.ssd is not None:
        yield "demoted", per_s(now, "demoted_blocks"), "$ssd", lambda rates: rates.per_s("demoted_blocks")
        yield "promoted", per_s(now, "promoted_blocks"), "$ssd", lambda rates: rates.per_s("promoted_blocks")
    yield "requests", per_s(now, "requests"), "$foreground", lambda rates: rates.per_s("requests")
    yield (
        "mapped",
        per_s(now, "mapped_reads"),
        "$foreground",
        lambda rates: rates.per_s("mapped_reads"),
    )


def _puts(frame: Frame, width: int) -> Content:
    """Answers to puts; those that are bad news only when there are any, or room."""
    now = frame.now
    parts = []
    first, *others = _ANSWERS
    if now is not None:
        others.sort(key=lambda answer: not getattr(now.added, answer[0]))
    for name, style in (first, *others):
        value = per_s(now, name)
        none = now is None or not getattr(now.added, name)
        parts.append(line((value.removesuffix(" /s"), "$faint" if none else f"{style} bold"), (f" {name}", "$faint")))
    name = f"{'puts /s':<{_NAME_CELLS}}"
    return line((name, "$faint")) + spread(parts, width - _NAME_CELLS, gap=2)


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    series = list(_series(frame))[: max(rows - 1, 1)]
    room = max(width - _NAME_CELLS - _VALUE_CELLS - 1, 1)
    bucket_s = nice_bucket_s(room, _LEAST_SPAN_S, frame.interval_s)
    history = frame.history.series(room, bucket_s) if frame.charts and room >= _LEAST_CHART_CELLS else []
    chart_rows = max((rows - 1) // len(series), 1) if history else 1
    lines: list[Content] = []
    for name, value, style, chosen in series:
        made = line((f"{name:<{_NAME_CELLS}}", "$faint"), (f"{cut(value, _VALUE_CELLS):>{_VALUE_CELLS}} ", "bold"))
        above = [Content(" " * made.cell_length)] * (chart_rows - 1)
        chart = columns(
            [None if rates is None else chosen(rates) for rates in history], chart_rows, style=style, gap=True
        )
        lines += [before + drawn for before, drawn in zip([*above, made], chart, strict=True)]
    lines.insert(min(3 * chart_rows, len(lines)), _puts(frame, width))
    return lines[:rows]


def _details(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    server, puts = frame.stats.server, frame.stats.puts
    lines = [*_draw(frame, width, 9), Content("")]
    for name, value in (
        ("stored", f"{render.count(puts.stored)}, {render.count(puts.replaced)} of them in place of a worse record"),
        ("refused", _refused(puts.reasons)),
        ("requests", f"{render.count(server.requests)}, {render.count(server.bad_requests)} malformed"),
        (
            "overload",
            f"{render.count(server.overloaded)} refused, {render.count(server.replies_dropped)} replies dropped",
        ),
        ("waiting", f"queue delay {render.latency(server.queue_delay_ms / 1000)}"),
        ("leaving", f"{render.size(server.outbound_bytes)} on their way to clients"),
    ):
        lines.append(line((f"{name:<{_NAME_CELLS}}", "$faint"), value))
    return lines


def _refused(reasons: dict[str, int]) -> str:
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    return (
        ", ".join(f"{render.count(number)} {reason.lower().replace('_', ' ')}" for reason, number in ranked) or "none"
    )


TRAFFIC: Final = Panel(
    "traffic", "Traffic", _draw, least=5, wanted=lambda frame: 2 * len(list(_series(frame))) + 1, details=_details
)
