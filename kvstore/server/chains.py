"""Lists of what a tier holds, the hottest first; for warming it up another time."""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.block import Block
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.store import Store
from kvstore.protocol.messages import TierId

__all__ = ["ChainList", "list_chains"]

_AT_ONCE: Final = 4096
"""Blocks that are looked at before others have their turn."""


@dataclass(slots=True)
class ChainList:
    """Segments of chains, as ``ChainsReply`` has them.

    Attributes:
        namespaces: ids of their namespaces.
        keys: of all segments, one behind the other.
        lengths: keys of each.
        places: index of each one's namespace in ``namespaces``.
        slot_bytes: of all blocks, in DRAM.
    """

    namespaces: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    places: array[int] = field(default_factory=lambda: array("I"))
    slot_bytes: int = 0

    def arrays(self) -> tuple[bytes, bytes]:
        """Lengths and places, u32 little-endian."""
        made = []
        for numbers in (self.lengths, self.places):
            told = array("I", numbers)
            if sys.byteorder == "big":
                told.byteswap()
            made.append(told.tobytes())
        return made[0], made[1]

    def segments(self) -> list[tuple[int, list[bytes]]]:
        """The namespace's id and the keys of each segment."""
        made: list[tuple[int, list[bytes]]] = []
        at = 0
        for length, place in zip(self.lengths, self.places, strict=True):
            made.append((self.namespaces[place], self.keys[at : at + length]))
            at += length
        return made


async def list_chains(store: Store, tier: TierId, budget_bytes: int = 0) -> ChainList:
    """What a tier holds, those chains first that were used last, as far as a number of bytes goes (0: all).

    Others have their turn meanwhile: what comes or goes during that may be in the list or not.
    """
    blocks = _blocks(store, tier)
    by_use: list[tuple[int, int, int]] = []
    for index, block in enumerate(blocks):
        # Of one use the end of the chain first: it brings all of it with it.
        by_use.append((-_used(store, block), -block.depth, index))
        if index % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
    by_use.sort()
    found = ChainList()
    places: dict[int, int] = {}
    listed: set[Block | SsdBlock] = set()
    for turn, (_, _, index) in enumerate(by_use):
        if turn % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        segment: list[Block | SsdBlock] = []
        at: Block | SsdBlock | None = blocks[index]
        while at is not None and at.parts and at not in listed:
            segment.append(at)
            listed.add(at)
            at = at.parent
        kept: list[bytes] = []
        for one in reversed(segment):
            home_bytes = _home_bytes(one)
            if budget_bytes and found.slot_bytes + home_bytes > budget_bytes:
                break
            found.slot_bytes += home_bytes
            kept.append(one.key)
        if kept:
            identity = _namespace_id(segment[0])
            place = places.setdefault(identity, len(places))
            if place == len(found.namespaces):
                found.namespaces.append(identity)
            found.keys += kept
            found.lengths.append(len(kept))
            found.places.append(place)
        if len(kept) < len(segment):
            break
    return found


def _blocks(store: Store, tier: TierId) -> Sequence[Block | SsdBlock]:
    if tier is TierId.DRAM:
        return [block for state in store.namespaces.by_id.values() for block in state.blocks.values()]
    return [] if store.ssd is None else list(store.ssd.blocks())


def _used(store: Store, block: Block | SsdBlock) -> int:
    if isinstance(block, SsdBlock):
        return block.used
    return store.policy.used(block) if block.parts and not block.retired else 0


def _home_bytes(block: Block | SsdBlock) -> int:
    """What a block takes in DRAM."""
    if isinstance(block, Block):
        return block.slot_bytes
    return sum(record.home_bytes for record in block.parts.values())


def _namespace_id(block: Block | SsdBlock) -> int:
    return block.namespace.state if isinstance(block, SsdBlock) else block.namespace.id
