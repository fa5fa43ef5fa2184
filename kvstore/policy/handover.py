"""Blocks that one policy held become another's: a change of policy loses something of the order, never a block."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.policy.base import BEFORE_ALL, Evictable, EvictionPolicy


def hand_over(before: EvictionPolicy, after: EvictionPolicy, blocks: Iterable[Evictable]) -> None:
    """Have a policy that holds nothing take over all blocks of another, which must not be used afterwards.

    They come in the order of their last use, parents before children. What was condemned still is.

    Args:
        before: holds the blocks; is not changed, but for the marks in them.
        after: holds nothing.
        blocks: all that ``before`` holds.
    """
    held = list(blocks)
    ordered = sorted([(before.used(block), block.depth, place) for place, block in enumerate(held)])
    condemned: list[Evictable] = []
    for _, _, place in ordered:
        held[place].access = -1
    for used, _, place in ordered:
        block = held[place]
        after.insert(block, max(used, BEFORE_ALL + 1))
        if used <= BEFORE_ALL:
            condemned.append(block)
    if condemned:
        after.condemn(condemned)
