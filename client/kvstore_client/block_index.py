"""Which blocks a daemon has, as its KV events tell: an index without I/O."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.protocol.kv_events import AllBlocksCleared, BlockEvent, BlockHash, BlockStored


class BlockIndex:
    """Complete blocks by namespace. Events change it; applying one twice changes nothing more.

    Attributes:
        namespaces: by the namespace's digest, the parent of each complete block by its key; None for the root's
            children. A parent may itself be absent: evicted, or never stored here.
    """

    def __init__(self) -> None:
        self.namespaces: dict[bytes, dict[BlockHash, BlockHash | None]] = {}

    def __len__(self) -> int:
        """Blocks of all namespaces."""
        return sum(map(len, self.namespaces.values()))

    def apply(self, events: Sequence[BlockEvent]) -> None:
        """Follow events in their order."""
        for event in events:
            if isinstance(event, BlockStored):
                blocks = self.namespaces.setdefault(event.namespace, {})
                parent = event.parent_block_hash
                for key in event.block_hashes:
                    blocks[key] = parent
                    parent = key
            elif isinstance(event, AllBlocksCleared):
                self.namespaces.clear()
            else:
                self._remove(event.namespace, event.block_hashes)

    def _remove(self, namespace: bytes, keys: Sequence[BlockHash]) -> None:
        blocks = self.namespaces.get(namespace)
        if blocks is None:
            return
        for key in keys:
            blocks.pop(key, None)
        if not blocks:
            del self.namespaces[namespace]

    def leading(self, namespace: bytes, keys: Sequence[BlockHash]) -> int:
        """How many of these keys, from the first one on, are there."""
        blocks = self.namespaces.get(namespace, {})
        for count, key in enumerate(keys):
            if key not in blocks:
                return count
        return len(keys)
