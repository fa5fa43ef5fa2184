"""Which curves there are to draw, in which colours, whoever draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from kvstore.cli.tune.report import TuneReport, TuneRow
from kvstore.cli.tune.runs import LRU
from kvstore.simulator.clairvoyant import CLAIRVOYANT

__all__ = ["Series", "group_name", "groups_of", "series_of", "short_count"]

_COLOURS: Final = ("#0b6e99", "#c2571a", "#3c7a3c", "#8b4a9c", "#a61e4d", "#9a7b00", "#4a6fd0", "#00857c")
_DARK_COLOURS: Final = ("#5bb8e0", "#f0955c", "#7fc47f", "#c79bd6", "#f07fa3", "#d9bd4a", "#93adf5", "#4cc9bf")
_TERMINAL: Final = ("cyan", "yellow", "green", "magenta", "red", "bright_yellow", "bright_blue", "bright_cyan")
_BOUND: Final = ("#8a939c", "#77818b", "bright_black")


class Series(NamedTuple):
    """One policy of one group of rows.

    Attributes:
        policy: its name.
        rows: by capacity; of LRU in DRAM alone ``points`` is a finer curve.
        points: bytes of DRAM, and percent of blocks that are hit.
        colour, dark_colour, style: on white, on black, and in a terminal.
        bound: whether it is the clairvoyant bound.
    """

    policy: str
    rows: Sequence[TuneRow]
    points: Sequence[tuple[float, float]]
    colour: str
    dark_colour: str
    style: str
    bound: bool


def groups_of(report: TuneReport) -> dict[tuple[str, int], list[TuneRow]]:
    """Rows by codec and bytes of the SSD, in their order."""
    grouped: dict[tuple[str, int], list[TuneRow]] = {}
    for row in report.rows:
        grouped.setdefault((row.codec, row.ssd_bytes), []).append(row)
    return grouped


def series_of(report: TuneReport, rows: Sequence[TuneRow]) -> list[Series]:
    """The curves of a group, LRU first and the bound last."""
    names = sorted(
        dict.fromkeys(row.policy for row in report.rows), key=lambda name: (name == CLAIRVOYANT, name != LRU)
    )
    made = []
    for number, policy in enumerate(names):
        own = sorted((row for row in rows if row.policy == policy), key=lambda row: row.capacity_bytes)
        if not own:
            continue
        points = [(float(row.capacity_bytes), 100 * row.hit_rate) for row in own]
        if policy == LRU and not own[0].ssd_bytes:
            low, high = own[0].capacity_blocks, own[-1].capacity_blocks
            slot_bytes = report.assumptions.slot_bytes[own[0].codec]
            points += [
                (float(point.capacity_blocks * slot_bytes), 100 * point.hit_rate)
                for point in report.lru_curve
                if low < point.capacity_blocks < high
            ]
            points = sorted(set(points))
        bound = policy == CLAIRVOYANT
        at = number % len(_COLOURS)
        colours = _BOUND if bound else (_COLOURS[at], _DARK_COLOURS[at], _TERMINAL[at])
        made.append(Series(policy, own, points, *colours, bound))
    return made


def group_name(codec: str, ssd_bytes: int) -> str:
    """What the rows of a group have in common, for people."""
    from kvstore.cli import render

    return f"{codec}, no SSD" if not ssd_bytes else f"{codec}, an SSD of {render.size(ssd_bytes)}"


def short_count(blocks: int) -> str:
    """A number of blocks in few characters: ``500``, ``20k``, ``1.5M``."""
    for factor, unit in ((1_000_000, "M"), (1000, "k")):
        if blocks >= factor:
            return f"{blocks / factor:.3g}{unit}"
    return str(blocks)
