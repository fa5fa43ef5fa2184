"""Complete blocks as somebody knows them who is told of changes alone."""

from __future__ import annotations

from kvstore.core.journal import Change
from kvstore.core.store import Store

Told = tuple[int, bytes]
"""A block: namespace id and key."""


class ToldIndex:
    """An index that follows a store's journal and nothing else.

    Attributes:
        blocks: parent key of each complete block, as far as it was told.
    """

    def __init__(self) -> None:
        self.blocks: dict[Told, bytes] = {}

    def follow(self, store: Store, count: int) -> int:
        """Take up to so many changes; each must be one. How many they were."""
        assert store.journal is not None
        entries = store.journal.drain(count)
        assert len(entries) <= count
        for entry in entries:
            if entry.change is Change.CLEARED:
                assert self.blocks, "nothing was told, and all of it is gone"
                assert entry is entries[0]
                self.blocks.clear()
                continue
            assert entry.block is not None
            told = (entry.block.namespace.id, entry.block.key)
            if entry.change is Change.STORED:
                assert told not in self.blocks, "a block is told of twice"
                self.blocks[told] = entry.block.parent_key
            else:
                assert self.blocks.pop(told) == entry.block.parent_key
        return len(entries)

    def check(self, store: Store) -> None:
        """What was told, and what waits to be, are the complete blocks of the store."""
        assert store.journal is not None
        expected = complete_blocks(store)
        waiting = store.journal.waiting_blocks()
        known = dict(self.blocks)
        for block in waiting:
            told = (block.namespace.id, block.key)
            if block.complete:
                known[told] = block.parent_key
            else:
                del known[told]
        assert known == expected
        assert len(self.blocks) == len(store.journal)

    def read_page(self, store: Store, cursor: int, count: int) -> int | None:
        """One page: only what was told, at most so much; the next cursor."""
        assert store.journal is not None
        blocks, following = store.journal.page(cursor, count)
        assert len(blocks) <= count
        for block in blocks:
            assert self.blocks[block.namespace.id, block.key] == block.parent_key
        return following

    def read_all(self, store: Store, count: int) -> dict[Told, bytes]:
        """All pages."""
        assert store.journal is not None
        found: dict[Told, bytes] = {}
        cursor: int | None = 0
        while cursor is not None:
            blocks, cursor = store.journal.page(cursor, count)
            found |= {(block.namespace.id, block.key): block.parent_key for block in blocks}
        return found


def complete_blocks(store: Store) -> dict[Told, bytes]:
    """Parent keys of the blocks that a match would count."""
    return {
        (namespace.id, key): block.parent_key
        for namespace in store.namespaces.by_id.values()
        for key, block in namespace.blocks.items()
        if namespace.leading([key])
    }
