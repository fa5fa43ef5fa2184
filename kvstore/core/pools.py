"""One eviction policy for each tenant with a quota, and one for all others: together the policy of a tier.

A tenant at its limit has its own blocks leave (``victim_of``). Where the tier is full, each policy offers a block and
the one whose last use is the oldest leaves, as if there were one policy: with LRU it is the very block that one LRU
would choose. A prefix never crosses namespaces, so no policy sees a parent or a child that another one holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from kvstore.core.tenants import Tenant
from kvstore.policy.base import Evictable, EvictionPolicy, PolicyContext, following

if TYPE_CHECKING:
    from kvstore.core.block import Block
    from kvstore.core.ssd_record import SsdBlock


class Pools:
    """An ``EvictionPolicy`` of several. A victim costs one of each of them; anything else one call more.

    Args:
        make: makes a policy.
        context: of the whole tier; a tenant's policy gets its limit as capacity.
        tenants: those with a quota in the tier.
    """

    def __init__(
        self, make: Callable[[PolicyContext], EvictionPolicy], context: PolicyContext, tenants: Iterable[Tenant]
    ) -> None:
        self._by_tenant: dict[Tenant | None, EvictionPolicy] = {None: make(context)}
        for tenant in tenants:
            self._by_tenant[tenant] = make(PolicyContext(tenant.limit_bytes, context.clock))
        self._all = list(self._by_tenant.values())

    @property
    def name(self) -> str:
        """See ``EvictionPolicy``."""
        return self._all[0].name

    @property
    def following(self) -> str:
        """See ``Choosing``: the order that the policy of those without a quota follows."""
        return following(self._all[0])

    def _of(self, block: Evictable) -> EvictionPolicy:
        return self._by_tenant[cast("Block | SsdBlock", block).namespace.tenant]

    def insert(self, block: Evictable, access: int) -> None:
        """See ``EvictionPolicy``."""
        self._of(block).insert(block, access)

    def touch(self, deepest: Evictable, hits: int, access: int) -> None:
        """See ``EvictionPolicy``."""
        self._of(deepest).touch(deepest, hits, access)

    def discard(self, block: Evictable, *, evicted: bool = False) -> None:
        """See ``EvictionPolicy``."""
        self._of(block).discard(block, evicted=evicted)

    def resized(self, block: Evictable, before_bytes: int) -> None:
        """See ``EvictionPolicy``."""
        self._of(block).resized(block, before_bytes)

    def condemn(self, blocks: Sequence[Evictable]) -> None:
        """See ``EvictionPolicy``. Of the same order as the policies' own condemned blocks, tenant by tenant."""
        by_policy: dict[int, list[Evictable]] = {}
        for block in blocks:
            by_policy.setdefault(id(self._of(block)), []).append(block)
        for policy in self._all:
            some = by_policy.get(id(policy))
            if some:
                policy.condemn(some)

    def released(self, block: Evictable) -> None:
        """See ``EvictionPolicy``."""
        self._of(block).released(block)

    def next_victim(self, before: int | None = None) -> Evictable | None:
        """See ``EvictionPolicy``. Of the blocks that the policies offer the one that was used least recently."""
        oldest: Evictable | None = None
        oldest_used = 0
        for policy in self._all:
            offered = policy.next_victim(before)
            if offered is not None:
                used = policy.used(offered)
                if oldest is None or used < oldest_used:
                    oldest, oldest_used = offered, used
        return oldest

    def victim_of(self, tenant: Tenant, before: int | None = None) -> Evictable | None:
        """The block of one tenant to evict next, as ``next_victim``."""
        return self._by_tenant[tenant].next_victim(before)

    def used(self, block: Evictable) -> int:
        """See ``EvictionPolicy``."""
        return self._of(block).used(block)

    def held(self) -> int:
        """See ``EvictionPolicy``."""
        return sum(policy.held() for policy in self._all)

    def ghost_bytes(self) -> int:
        """See ``EvictionPolicy``."""
        return sum(policy.ghost_bytes() for policy in self._all)


def pooled(
    make: Callable[[PolicyContext], EvictionPolicy], context: PolicyContext, tenants: Iterable[Tenant]
) -> EvictionPolicy:
    """The policy of a tier: a plain one where no tenant has a quota, so that it costs nobody anything."""
    some = list(tenants)
    return Pools(make, context, some) if some else make(context)
