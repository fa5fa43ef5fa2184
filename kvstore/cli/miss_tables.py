"""The table of ``kvstore stats --misses``: why lookups missed, and what to do about the biggest cause."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvstore.cli import render
from kvstore.protocol.misses import MissCause
from kvstore.protocol.statistics import DaemonStats, MissStats

__all__ = ["cause_words", "left_tier", "miss_tables"]

_BAR_CELLS: Final = 20
_MOST_KEPT: Final = 0.5
"""Share of the evicted blocks that further capacity should have kept, to be worth naming."""

CAUSE_WORDS: Final = {
    MissCause.NEVER_SEEN: "never seen",
    MissCause.EVICTED: "evicted",
    MissCause.EXPIRED: "expired",
    MissCause.QUOTA: "over quota",
    MissCause.REMOVED: "removed",
    MissCause.INVALIDATED: "invalidated",
    MissCause.CORRUPT: "corrupt",
    MissCause.DIVERGED: "prompt differs",
    MissCause.FAILED_LOAD: "load failed",
    MissCause.RECOMPUTE: "slower to load",
    MissCause.PART_MISSING: "part missing",
    MissCause.NOT_STORED: "not stored",
}
"""Causes in a table."""

_ADVICE: Final = {
    MissCause.NEVER_SEEN: (
        "was new: no cache can have it. Where prompts share text, put what they share first, and "
        "keep its tokens and the namespace the same in all engines."
    ),
    MissCause.EXPIRED: "had outlived its time to live: give it a longer one.",
    MissCause.QUOTA: "had to leave for its tenant's quota: raise it ([quota]).",
    MissCause.REMOVED: "was removed by a client: look who calls remove or clear.",
    MissCause.INVALIDATED: (
        "was of an earlier generation: weights changed in place, or clients did not call "
        "invalidate() after another one did."
    ),
    MissCause.CORRUPT: "was corrupt: look into the log, and run kvstore verify and a memory test.",
    MissCause.DIVERGED: (
        "is behind the point where a prompt leaves a known one. New conversations behind a shared "
        "beginning must do that; where prompts ought to share more, move what varies (dates, ids, names) to their end."
    ),
    MissCause.FAILED_LOAD: (
        "is below memory and could not be loaded: look at the SSD in kvstore stats and at the log; "
        "prefetch earlier, or wait longer."
    ),
    MissCause.RECOMPUTE: (
        "is on the SSD, and computing it anew is faster: blocks of fewer bits, or a faster SSD "
        "(ssd.transcode, ssd.prefill_tokens_per_s)."
    ),
    MissCause.PART_MISSING: "lacks a part: see that every shard puts its own, and that namespace.parts is right.",
    MissCause.NOT_STORED: "could not be stored when it was put: see 'refused' under Puts in kvstore stats for why.",
}
"""What most, or the largest part, of what missed did, and what to do about it."""


def miss_tables(stats: DaemonStats) -> RenderableType:
    """Why the lookups of a daemon missed.

    Args:
        stats: of a daemon.
    """
    misses = stats.misses
    if misses is None:
        return Text("this daemon does not explain misses: it is too old, or explain.memory_bytes is 0", style="yellow")
    if not misses.blocks:
        return Group(Text("Misses", style="bold"), Text("nothing was missed yet", style="dim"))
    parts: list[RenderableType] = [_causes(misses), Text(_remembered(misses), style="dim")]
    if sum(misses.extra_blocks):
        parts += ["", _extra(misses, *left_tier(stats))]
    return Group(*parts, "", Text(_advice(stats, misses)))


def cause_words(cause: str) -> str:
    """A cause's name for people; of one that is not known its name on the wire."""
    known = {member.value: words for member, words in CAUSE_WORDS.items()}
    return known.get(cause, cause.replace("_", " "))


