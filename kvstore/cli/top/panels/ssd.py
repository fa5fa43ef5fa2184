"""The SSD tier: its state, what goes down and comes up, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.top.charts import nice_bucket_s, sparkline
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.text import cut, flow, line, per_s, plain, spread, throughput
from kvstore.protocol.statistics import SsdStats

__all__ = ["SSD"]

_NAME_CELLS: Final = 9
_VALUE_CELLS: Final = 11
_LEAST_SPAN_S: Final = 60.0
_LEAST_CHART_CELLS: Final = 8
_STATES: Final = {
    "ok": ("● ok", "$good bold"),
    "read-only": ("▲ read-only", "$warn bold"),
    "off": ("✗ off", "$bad bold"),
}


def _flow(frame: Frame, name: str, count: str, count_bytes: str, style: str, width: int) -> Content:
    """A direction: bytes a second with a chart, and blocks a second."""
    made = line(
        (f"{name:<{_NAME_CELLS}}", "$faint"),
        (f"{throughput(frame.now, count_bytes):>{_VALUE_CELLS}}", "bold"),
        (f"{per_s(frame.now, count):>{_VALUE_CELLS}}", ""),
    )
    room = width - made.cell_length - 1
    if not frame.charts or room < _LEAST_CHART_CELLS:
        return made.truncate(width)
    bucket_s = nice_bucket_s(room, _LEAST_SPAN_S, frame.interval_s)
    values = [None if rates is None else rates.per_s(count_bytes) for rates in frame.history.series(room, bucket_s)]
    return made + Content(" ") + sparkline(values, style=style)


def _estimate(bytes_per_s: float) -> str:
    return render.throughput(bytes_per_s, 1.0) if bytes_per_s else "unknown"


def _told(numbers: dict[str, int], name: str, style: str, width: int) -> list[Content]:
    """Those that occurred, on as many lines as it takes."""
    parts = [line((f"{render.count(number)} {what}", style)) for what, number in numbers.items() if number]
    if not parts:
        return []
    first, *others = flow(parts, width, indent=_NAME_CELLS)
    return [line((f"{name:<{_NAME_CELLS}}", "$faint"), first[_NAME_CELLS:]), *others]


def _trouble(ssd: SsdStats, width: int) -> list[Content]:
    numbers = {
        "damaged records": ssd.corrupt_records,
        "read errors": ssd.read_errors,
        "write errors": ssd.write_errors,
        "blocks dropped": ssd.dropped_blocks,
    }
    return _told(numbers, "trouble", "$warn", width)


def _left_out(ssd: SsdStats, width: int) -> list[Content]:
    numbers = {"loads refused as too slow": ssd.refused_loads, "blocks not admitted": ssd.not_admitted_blocks}
    return _told(numbers, "left out", "", width)


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    ssd = frame.stats.ssd
    if ssd is None:
        return [Content.styled("This daemon has no SSD tier.", "$faint")]
    name, style = _STATES.get(ssd.state, (plain(ssd.state), "$warn bold"))
    lines = [
        line(
            (f"{'state':<{_NAME_CELLS}}", "$faint"), (name, style), ("  " + cut(plain(ssd.problem), width - 24), "$bad")
        ),
        _flow(frame, "demoted", "demoted_blocks", "demoted_bytes", "$ssd", width),
        _flow(frame, "promoted", "promoted_blocks", "promoted_bytes", "$dram", width),
        _flow(frame, "evicted", "ssd_evicted_blocks", "ssd_evicted_bytes", "$miss", width),
        spread(
            [
                line((f"{'speed':<{_NAME_CELLS}}", "$faint"), "read ", (_estimate(ssd.read_bytes_per_s), "bold")),
                line("write ", (_estimate(ssd.write_bytes_per_s), "bold")),
            ],
            width,
            gap=2,
        ),
        line(
            (f"{'waiting':<{_NAME_CELLS}}", "$faint"),
            f"{render.blocks(ssd.waiting_blocks)}, {render.size(ssd.writing_bytes)} being written",
        ),
    ]
    lines += [*_trouble(ssd, width), *_left_out(ssd, width)]
    for name, value in (
        ("served", render.blocks(ssd.hits)),
        ("commits", f"{render.count(ssd.groups)} groups, {render.count(ssd.checkpoints)} checkpoints"),
        ("found", f"{render.count(ssd.recovered_records)} records in {render.duration(ssd.recovery_s)} at the start"),
        ("where", cut(plain(ssd.directory), width - _NAME_CELLS, keep="end")),
        ("I/O", "direct" if ssd.direct else "through the page cache"),
    ):
        lines.append(line((f"{name:<{_NAME_CELLS}}", "$faint"), value))
    return lines


SSD: Final = Panel(
    "ssd",
    "SSD",
    _draw,
    least=5,
    wanted=lambda frame: 12,
    there=lambda frame: frame.stats.ssd is not None,
)
