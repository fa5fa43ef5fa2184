"""The tables of ``kvstore stats`` about what comes up from the SSD: ahead of its use, and instead of being computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.protocol.statistics import DaemonStats, LoadingStats, PrefetchStats

__all__ = ["BOUNDS", "DECISIONS", "WANTED", "ahead_tables"]

DECISIONS = {
    "all": "loaded",
    "part": "loaded in part",
    "none": "computed",
    "unknown": "loaded, nothing to compare",
    "probe": "loaded to measure again",
}
WANTED = {"arrived": "matches", "ahead": "prefetches", "hinted": "hints", "warming": "warming up"}
BOUNDS = {
    "bytes": "too many waited",
    "client_bytes": "too many of one client",
    "no_room": "no room",
    "hints": "too many hints",
}


def ahead_tables(stats: DaemonStats) -> Iterator[RenderableType]:
    """Both, where there is a tier below memory and something to tell."""
    if stats.prefetch is not None and (stats.prefetch.wanted or stats.prefetch.hints):
        yield _prefetch(stats.prefetch)
    if stats.loading is not None and stats.loading.decisions:
        yield _loading(stats.loading)


def _prefetch(prefetch: PrefetchStats) -> RenderableType:
    made = render.table("Brought up ahead", ["", "blocks", "bytes", "of these"])
    for name, blocks, size_bytes in (
        ("came up", prefetch.blocks, prefetch.bytes),
        ("used", prefetch.used_blocks, prefetch.used_bytes),
        ("left unused", prefetch.left_blocks, prefetch.left_bytes),
    ):
        made.add_row(name, render.count(blocks), render.size(size_bytes), render.ratio(blocks, prefetch.blocks))
    notes = [f"wanted by {_listed(prefetch.wanted, WANTED)}"] if prefetch.wanted else []
    dropped = {"expired": prefetch.expired, "of clients that went": prefetch.cancelled}
    notes += [f"dropped: {_listed(dropped, {})}"] if any(dropped.values()) else []
    notes += [f"refused: {_listed(prefetch.refused, BOUNDS)}"] if any(prefetch.refused.values()) else []
    if prefetch.delayed_hints:
        notes.append(
            f"{render.count(prefetch.delayed_hints)} of {render.count(prefetch.hints)} hints were begun later: unused "
            f"blocks stay for {render.duration(prefetch.residence_s)}"
        )
    return Group(made, *(Text(note, style="dim") for note in notes))


def _loading(loading: LoadingStats) -> RenderableType:
    rate = f"{loading.prefill_tokens_per_s:,.0f} tokens/s ({loading.prefill_source})"
    return render.facts(
        "Load or compute",
        [
            ("loads", f"{_rate(loading.read_bytes_per_s)}, latency {render.latency(loading.latency_s)}"),
            ("engine", rate if loading.prefill_source else "unknown: nobody set or reported its prefill rate"),
            ("matches", _listed(loading.decisions, DECISIONS)),
            ("computed", f"{render.blocks(loading.refused_blocks)}, though they were below"),
            (
                "saved",
                f"{render.duration(loading.load_saved_s)} by loading, "
                f"{render.duration(loading.refusal_saved_s)} by computing (estimated)",
            ),
        ],
    )


def _rate(bytes_per_s: float) -> str:
    return render.throughput(bytes_per_s, 1.0) if bytes_per_s else "not measured yet"


def _listed(numbers: Mapping[str, int], names: Mapping[str, str]) -> str:
    return ", ".join(f"{render.count(number)} {names.get(name, name)}" for name, number in numbers.items() if number)
