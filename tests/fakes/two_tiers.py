"""A small store over an SSD of which a test carries out every write."""

from __future__ import annotations

from collections.abc import Mapping

from fakes.small_store import PAGE_BYTES, SESSION, SmallStore, key_of
from fakes.ssd_twin import SsdTwin

from kvstore.core.block import Record
from kvstore.core.instructions import Refuse
from kvstore.core.invariants import validate_state
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.protocol.namespace import Namespace


class TwoTiers(SmallStore):
    """A small store over an SSD whose writes and groups a test carries out."""

    def __init__(
        self,
        capacity_pages: int = 8,
        grant_pages: int = 4,
        *,
        ssd_slabs: int = 16,
        ssd_records: int = 1000,
        parts: int = 1,
        records: int = 1 << 62,
        namespace: Namespace | None = None,
        quotas: Mapping[str, int] | None = None,
        ssd_quotas: Mapping[str, int] | None = None,
        retention_pages: int = 1 << 40,
    ) -> None:
        below = {name: pages * PAGE_BYTES for name, pages in (ssd_quotas or {}).items()}
        self.twin = SsdTwin(ssd_slabs, 4, ssd_records, below)
        super().__init__(
            capacity_pages,
            grant_pages,
            slabs=8,
            parts=parts,
            records=records,
            namespace=namespace,
            ssd=self.twin.ssd,
            quotas=quotas,
            retention_pages=retention_pages,
        )
        self.twin.attach(self.executor)

    def put(
        self, letters: str, *, at: str = "", access: int = 0, pages: int = 1, fidelity: int = 255
    ) -> list[tuple[PutStatus, Reason]]:
        """As that of the small store, as many at a time as may be granted."""
        statuses = []
        for begin in range(0, len(letters), 4):
            some = letters[begin : begin + 4]
            statuses += super().put(some, at=at, access=access, pages=pages, fidelity=fidelity)
            at = some[-1]
        return statuses

    def want(self, pages: int = 1, parent: str = "") -> Record | Refuse:
        parent_key = key_of(parent) if parent else b""
        return self.executor.want_slot(SESSION, pages * PAGE_BYTES - 1, 0, self.namespace.id, parent_key)

    def below(self) -> str:
        ssd = self.namespace.ssd
        return "" if ssd is None else "".join(sorted(key.rstrip(b"_").decode() for key in ssd.tree.blocks))

    def retired(self, *, clean: bool | None = None) -> str:
        found = self.store.retired.all().items()
        return "".join(sorted(b.key[:1].decode() for b, is_clean in found if clean is None or is_clean is clean))

    def settle(self) -> None:
        self.twin.settle()
        validate_state(self.store)
