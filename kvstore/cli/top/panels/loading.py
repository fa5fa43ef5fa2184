"""Loading: what comes up from the SSD ahead of its use, and what is computed anew because that is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.stats_ahead import BOUNDS, DECISIONS, WANTED
from kvstore.cli.top.charts import slim
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.text import Part, flow, line, plain
from kvstore.protocol.statistics import LoadingStats, PrefetchStats

__all__ = ["LOADING"]

_NAME_CELLS: Final = 11
_BAR_CELLS: Final = 12
_STYLES: Final = {"all": "$good", "part": "$dram", "none": "$miss", "probe": "$accent", "unknown": "$faint"}


def _fact(name: str, *parts: Part) -> Content:
    return line((f"{name:<{_NAME_CELLS}}", "$faint"), *parts)


def _told(name: str, numbers: Mapping[str, int], words: Mapping[str, str], width: int) -> list[Content]:
    parts = [
        line(render.count(number), (f" {words.get(what, plain(what))}", "$faint"))
        for what, number in numbers.items()
        if number
    ]
    first, *others = flow(parts or [line(("nobody", "$faint"))], width, indent=_NAME_CELLS)
    return [_fact(name, first[_NAME_CELLS:]), *others]


def _loading(stats: LoadingStats, width: int) -> list[Content]:
    speed = render.throughput(stats.read_bytes_per_s, 1.0) if stats.read_bytes_per_s else "unknown"
    prefill = f"{stats.prefill_tokens_per_s:,.0f} tokens/s" if stats.prefill_tokens_per_s else "unknown"
    lines = [
        _fact(
            "load",
            (speed, "bold"),
            (f"  latency {render.latency(stats.latency_s)}" if stats.latency_s else "", "$faint"),
        ),
        _fact("prefill", (prefill, "bold"), (f"  {stats.prefill_source}", "$faint")),
    ]
    decided = sum(stats.decisions.values())
    if decided:
        parts = []
        for name, number in sorted(stats.decisions.items(), key=lambda item: -item[1]):
            if number:
                what = DECISIONS.get(name, plain(name))
                parts.append(line((f"{what} ", _STYLES.get(name, "")), (render.ratio(number, decided), "bold")))
        first, *others = flow(parts, width, indent=_NAME_CELLS)
        lines += [_fact("matches", first[_NAME_CELLS:]), *others]
    if stats.load_saved_s or stats.refusal_saved_s:
        lines.append(
            _fact(
                "saved",
                (render.duration(stats.load_saved_s), "bold"),
                (" by loading, ", "$faint"),
                (render.duration(stats.refusal_saved_s), "bold"),
                (" by computing", "$faint"),
            )
        )
    return lines


def _prefetch(stats: PrefetchStats, width: int) -> list[Content]:
    lines = [
        _fact(
            "ahead",
            f"{render.blocks(stats.blocks)}, {render.size(stats.bytes)}",
            ("  used ", "$faint"),
            (render.ratio(stats.used_blocks, stats.blocks), "bold"),
        ),
        *_told("wanted by", stats.wanted, WANTED, width),
    ]
    busy = stats.waiting_bytes + stats.flying_bytes
    lines.append(
        _fact("on its way")
        + slim(busy / stats.most_bytes if stats.most_bytes else 0.0, _BAR_CELLS, "$ssd")
        + line(f" {render.size(busy)} of {render.size(stats.most_bytes)}")
    )
    wasted = {"left unused": stats.left_blocks, "expired": stats.expired, "of clients that went": stats.cancelled}
    if any(wasted.values()):
        lines += _told("wasted", wasted, {}, width)
    if any(stats.refused.values()):
        lines += _told("refused", stats.refused, BOUNDS, width)
    if stats.hints:
        lines.append(_fact("hints", f"{render.count(stats.hints)}, {render.count(stats.delayed_hints)} of them later"))
    if stats.residence_s:
        lines.append(_fact("stays", f"{render.duration(stats.residence_s)} in DRAM, unused"))
    return lines


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    loading, prefetch = frame.stats.loading, frame.stats.prefetch
    lines = [] if loading is None else _loading(loading, width)
    return lines + ([] if prefetch is None else _prefetch(prefetch, width))


LOADING: Final = Panel(
    "loading",
    "Loading",
    _draw,
    least=4,
    wanted=lambda frame: len(_draw(frame, 56, 0)),
    there=lambda frame: frame.stats.loading is not None or frame.stats.prefetch is not None,
)
