"""Which complete blocks the world outside was told of, and what has changed since: the source of KV events.

Covers: complete blocks come and go (``Store`` notes each change), changes in their order and a bounded number at a
time (``drain``), all blocks that were told, a page at a time (``page``). Does not cover: how they are told, which is
``kvstore.server.events``.

A change that is undone before anybody is told of it leaves no trace: what waits is never more than the blocks that
are resident and those that were told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.core.block import Block

UNTOLD = -1
"""``Block.told`` of a block that nobody was told of."""


class Change(Enum):
    """What became of a block."""

    STORED = 1
    REMOVED = 2
    CLEARED = 3


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One change. ``block`` is None for ``CLEARED``: all blocks that were told before are gone."""

    change: Change
    block: Block | None


class Journal:
    """Complete blocks, as they were told.

    Args:
        wake: called when a change begins to wait and none did before; must not raise. None: nobody waits.
    """

    def __init__(self, wake: Callable[[], None] | None = None) -> None:
        self.wake = wake
        self._waiting: dict[Block, None] = {}
        self._told: list[Block | None] = []
        self._free: list[int] = []
        self._emptied = False

    def __len__(self) -> int:
        """Blocks that were told."""
        return len(self._told) - len(self._free)

    @property
    def waiting(self) -> int:
        """Changes that ``drain`` would give."""
        return len(self._waiting)

    def note(self, block: Block) -> None:
        """A block's parts have changed."""
        waiting = self._waiting
        if block.complete == (block.told != UNTOLD):
            waiting.pop(block, None)
        elif block not in waiting:
            waiting[block] = None
            if len(waiting) == 1 and self.wake is not None:
                self.wake()

    def emptied(self) -> None:
        """The store was cleared, and no block is left."""
        self._emptied = True

    def drain(self, count: int) -> list[JournalEntry]:
        """Up to ``count`` changes, oldest first; from now on they count as told.

        Blocks that became complete while their parents were not yet come before them.
        """
        entries: list[JournalEntry] = []
        if self._emptied:
            self._emptied = False
            gone = [block for block in self._waiting if block.told != UNTOLD]
            if gone and len(gone) == len(self):
                for block in gone:
                    block.told = UNTOLD
                    del self._waiting[block]
                self._told, self._free = [], []
                entries.append(JournalEntry(Change.CLEARED, None))
        for block in self._first(count - len(entries)):
            del self._waiting[block]
            if block.told == UNTOLD:
                self._add(block)
                entries.append(JournalEntry(Change.STORED, block))
            else:
                self._told[block.told] = None
                self._free.append(block.told)
                block.told = UNTOLD
                entries.append(JournalEntry(Change.REMOVED, block))
        return entries

    def _first(self, count: int) -> list[Block]:
        return [block for block, _ in zip(self._waiting, range(count), strict=False)]

    def _add(self, block: Block) -> None:
        if self._free:
            block.told = self._free.pop()
            self._told[block.told] = block
        else:
            block.told = len(self._told)
            self._told.append(block)

    def page(self, cursor: int, count: int) -> tuple[list[Block], int | None]:
        """Some of the blocks that were told, and the cursor of the next page, None behind the last one.

        A block keeps its place as long as it is told of. So whoever reads page after page sees each block that was
        there all the time, and of the others learns by ``drain``.

        Args:
            cursor: 0, or what the page before gave. Places from 0 on; any number is allowed.
            count: places to look at.
        """
        begin = max(cursor, 0)
        end = begin + count
        blocks = [block for block in self._told[begin:end] if block is not None]
        return blocks, end if end < len(self._told) else None

    def told(self) -> list[Block]:
        """All blocks that were told; O(blocks)."""
        return [block for block in self._told if block is not None]

    def waiting_blocks(self) -> list[Block]:
        """Blocks whose change waits, oldest first; O(changes)."""
        return list(self._waiting)
