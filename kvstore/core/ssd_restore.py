"""What a checkpoint says, and taking over what one and the logs behind it say."""

from __future__ import annotations

from kvstore.core.ssd_book import SsdBook
from kvstore.core.ssd_record import SsdBlock, SsdNamespace, SsdRecord, SsdState
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_log import NamespaceEntry, PutEntry


class SsdRestoring(SsdBook):
    """What of the SSD's state concerns checkpoints and recovery."""

    def put_entry(self, record: SsdRecord, access: int) -> PutEntry:
        """The log's entry of a record whose block was last used then."""
        return PutEntry(
            record.fidelity,
            record.codec,
            record.part,
            record.namespace.number,
            record.slot_bytes // PAGE_BYTES,
            record.token_count,
            record.home_bytes // PAGE_BYTES,
            record.slot,
            record.record_bytes,
            record.checksum,
            access,
            record.key,
            record.parent_key,
        )

    def snapshot(self) -> tuple[list[NamespaceEntry], list[tuple[SsdRecord, int]]]:
        """Everything that a checkpoint says: namespaces as the log has them, stored records with their last uses.

        A later generation that the log does not have durably would be taken for that of earlier records in it.
        """
        namespaces = [
            NamespaceEntry(namespace.number, namespace.logged_generation, namespace.description)
            for namespace in self.namespaces.values()
            if namespace.logged_generation >= 0
        ]
        records = [
            (record, block.used)
            for namespace in self.namespaces.values()
            for block in namespace.tree.blocks.values()
            for record in block.parts.values()
        ]
        records.sort(key=lambda pair: pair[1])
        return namespaces, records

    def restore(self, namespaces: list[NamespaceEntry], puts: list[PutEntry]) -> int:
        """Take over what a log and its checkpoint say, oldest use first; how many records.

        Records that contradict others leave: of two blocks of a key the one that was used later stays, of two
        namespaces of a description the later one. A namespace of which nothing is left is not taken over.

        Precondition: empty, all slabs usable that hold slots, ``puts`` agree with each other about slots.
        """
        known = {entry.namespace: self._restored(entry) for entry in namespaces}
        latest = {namespace.description: number for number, namespace in sorted(known.items())}
        self.slabs.restore((put.slot, put.slot_pages * PAGE_BYTES) for put in puts)
        found: dict[SsdNamespace, dict[bytes, SsdBlock]] = {}
        for put in puts:
            namespace = known[put.namespace]
            record = self._restored_record(namespace, put)
            if latest[namespace.description] != put.namespace:
                self._leave(record)
                continue
            blocks = found.setdefault(namespace, {})
            block = blocks.get(put.key)
            if block is None or block.parent_key != put.parent_key:
                if block is not None:
                    self._let_all_leave(block)
                block = blocks[put.key] = SsdBlock(namespace, put.key, put.parent_key)
            block.used = put.access
            block.parts[put.part] = record
            self._count(block, record, 1)
        for namespace, blocks in found.items():
            for block in namespace.tree.fill(list(blocks.values())):
                del blocks[block.key]
                self._let_all_leave(block)
            self.block_count += len(blocks)
        stored = [block for blocks in found.values() for block in blocks.values()]
        for block in sorted(stored, key=lambda block: (block.used, block.depth)):
            self.policy.insert(block, block.used)
        for number in latest.values():
            namespace = known[number]
            if namespace.tree.blocks or namespace.generation:
                self.namespaces[number] = namespace
        self.access = max((put.access for put in puts), default=0)
        return self.record_count

    def _restored(self, entry: NamespaceEntry) -> SsdNamespace:
        namespace = SsdNamespace(entry.namespace, entry.description, entry.generation, self.tenants)
        namespace.told = True
        namespace.logged_generation = entry.generation
        self._last_number = max(self._last_number, entry.namespace)
        return namespace

    def _restored_record(self, namespace: SsdNamespace, put: PutEntry) -> SsdRecord:
        record = SsdRecord(namespace, put.key, put.parent_key, put.part)
        record.slot, record.slot_bytes = put.slot, put.slot_pages * PAGE_BYTES
        record.home_bytes = put.home_pages * PAGE_BYTES
        record.record_bytes, record.checksum = put.record_bytes, put.checksum
        record.codec, record.fidelity, record.token_count = put.codec, put.fidelity, put.token_count
        record.logged = True
        record.state = SsdState.STORED
        self.records[put.slot] = record
        return record
