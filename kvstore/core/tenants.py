"""Tenants with a quota: how much of one tier the blocks of all namespaces of one name may occupy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.core.block import Block, Record

NO_LIMIT: Final = 1 << 62


class Tenant:
    """One tenant in one tier.

    Attributes:
        name: of its namespaces.
        limit_bytes: slots that its blocks may occupy.
        slot_bytes: those that they do; on the SSD with those that are being written.
        granted_bytes: slots that are lent for blocks of it; they come on top.
        leased_bytes: of its slots, those that leases hold.
        clean, dirty: its retired blocks, see ``Retired``, in the order in which they leave.
        retired_bytes, clean_bytes: slots of all of these, and of clean ones.
        evicted_blocks: that left for its quota, since the start.
        refused_puts: records that its quota had no room for, since the start.
    """

    __slots__ = (
        "clean",
        "clean_bytes",
        "dirty",
        "evicted_blocks",
        "granted_bytes",
        "leased_bytes",
        "limit_bytes",
        "name",
        "refused_puts",
        "retired_bytes",
        "slot_bytes",
    )

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.slot_bytes = 0
        self.granted_bytes = 0
        self.leased_bytes = 0
        self.clean: dict[Block, None] = {}
        self.dirty: dict[Block, None] = {}
        self.retired_bytes = 0
        self.clean_bytes = 0
        self.evicted_blocks = 0
        self.refused_puts = 0

    def short_of(self, slot_bytes: int) -> bool:
        """Whether something of it must leave before so much more fits."""
        return self.slot_bytes + slot_bytes > self.limit_bytes

    def take_back(self, record: Record) -> None:
        """A record that was granted for it is so no more."""
        self.granted_bytes -= record.slot_bytes
        record.tenant = None

    def first_retired(self) -> Block | None:
        """Of its retired blocks the one that leaves first: a clean one, where there is one."""
        return next(iter(self.clean or self.dirty), None)


def tenants_of(quotas: Mapping[str, int]) -> dict[str, Tenant]:
    """Tenants by name, from their limits in bytes."""
    return {name: Tenant(name, limit_bytes) for name, limit_bytes in quotas.items()}
