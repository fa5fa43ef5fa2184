"""Hit rate: now, over ten seconds and a minute, and as a chart over minutes, by tier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import nice_bucket_s, stacked
from kvstore.cli.top.frame import MINUTE_S, TEN_S, Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.rates import Rates
from kvstore.cli.top.text import ends, hit_rate, line, spread

__all__ = ["HITS"]

_SCALE_CELLS: Final = 6
_LEAST_SPAN_S: Final = 120.0
_DETAIL_ROWS: Final = 4
_WIDE_CELLS: Final = 40


def _now(frame: Frame) -> Content:
    now = frame.now
    asked = now is not None and now.asked
    return line(
        (hit_rate(now.hit_rate if now else None), "$foreground bold" if asked else "$faint"),
        (" now", "$faint"),
    )


def _figures(frame: Frame, width: int) -> Content:
    parts = [_now(frame)]
    for name, window_s, rates in (("10 s", TEN_S, frame.ten), ("1 min", MINUTE_S, frame.minute)):
        # With a long interval one look may be more than the window.
        over = name if rates is None or rates.seconds < 1.5 * window_s else render.duration(round(rates.seconds))
        parts.append(line(hit_rate(rates.hit_rate if rates else None), (f" {over}", "$faint")))
    lookups = frame.stats.lookups
    asked, hits = (
        (lookups.match_keys, lookups.match_hits) if lookups.match_keys else (lookups.get_keys, lookups.get_hits)
    )
    parts.append(line((render.ratio(hits, asked), ""), (" since start", "$faint")))
    return spread(parts, width, gap=3 if width >= _WIDE_CELLS else 2)


def _chart(frame: Frame, width: int, rows: int) -> list[Content]:
    cells = max(width - _SCALE_CELLS, 1)
    bucket_s = nice_bucket_s(cells, _LEAST_SPAN_S, frame.interval_s)
    series = frame.history.series(cells, bucket_s)
    dram = [None if rates is None else _share(rates.dram_rate) for rates in series]
    ssd = [None if rates is None else _share(rates.ssd_rate) for rates in series]
    lines = stacked(dram, ssd, rows, lower_style="$dram", upper_style="$ssd")
    scale = {0: "100 %", rows - 1: "  0 %"}
    if rows % 2 and rows > 2:
        scale[rows // 2] = " 50 %"
    return [one + Content.styled(f" {scale.get(at, ''):>5}", "$faint") for at, one in enumerate(lines)]


def _share(rate: float | None) -> float:
    """For the chart: NaN where nothing was asked."""
    return math.nan if rate is None else rate


def _legend(frame: Frame, width: int) -> Content:
    rates = _steady(frame)
    shares = [("█", "$dram", "DRAM", rates.dram_rate if rates else None)]
    if frame.stats.ssd is not None:
        shares.append(("█", "$ssd", "SSD", rates.ssd_rate if rates else None))
    shares.append(("░", "$faint", "miss", None if rates is None or rates.hit_rate is None else 1 - rates.hit_rate))
    cells = max(width - _SCALE_CELLS, 1)
    span_s = cells * nice_bucket_s(cells, _LEAST_SPAN_S, frame.interval_s)
    span = Content("") if not frame.charts else Content.styled(render.duration(round(span_s)), "$faint")
    made = Content("")
    for gap, unit in ((3, " %"), (2, " %"), (1, "")):
        parts = [
            line(
                (f"{glyph} ", style),
                f"{name} ",
                (hit_rate(share).removesuffix(" %") + ("" if share is None else unit), "bold"),
            )
            for glyph, style, name, share in shares
        ]
        made = spread(parts, 10 * width, gap=gap)
        if made.cell_length <= width:
            break
    return ends(made.truncate(width), span, width)


def _steady(frame: Frame) -> Rates | None:
    """What the shares by tier are taken from: blocks come up a moment after they were matched."""
    return frame.ten or frame.now


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    if not frame.charts:
        return [_figures(frame, width), _legend(frame, width)]
    chart = max(rows - 2, 1)
    return [_figures(frame, width), *_chart(frame, width, chart), _legend(frame, width)]


def _details(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    lines = list(_draw(frame, width, max(rows - _DETAIL_ROWS - 1, 3)))
    lookups = frame.stats.lookups
    lines.append(Content(""))
    for name, requests, asked, hits, names in (
        ("match", lookups.matches, lookups.match_keys, lookups.match_hits, ("match_keys", "match_hits")),
        ("get", lookups.gets, lookups.get_keys, lookups.get_hits, ("get_keys", "get_hits")),
    ):
        rates = frame.ten or frame.now
        recent = render.NOTHING
        if rates is not None:
            recent = render.ratio(getattr(rates.added, names[1]), getattr(rates.added, names[0]))
        lines.append(
            spread(
                [
                    line((f"{name:<6}", "bold"), f"{render.count(requests)} requests"),
                    line(f"{render.count(hits)} of {render.blocks(asked)} hit"),
                    line(render.ratio(hits, asked), (" since start", "$faint")),
                    line(recent, (" 10 s", "$faint")),
                ],
                width,
            )
        )
    mapped = render.ratio(lookups.mapped_reads, lookups.matches + lookups.gets)
    lines.append(
        line(
            (f"{'mapped':<6}", "bold"), f"{mapped} of lookups; {render.count(lookups.dropped_reports)} reports dropped"
        )
    )
    lines.append(line((f"{'busy':<6}", "bold"), f"{render.count(lookups.get_throttled)} gets throttled"))
    return lines


HITS: Final = Panel("hits", "Hit rate", _draw, least=5, wanted=lambda frame: 22, details=_details)
