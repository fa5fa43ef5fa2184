"""What ``kvstore stats --curve`` shows: the daemon's live hit-ratio curve as a plot and in words."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.codec_slots import RAW, WHAT_IF_CODEC, plain_bytes, slot_bytes_with
from kvstore.protocol.statistics import CurveStats, DaemonStats

__all__ = ["ceiling", "curve_view", "four_bit_factor", "hit_rate_at", "points", "too_few"]

_LEVELS: Final = " ▁▂▃▄▅▆▇█"
_ROWS: Final = 10
_CELLS_PER_POINT: Final = 1.5
_BESIDE: Final = 11
"""Cells of the vertical axis, and of the last name below the horizontal one."""
_LEAST_COLUMNS: Final = 20
_TITLE_GAP: Final = "   "
_UNCOMPRESSED: Final = ("", RAW)
_FEWEST_SAMPLED: Final = 500
"""Sampled accesses below which the curve is mostly noise."""
_WORTH_SAYING: Final = 0.0005


def hit_rate_at(curve: CurveStats, capacity_bytes: float) -> float:
    """The curve at a capacity, between its points and not beyond its ends."""
    capacities, rates = curve.capacities_bytes, curve.hit_rates
    at = bisect_left(capacities, capacity_bytes)
    if at == 0 or at == len(capacities):
        return rates[0] if at == 0 else rates[-1]
    below, above = capacities[at - 1], capacities[at]
    share = math.log(capacity_bytes / below) / math.log(above / below)
    return rates[at - 1] + share * (rates[at] - rates[at - 1])


def curve_view(stats: DaemonStats) -> RenderableType:
    """Plot and words, at most 80 columns wide."""
    curve = stats.curve
    if curve is None:
        return Text("this daemon keeps no curve: it is older than kvstore stats --curve; upgrade it", style="yellow")
    if not curve.accesses:
        return Group(_Title(curve.capacity_bytes), Text("nothing was asked for yet", style="dim"))
    parts: list[RenderableType] = [_Title(curve.capacity_bytes), _Plot(curve), Text("")]
    parts += [Text(sentence) for sentence in _sentences(stats, curve)]
    return Group(*parts, Text(_basis(curve), style="dim"))


class _Title:
    """In one line, or in two where one is too narrow."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = Text("Hit rate of the present load, by DRAM capacity", style="bold")
        here = Text(f"1x = {render.size(self._capacity_bytes)}", style="green")
        if title.cell_len + len(_TITLE_GAP) + here.cell_len <= options.max_width:
            yield Text.assemble(title, _TITLE_GAP, here)
        else:
            yield title
            yield here


class _Plot:
    """The curve, in as many columns as there is room for."""

    def __init__(self, curve: CurveStats) -> None:
        self._curve = curve

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        most = round(len(self._curve.hit_rates) * _CELLS_PER_POINT)
        yield from _plot(self._curve, max(_LEAST_COLUMNS, min(most, options.max_width - _BESIDE)))


def _plot(curve: CurveStats, columns: int) -> Iterator[Text]:
    rates = _columns(curve.hit_rates, columns)
    top = ceiling(max(max(rates), curve.ssd_hit_rate, 0.01))
    here = _column_of(curve, curve.capacity_bytes, len(rates))
    for row in reversed(range(_ROWS)):
        label = f"{100 * top * (row + 1) / _ROWS:5.4g} %" if row % 3 == 0 or row == _ROWS - 1 else ""
        line = Text(f"{label:>8} ┤" if label else "         │", style="dim")
        for column, rate in enumerate(rates):
            level = min(max(rate / top * _ROWS - row, 0.0), 1.0)
            line.append(_LEVELS[round(level * (len(_LEVELS) - 1))], "bold green" if column == here else "cyan")
        yield line
    marks = [" "] * (len(rates) + 6)
    names = [" "] * (len(rates) + 6)
    for factor, name in ((0.25, "¼x"), (0.5, "½x"), (1, "1x"), (2, "2x"), (4, "4x"), (8, "8x")):
        column = _column_of(curve, factor * curve.capacity_bytes, len(rates))
        marks[column] = "┴"
        names[column : column + 2] = name
    yield Text("         └" + "".join(marks).rstrip().replace(" ", "─"), style="dim")
    yield Text("          " + "".join(names).rstrip(), style="dim")