def _causes(misses: MissStats) -> Table:
    columns: list[str | render.Column] = ["cause", "requests", "share", "blocks", "share", render.text_column("")]
    made = render.table("Misses", columns)
    for cause, counted in sorted(misses.causes.items(), key=lambda item: (-item[1].blocks, item[0])):
        made.add_row(
            render.plain(cause_words(cause)),
            render.count(counted.requests),
            render.ratio(counted.requests, misses.requests),
            render.count(counted.blocks),
            render.ratio(counted.blocks, misses.blocks),
            render.Bar(counted.blocks / misses.blocks, _BAR_CELLS),
        )
    made.add_section()
    made.add_row("all", render.count(misses.requests), "100.0 %", render.count(misses.blocks), "100.0 %", "")
    return made


def _remembered(misses: MissStats) -> str:
    remembered = f"{render.count(misses.ghosts)} departures are remembered"
    age = f"the oldest {render.duration(misses.oldest_ghost_s)} ago, in {render.size(misses.ghost_bytes)}"
    return f"a request counts with its first missing block; {remembered}, {age}"


def _extra(misses: MissStats, tier: str, capacity_bytes: int) -> Table:
    """What further capacity would have kept, from the first bound that keeps some to the one that keeps all."""
    columns: list[str | render.Column] = ["further", "in all", "kept", "share", render.text_column("")]
    made = render.table(f"Evicted from {tier}: what more capacity would have kept", columns)
    whole = sum(misses.extra_blocks)
    kept = 0
    for multiple, blocks in zip(misses.multiples, misses.extra_blocks, strict=False):
        kept += blocks
        if kept:
            share = kept / whole
            cells = (render.count(kept), render.percent(share), render.Bar(share, _BAR_CELLS))
            made.add_row(render.size(capacity_bytes * multiple), f"x {1 + multiple:.3g}", *cells)
        if kept == whole:
            break
    return made


def left_tier(stats: DaemonStats) -> tuple[str, int]:
    """The tier that blocks leave for good, and its capacity in bytes."""
    if stats.ssd is not None:
        return "SSD", stats.ssd.capacity_bytes
    return "DRAM", stats.dram.capacity_bytes


def _advice(stats: DaemonStats, misses: MissStats) -> str:
    """One sentence on the biggest cause."""
    biggest = max(misses.causes.items(), key=lambda item: item[1].blocks)[0]
    if biggest == MissCause.EVICTED:
        return _advice_for_evicted(stats, misses)
    known = {member.value: words for member, words in _ADVICE.items()}
    what = _largest_part(misses.causes[biggest].blocks, misses.blocks)
    return f"{what} {known[biggest]}" if biggest in known else f"{what}: {cause_words(biggest)}."


def _advice_for_evicted(stats: DaemonStats, misses: MissStats) -> str:
    what = _largest_part(misses.causes[MissCause.EVICTED].blocks, misses.blocks)
    tier, capacity_bytes = left_tier(stats)
    whole = sum(misses.extra_blocks)
    kept = 0
    for multiple, blocks in zip(misses.multiples, misses.extra_blocks, strict=False):
        kept += blocks
        if whole and kept >= _MOST_KEPT * whole:
            more, share = render.size(capacity_bytes * multiple), _unbroken(render.ratio(kept, whole))
            return (
                f"{what} had been evicted; {more} more of {tier} would have kept {share} of that: raise "
                "the capacity, take a codec of fewer bits, or ask kvstore tune which policy would do better."
            )
    return (
        f"{what} had been evicted long before, and would have needed more than "
        f"{misses.multiples[-1]:g} times the capacity: add a tier below (ssd), or take a codec of fewer bits."
    )


def _largest_part(blocks: int, whole: int) -> str:
    """What an advice is about: most is more than half."""
    if 2 * blocks > whole:
        return "Most of what missed"
    return f"The largest part of what missed ({_unbroken(render.ratio(blocks, whole))})"


def _unbroken(figure: str) -> str:
    """A number that stays on the line of its unit."""
    return figure.replace(" ", "\u00a0")
