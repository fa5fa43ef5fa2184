"""From changes to batches, and the batches that can be had again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from kvstore.core.block import Block
from kvstore.core.journal import Change, JournalEntry
from kvstore.core.namespaces import NamespaceState
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.kv_events import AllBlocksCleared, BlockEvent, BlockHash, BlockRemoved, BlockStored

RING_BYTES: Final = 128 << 20
"""Most bytes of payloads that are kept for replays, whatever their number."""


def stored_events(blocks: Iterable[Block], incarnation: int) -> list[BlockEvent]:
    """One event for each run of blocks of which each is the child of the one before."""
    events: list[BlockEvent] = []
    keys: list[BlockHash] = []
    namespace: NamespaceState | None = None
    last = b""
    for block in blocks:
        if block.namespace is namespace and block.parent_key == last:
            keys.append(block.key)
        else:
            namespace = block.namespace
            keys = [block.key]
            events.append(
                BlockStored(
                    keys,
                    None if block.parent_key == ROOT_KEY else block.parent_key,
                    block_size=namespace.description.block_tokens,
                    namespace=namespace.digest,
                    incarnation=incarnation,
                )
            )
        last = block.key
    return events


def events_of(entries: Sequence[JournalEntry], incarnation: int) -> list[BlockEvent]:
    """Events of some changes, in their order, with neighbours of one kind together."""
    events: list[BlockEvent] = []
    stored: list[Block] = []
    removed: list[BlockHash] = []
    namespace: NamespaceState | None = None
    for entry in entries:
        block = entry.block
        if stored and entry.change is not Change.STORED:
            events += stored_events(stored, incarnation)
            stored = []
        if block is None:
            events.append(AllBlocksCleared(incarnation))
            namespace = None
        elif entry.change is Change.STORED:
            stored.append(block)
            namespace = None
        elif block.namespace is namespace:
            removed.append(block.key)
        else:
            namespace, removed = block.namespace, [block.key]
            events.append(BlockRemoved(removed, namespace=namespace.digest, incarnation=incarnation))
    return events + stored_events(stored, incarnation)


class BatchRing:
    """The last batches, by sequence number. Of those without events only their numbers are known.

    Args:
        steps: most batches with events that are kept.
        most_bytes: of their payloads; the newest one is always kept.
        idle: payload of a batch without events.
        first_sequence: number of the first batch.
        most_bytes: of payloads that are kept; the newest batch is always kept.
    """

    def __init__(self, steps: int, idle: bytes, first_sequence: int = 0, most_bytes: int = RING_BYTES) -> None:
        self._steps = steps
        self._most_bytes = most_bytes
        self.idle = idle
        self._batches: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._complete_from = first_sequence
        self.next_sequence = first_sequence

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def kept_bytes(self) -> int:
        """Of all payloads together."""
        return self._bytes

    def append(self, payload: bytes) -> int:
        """Keep a batch; its number."""
        sequence = self.next_sequence
        self.next_sequence += 1
        self._batches.append((sequence, payload))
        self._bytes += len(payload)
        while len(self._batches) > self._steps or (self._bytes > self._most_bytes and len(self._batches) > 1):
            gone, dropped = self._batches.popleft()
            self._bytes -= len(dropped)
            self._complete_from = gone + 1
        return sequence

    def append_idle(self) -> int:
        """The number of a batch without events."""
        sequence = self.next_sequence
        self.next_sequence += 1
        return sequence

    def lose(self) -> None:
        """A batch could not be made: its number is missing for ever, so that nobody believes to know everything."""
        self._complete_from = self.next_sequence = self.next_sequence + 1
        self._batches.clear()
        self._bytes = 0

    def since(self, sequence: int) -> list[tuple[int, bytes]]:
        """Number and payload of the batches from ``sequence`` on that are still there.

        Where nothing was lost the first one has that number; of later batches without events none is given.
        """
        found = list(islice(self._batches, self._position(sequence), None))
        lost = sequence < self._complete_from or sequence >= self.next_sequence
        if not lost and (not found or found[0][0] != sequence):
            found.insert(0, (sequence, self.idle))
        return found

    def _position(self, sequence: int) -> int:
        low, high = 0, len(self._batches)
        while low < high:
            middle = (low + high) // 2
            if self._batches[middle][0] < sequence:
                low = middle + 1
            else:
                high = middle
        return low