def _columns(rates: Sequence[float], columns: int) -> list[float]:
    """So many values along a curve, ends included."""
    made: list[float] = []
    for column in range(columns):
        at = column * (len(rates) - 1) / (columns - 1)
        whole = min(int(at), len(rates) - 2)
        made.append(rates[whole] + (at - whole) * (rates[whole + 1] - rates[whole]))
    return made


def _column_of(curve: CurveStats, capacity_bytes: float, columns: int) -> int:
    first, last = curve.capacities_bytes[0], curve.capacities_bytes[-1]
    return round(math.log(max(capacity_bytes, first) / first) / math.log(last / first) * (columns - 1))


def ceiling(rate: float) -> float:
    """The next round number."""
    step: float = 10.0 ** math.floor(math.log10(rate))
    return min(next(step * factor for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * factor >= rate), 1.0)


def _sentences(stats: DaemonStats, curve: CurveStats) -> Iterator[str]:
    capacity_bytes, here = curve.capacity_bytes, curve.hit_rate
    yield f"{render.size(capacity_bytes)} of DRAM with LRU would hit {render.percent(here)} of the blocks asked for."
    wishes = [f"2x the DRAM would give {points(hit_rate_at(curve, 2 * capacity_bytes) - here)}"]
    factor = four_bit_factor(stats)
    if factor > 1.1:
        gain = hit_rate_at(curve, factor * capacity_bytes) - here
        wishes.append(f"4-bit blocks ({factor:.2f}x as many) {points(gain)}")
    wishes.append(f"8x {points(hit_rate_at(curve, 8 * capacity_bytes) - here)}")
    yield f"{', '.join(wishes)}; half the DRAM {points(hit_rate_at(curve, capacity_bytes / 2) - here)}."
    if curve.ssd_bytes:
        reached = " at least" if curve.ssd_bytes > curve.reach_bytes else ""
        yield (
            f"DRAM and SSD together ({render.size(curve.ssd_bytes)}) hit{reached} "
            f"{render.percent(curve.ssd_hit_rate)}: {points(curve.ssd_hit_rate - here)} come from the SSD."
        )
    if curve.hot_share >= 0.01:
        yield (
            f"{render.percent(curve.hot_share)} of it is {render.count(curve.hot_blocks)} blocks that one request in a "
            f"hundred or more uses ({render.size(curve.hot_bytes)})."
        )


def points(change: float) -> str:
    """Percentage points, with a sign."""
    return f"{100 * change:+.1f} points" if abs(change) >= _WORTH_SAYING else "nothing"


def four_bit_factor(stats: DaemonStats) -> float:
    """How many times as many blocks there would be, if those that are not compressed yet were, with ``kivi4``.

    By the slots that blocks take now and would take then, as ``kvstore tune`` has it of a recording.
    """
    now = then = 0
    for one in stats.namespaces:
        now += one.slot_bytes
        then += one.slot_bytes
        if one.codec in _UNCOMPRESSED and one.blocks:
            mean_bytes = round(one.slot_bytes / one.blocks)
            then += one.blocks * (slot_bytes_with(plain_bytes(mean_bytes, RAW), WHAT_IF_CODEC) - mean_bytes)
    return now / then if then > 0 else 1.0


def too_few(curve: CurveStats) -> bool:
    """Whether the curve is mostly noise yet."""
    return curve.accesses * curve.sampling_rate < _FEWEST_SAMPLED


def _basis(curve: CurveStats) -> str:
    age = render.duration(min(curve.age_s, 2 * curve.half_life_s))
    basis = (
        f"from {render.count(curve.sampled_blocks)} sampled blocks ({render.percent(curve.sampling_rate)}) and about "
        f"{render.count(round(curve.accesses))} accesses, mostly of the last {age}"
    )
    return basis + ("; too few to rely on" if too_few(curve) else "")
