"""Policy: what chooses the blocks that leave, and what it does at the moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from textual.content import Content

from kvstore.cli import render
from kvstore.cli.stats_tables import policy_words
from kvstore.cli.top.frame import Frame
from kvstore.cli.top.panel import Panel
from kvstore.cli.top.text import line, per_s, plain, throughput

__all__ = ["POLICY"]

_NAME_CELLS: Final = 10


def _fact(name: str, *parts: str | tuple[str, str]) -> Content:
    return line((f"{name:<{_NAME_CELLS}}", "$faint"), *parts)


def _policy(name: str, following: str) -> tuple[tuple[str, str], ...]:
    told = plain(policy_words(name, following))
    return (told[: len(name)], "$accent bold"), (told[len(name) :], "$text")


def _draw(frame: Frame, width: int, rows: int) -> Sequence[Content]:
    eviction = frame.stats.eviction
    lines = [_fact("DRAM", *_policy(eviction.policy, eviction.following), ("   e switches", "$faint"))]
    if eviction.ssd_policy:
        admits = (("   admits ", "$faint"), (plain(eviction.admission), "bold"))
        lines.append(_fact("SSD", *_policy(eviction.ssd_policy, eviction.ssd_following), *admits))
    lines.append(
        _fact("evicts", (per_s(frame.now, "evicted_blocks"), "bold"), f"  {throughput(frame.now, 'evicted_bytes')}")
    )
    lines.append(_fact("evicted", f"{render.blocks(eviction.evicted_blocks)}, {render.size(eviction.evicted_bytes)}"))
    if eviction.ghost_bytes:
        lines.append(_fact("ghosts", f"{render.size(eviction.ghost_bytes)} of memory, for what left"))
    if eviction.switched:
        lines.append(_fact("switched", f"{render.count(eviction.switched)} times"))
    lines += [
        _fact("removed", f"{render.blocks(eviction.removed_blocks)}, by clients or expired"),
        _fact("moved", f"{render.count(eviction.moved_records)} records, to empty slabs"),
        _fact("corrupt", f"{render.count(eviction.corrupt_records)} records, turned into misses"),
    ]
    return lines


POLICY: Final = Panel("policy", "Policy", _draw, least=3, wanted=lambda frame: len(_draw(frame, 80, 0)))
