"""Quality per bit as a picture. matplotlib is imported inside functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.cli.plot_files import plot_style
from kvstore.cli.quality.measured import CodecQuality, QualityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_plot"]

_PANELS: Final = (
    ("natural_divergence", "natural text"),
    ("recall_divergence", "recall of far text"),
    ("outlier_recall_divergence", "recall, keys with outlier channels"),
)
_NAME_BITS: Final = 0.3
"""Width of a name, in factors of two of bits."""
_POINT_DIVERGENCE: Final = 0.015
"""Height of a typographic point, in factors of ten of divergence."""
_HEIGHTS: Final = (0.0, 7.0, -7.0, 9.0, -9.0, 14.0, -14.0, 18.0, -18.0)
"""Of a name above its dot, in points, the best first."""

_INK: Final = "#1f2933"
_FAINT: Final = "#d5dbe1"
_COLOURS: Final = ("#0b6e99", "#c2571a", "#3c7a3c", "#8b4a9c", "#a61e4d", "#5c5f66")


def draw_plot(report: QualityReport, path: Path) -> None:
    """Draw the divergence from the unquantised model over bits a value, one panel a task, and write it.

    Exact codecs are left out. The line is the frontier: no measured codec diverges less with as few bits.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = sorted((row for row in report.codecs if not row.exact), key=lambda row: row.bits)
    panels = [(field, title) for field, title in _PANELS if any(getattr(row, field) for row in rows)]
    with rc_context(plot_style(_INK, _FAINT)):
        figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        for index, (axes, (field, title)) in enumerate(
            zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True)
        ):
            axes.set(xscale="log", yscale="log")
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel("bits a value, metadata included")
            if index == 0:
                axes.set_ylabel("divergence from the unquantised model, nats a token")
            axes.grid(color=_FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            _draw_codecs(axes, rows, field)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks([2, 3, 4, 5, 6, 8])
            axes.set_xlim(right=1.25 * max(row.bits for row in rows))
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_codecs(axes: Axes, rows: Sequence[CodecQuality], field: str) -> None:
    points = [(row, value) for row in rows if (value := getattr(row, field)) is not None]
    frontier = [
        (row.bits, value.mean)
        for row, value in points
        if value.mean <= min(other.mean for before, other in points if before.bits <= row.bits)
    ]
    axes.step(*zip(*frontier, strict=True), where="post", color=_FAINT, linewidth=2, zorder=1)
    families = list(dict.fromkeys(_family(row.codec) for row, _ in points))
    taken: list[tuple[float, float]] = []
    for row, value in points:
        colour = _COLOURS[families.index(_family(row.codec)) % len(_COLOURS)]
        axes.errorbar(row.bits, value.mean, yerr=value.se, fmt="o", color=colour, markersize=5, elinewidth=1)
        axes.annotate(
            row.codec,
            (row.bits, value.mean),
            xytext=(6, _free_height(taken, math.log2(row.bits), math.log10(value.mean))),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8,
        )


def _family(codec: str) -> str:
    return codec.rstrip("-0123456789")


def _free_height(taken: list[tuple[float, float]], bits: float, divergence: float) -> float:
    """Points above a dot at which its name covers no other, where there is such a place; it is taken then."""
    places = [(bits, divergence + height * _POINT_DIVERGENCE) for height in _HEIGHTS]
    free = [
        at
        for at, (_, here) in enumerate(places)
        if all(abs(bits - x) > _NAME_BITS or abs(here - y) > 7 * _POINT_DIVERGENCE for x, y in taken)
    ]
    chosen = free[0] if free else 0
    taken.append(places[chosen])
    return _HEIGHTS[chosen]
