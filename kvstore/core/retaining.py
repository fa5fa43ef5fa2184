"""What clients want to stay, or to leave: retentions given and ended, and what hints mean for eviction.

See ``kvstore.core.retention`` for the order in which blocks leave then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from kvstore.core.block import Block
from kvstore.core.events import Hinted, RetainWanted
from kvstore.core.instructions import Count, Instruction, Retained, Withdraw
from kvstore.core.namespaces import NamespaceState
from kvstore.core.retention import FOREVER_NS, NORMAL
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.state import StoreState
from kvstore.core.tree import descendants
from kvstore.core.watching import Cause

HINTED: Final = NORMAL + 1
"""Priority of blocks of which a hint says that they are needed soon."""


B = TypeVar("B", Block, SsdBlock)


class Retaining(StoreState):
    """What of the store concerns retention."""

    def _retain_wanted(self, event: RetainWanted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        if namespace is None or not namespace.current:
            return [Retained(0, 0)]
        expires_ns = self._now_ns + event.ttl_ns if event.ttl_ns else FOREVER_NS
        here: list[Block] = []
        for key in dict.fromkeys(event.keys):
            block = namespace.blocks.get(key)
            if block is not None and (not block.retired or self._call_back(block)):
                here.append(block)
            elif block is not None or self._is_below(namespace, key):
                self.retention.give(namespace, key, None, event.priority, expires_ns, drop=event.drop)
        # The last ones first: what is before a retained block is retained as high, and those may be lowered with it.
        for block in sorted(here, key=lambda block: -block.depth):
            priority, ends_ns = event.priority, expires_ns
            known = namespace.retained.get(block.key)
            if known is not None and known.holds and (priority < known.priority or ends_ns < known.expires_ns):
                for child in block.children or ():
                    below = namespace.retained.get(child.key)
                    if below is not None and below.holds:
                        priority, ends_ns = max(priority, below.priority), max(ends_ns, below.expires_ns)
            if event.drop:
                ends_ns = expires_ns
            self.retention.give(namespace, block.key, block, priority, ends_ns, drop=event.drop)
            if priority > NORMAL:
                self._retain_above(block, priority, ends_ns, hinted=False)
        self.retention.keep_budget(namespace)
        return [self._count_retained(namespace, event)]

    def _call_back(self, block: Block) -> bool:
        """Have a retired block stay, where its room is not promised; whether it does."""
        raise NotImplementedError

    def _count_retained(self, namespace: NamespaceState, event: RetainWanted) -> Retained:
        count = waiting = 0
        for key in dict.fromkeys(event.keys):
            found = namespace.retained.get(key)
            if found is None or (found.priority != event.priority and found.priority < max(event.priority, NORMAL + 1)):
                continue
            count += found.block is not None
            waiting += found.block is None
        return Retained(count, waiting)

    def _is_below(self, namespace: NamespaceState, key: bytes) -> bool:
        return namespace.ssd is not None and key in namespace.ssd.tree.blocks

    def _retain_above(self, block: Block, priority: int, expires_ns: int, *, hinted: bool) -> None:
        """What is before a retained block in DRAM is retained at least as high, and as long."""
        above = block.parent
        while above is not None and self.retention.raise_to(above, priority, expires_ns, hinted=hinted):
            above = above.parent

    def _retained_came(self, block: Block) -> None:
        """A block of a namespace with retentions is in DRAM: new, promoted, or called back."""
        namespace = block.namespace
        found = self.retention.back(block)
        for child in block.children or ():
            below = namespace.retained.get(child.key)
            if below is not None and below.holds:
                self.retention.raise_to(block, below.priority, below.expires_ns, hinted=below.hinted)
        found = namespace.retained.get(block.key)
        if found is not None and found.holds:
            self._retain_above(block, found.priority, found.expires_ns, hinted=found.hinted)
            self.retention.keep_budget(namespace)

    # -------------------------------------------------------------- ends

    def _end_retentions(self) -> list[Instruction]:
        """End those whose time is over; blocks that were to be removed then are."""
        slots: list[int] = []
        for retained in self.retention.expire(self._now_ns):
            namespace, key = retained.namespace, retained.key
            if namespace.retained.get(key) is not retained:
                # It was behind one that was removed just now.
                continue
            block = namespace.blocks.get(key)
            if block is not None and block.held:
                self.retention.put_off(retained, self._now_ns)
                continue
            self.retention.dropped_blocks += 1
            slots += self._remove_keys(namespace, [key], Cause.EXPIRED)[0]
        return [Withdraw(slots)] if slots else []

    def _remove_keys(self, namespace: NamespaceState, keys: Sequence[bytes], cause: Cause) -> tuple[list[int], int]:
        """Remove blocks from all tiers; what is behind them leaves first. Slots to be withdrawn, how many blocks."""
        slots: list[int] = []
        orphaned: list[Block] = []
        removed = 0
        for key in keys:
            below = self._remove_below(namespace, key, cause)
            block = namespace.blocks.get(key)
            if block is not None:
                orphaned += block.children or ()
                slots += self._unlink(block, cause)
            elif below:
                orphaned += namespace.orphans.get(key, ())
            if key in namespace.retained:
                self.retention.end(namespace.retained[key])
            removed += block is not None or below
        # Only now, because some of them were removed as well: a whole chain costs no more than its length.
        # What is retired is nobody's child, and no policy's.
        stay = [block for block in orphaned if block.parts and not block.retired]
        condemned = [below for block in stay for below in (block, *descendants(block))]
        if condemned:
            if namespace.retained:
                for block in condemned:
                    if block.key in namespace.retained:
                        self.retention.end(namespace.retained[block.key])
            self.policy.condemn(sorted(condemned, key=lambda block: block.depth))
        self.counters.removed_blocks += removed
        return slots, removed

    def _remove_below(self, namespace: NamespaceState, key: bytes, cause: Cause) -> bool:
        """Whether any of a block was stored on the SSD."""
        if self.ssd is None:
            return False
        if namespace.ssd is None:
            # What is on its way there, and left DRAM already, must not arrive.
            namespace.ended += 1
            return False
        return self.ssd.remove_key(namespace.ssd, key, cause)

    # -------------------------------------------------------------- hints

    def _hinted(self, event: Hinted) -> list[Instruction]:
        namespace = self.namespaces.by_id.get(event.namespace_id)
        if namespace is None:
            return [Count(0)]
        keys = list(event.keys)
        blocks = namespace.leading_in_tiers(keys)
        if event.soon:
            self._needed_soon(namespace, blocks, self._now_ns + event.ttl_ns)
        elif blocks:
            self._session_over(namespace, keys)
        return [Count(len(blocks))]

    def _needed_soon(self, namespace: NamespaceState, blocks: Sequence[Block | SsdBlock], expires_ns: int) -> None:
        for found in reversed(blocks):
            # Of one that is complete only below, DRAM may have a part all the same.
            block = namespace.blocks.get(found.key)
            if block is not None and (not block.retired or self._call_back(block)):
                if self.retention.raise_to(block, HINTED, expires_ns, hinted=True):
                    self._retain_above(block, HINTED, expires_ns, hinted=True)
            elif found.key not in namespace.retained:
                self.retention.give(namespace, found.key, None, HINTED, expires_ns, hinted=True)
        self.retention.keep_budget(namespace)

    def _session_over(self, namespace: NamespaceState, keys: Sequence[bytes]) -> None:
        """What only a session used that is over leaves first: the end of its chain that nothing else goes on behind."""
        chain = [block for key in keys if (block := namespace.blocks.get(key)) is not None and not block.retired]
        own = _own_end(chain)
        for block in own:
            found = namespace.retained.get(block.key)
            if found is not None and found.hinted:
                self.retention.end(found)
        if own:
            self.policy.condemn(own)
        if self.ssd is not None and namespace.ssd is not None:
            copies = namespace.ssd.tree.blocks
            own_below = _own_end([copies[key] for key in keys if key in copies])
            if own_below:
                self.ssd.policy.condemn(own_below)


def _own_end(chain: list[B]) -> list[B]:
    """The last blocks of a chain, parents first, behind which nothing but each other goes on."""
    own: list[B] = []
    for block in reversed(chain):
        behind = len(block.children or ())
        if behind > 1 or (behind and (not own or own[-1].parent is not block)):
            break
        own.append(block)
    own.reverse()
    return own
