"""What becomes of blocks that were brought up ahead of their use: used, or gone before anybody asked for them."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.core.block import Block
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.watching import Cause


class Prefetched:
    """A watcher of the store. Knows at most the blocks that are in DRAM, unused since they came.

    Attributes:
        blocks, bytes: brought up ahead, and their slots.
        used_blocks, used_bytes: of those, used before they left.
        left_blocks, left_bytes: of those, evicted before anybody used them.
    """

    def __init__(self) -> None:
        self._unused: set[Block] = set()
        self.blocks = 0
        self.bytes = 0
        self.used_blocks = 0
        self.used_bytes = 0
        self.left_blocks = 0
        self.left_bytes = 0

    @property
    def unused_blocks(self) -> int:
        """In DRAM and not used yet."""
        return len(self._unused)

    def brought(self, block: Block) -> None:
        """A block came up, with all of its parts or one more; nobody waited for it."""
        if block not in self._unused:
            self._unused.add(block)
            self.blocks += 1
            self.bytes += block.slot_bytes

    def accessed(
        self,
        namespace_id: int,
        access: int,
        runs: Sequence[tuple[Block | SsdBlock, int]],
        asked: int,
        missing: Sequence[bytes],
    ) -> None:
        """See ``Watcher``. Costs nothing while all that came up was used."""
        unused = self._unused
        for deepest, hits in runs if unused else ():
            if not isinstance(deepest, Block):
                continue
            block: Block | None = deepest
            while hits and block is not None:
                if block in unused:
                    unused.discard(block)
                    self.used_blocks += 1
                    self.used_bytes += block.slot_bytes
                    if not unused:
                        return
                block = block.parent
                hits -= 1

    def stored(self, block: Block, access: int, *, promoted: bool) -> None:
        """See ``Watcher``."""

    def left(self, block: Block, cause: Cause) -> None:
        """See ``Watcher``."""
        if block in self._unused:
            self._unused.discard(block)
            if cause is Cause.EVICTED:
                self.left_blocks += 1
                self.left_bytes += block.slot_bytes
