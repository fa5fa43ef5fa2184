"""Hit rates and estimated times as a picture. matplotlib is imported inside functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.cli import render
from kvstore.cli.plot_files import plot_style
from kvstore.cli.tune.report import TuneReport
from kvstore.cli.tune.series import Series, group_name, groups_of, series_of, short_count
from kvstore.errors import InvalidArgument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_plot"]

_INK: Final = "#1f2933"
_FAINT: Final = "#dfe4e8"
_OUT_OF_REACH: Final = "#f3f5f7"
_MOST_GROUPS: Final = 4
_MOST_TICKS: Final = 8


def draw_plot(report: TuneReport, path: Path) -> None:
    """Draw hit rates above and times to the first token below, one column for each codec and SSD, and write it.

    Raises:
        InvalidArgument: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(groups_of(report).items())[:_MOST_GROUPS]
    with rc_context(plot_style(_INK, _FAINT)):
        figure = Figure(figsize=(1.2 + 4.8 * len(groups), 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, len(groups), sharex=False, sharey="row", squeeze=False, height_ratios=[3, 2])
        for column, ((codec, ssd_bytes), rows) in enumerate(groups):
            series = series_of(report, rows)
            above, below = panels[0][column], panels[1][column]
            above.set_title(group_name(codec, ssd_bytes), loc="left", fontsize=10, fontweight="bold")
            _draw_hit_rates(above, series, 100 * report.trace.hit_rate)
            _draw_times(below, series)
            _set_capacities(below, series)
            _set_capacities(above, series)
            above.tick_params(labelbottom=False)
            above.set_xlabel("")
            if column == 0:
                above.set_ylabel("blocks hit, % of those asked for")
                below.set_ylabel("time to the first token, s (estimated)")
        names, lines = panels[0][0].get_legend_handles_labels()[::-1]
        panels[0][0].legend(lines[::-1], names[::-1], loc="upper left", frameon=False, fontsize=8.5)
        name = Path(report.trace.name).name
        figure.suptitle(
            f"{name}: {render.count(report.trace.requests)} requests, {report.trace.block_tokens} tokens a block",
            x=0.01,
            ha="left",
            fontsize=11,
        )
        try:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise InvalidArgument(f"--plot: cannot write {path}: {error.strerror or error}") from None


def _prepared(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _draw_hit_rates(axes: Axes, series: list[Series], at_best: float) -> None:
    _prepared(axes)
    top = at_best * 1.12
    for one in reversed(series):
        across, up = zip(*one.points, strict=True)
        if one.bound:
            axes.fill_between(across, up, top, color=_OUT_OF_REACH, linewidth=0, zorder=0)
            axes.plot(across, up, color=one.colour, linewidth=1.4, linestyle=(0, (4, 2)), label=f"{one.policy} (bound)")
            continue
        axes.plot(across, up, color=one.colour, linewidth=2.2 if one.policy == "lru" else 1.6, label=one.policy)
        places = [(row.capacity_bytes, 100 * row.hit_rate) for row in one.rows]
        axes.plot(*zip(*places, strict=True), "o", color=one.colour, markersize=3.6, zorder=3)
    axes.axhline(at_best, color=_INK, linewidth=0.7, linestyle=":")
    axes.annotate(
        f"{at_best:.1f} %: no cache can hit more",
        (1, at_best),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    axes.set_ylim(0, top)


def _draw_times(axes: Axes, series: list[Series]) -> None:
    _prepared(axes)
    for one in reversed(series):
        if not one.bound:
            places = [(row.capacity_bytes, row.first_token_s) for row in one.rows]
            axes.plot(*zip(*places, strict=True), "o-", color=one.colour, markersize=3.6, linewidth=1.6)
    axes.set_ylim(bottom=0)


def _set_capacities(axes: Axes, series: list[Series]) -> None:
    """Marks at the capacities that were asked for: bytes, and below them the blocks that fit."""
    from matplotlib.ticker import NullFormatter, NullLocator

    rows = series[0].rows
    step = -(-len(rows) // _MOST_TICKS)
    shown = rows[::step]
    axes.set_xticks(
        [row.capacity_bytes for row in shown],
        [f"{render.size(row.capacity_bytes)}\n{short_count(row.capacity_blocks)}" for row in shown],
        fontsize=7.5,
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("DRAM, and the blocks that fit")
