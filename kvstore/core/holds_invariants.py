"""What must hold between two events of all that keeps blocks, or has them leave: leases, retentions, quotas."""

from __future__ import annotations

from collections import Counter

from kvstore.core.block import Block, RecordState
from kvstore.core.retention import NORMAL
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.store import Store
from kvstore.core.tenants import Tenant
from kvstore.errors import InvariantViolation


def require(condition: bool, message: str) -> None:
    """Raises: InvariantViolation: it is not so."""
    if not condition:
        raise InvariantViolation(message)


def check_holds(store: Store) -> None:
    """Leases and retentions: every block is marked as often as it is held, and the limits are kept."""
    leases = store.leases
    held: Counter[Block | SsdBlock] = Counter()
    for lease in leases.all():
        require(lease.session in store.sessions, f"lease {lease.id} belongs to no session")
        held.update(lease.blocks)
    for parent, children in leases.parents().items():
        held[parent] += 1
        found = sum(child.held > 0 for child in parent.children or ())
        name = parent.key.hex()[:12]
        require(bool(parent.parts) and found == children > 0, f"{name} is held for {children} children, not {found}")
    require(all(block.held == count for block, count in held.items()), "blocks that leases hold are miscounted")
    held_bytes = sum(block.slot_bytes for block in held if isinstance(block, Block))
    require(held_bytes == leases.held_bytes, f"leases hold {held_bytes} bytes, accounted are {leases.held_bytes}")
    require(held_bytes <= leases.limit_bytes, f"leases hold {held_bytes} bytes, over the limit")
    require(leases.ssd_held_bytes <= leases.ssd_limit_bytes, "leases hold more of the SSD than they may")
    for block in held:
        above = block.parent
        # On the SSD a copy of the parent may come later: with a child it does not leave, held or not.
        there = above is None or above in held or isinstance(block, SsdBlock)
        require(there, f"{block.key.hex()[:12]} is leased and its parent is not")
    retained = _check_retention(store)
    for namespace in store.namespaces.by_id.values():
        for here in namespace.blocks.values():
            marks = held[here] + (here in retained)
            require(here.leases == marks, f"block {here.key.hex()[:12]} counts {here.leases} leases, not {marks}")
            require(here.held == held[here], f"block {here.key.hex()[:12]} counts {here.held} leases")
        for copy in () if namespace.ssd is None else namespace.ssd.tree.blocks.values():
            require(copy.leases == held[copy], f"SSD block {copy.key.hex()[:12]} counts {copy.leases} leases")


def _check_retention(store: Store) -> set[Block]:
    """The blocks that are retained."""
    retention = store.retention
    count = low = waiting = 0
    retained: set[Block] = set()
    of_tenant: Counter[Tenant | None] = Counter()
    queued = retention.queued()
    for namespace in store.namespaces.by_id.values():
        for key, one in namespace.retained.items():
            name = key.hex()[:12]
            count += 1
            require(one.namespace is namespace and one.key == key, f"the retention of {name} is filed wrongly")
            require(one.priority != NORMAL or one.drop, f"{name} has a retention that means nothing")
            block = one.block
            if block is None:
                waiting += 1
                there = namespace.blocks.get(key)
                require(there is None or there.retired, f"{name} is here and its retention is not in force")
                continue
            require(namespace.blocks.get(key) is block and not block.retired, f"{name} is retained and gone")
            low += one.priority < NORMAL
            if one.priority > NORMAL:
                retained.add(block)
                of_tenant[namespace.tenant] += block.slot_bytes
                above = block.parent
                known = None if above is None else namespace.retained.get(above.key)
                stays = above is None or (known is not None and known.holds and known.priority >= one.priority)
                require(stays, f"{name} is retained and its parent is not")
            can = not block.children and block.leases == (one.priority > NORMAL) and one.priority != NORMAL
            require(not can or one in queued, f"{name} may leave and does not stand in the queue")
    require(count == len(retention), f"{len(retention)} retentions counted, {count} found")
    require(low == retention.low_blocks, "blocks of low priority are miscounted")
    require(waiting == retention.waiting_blocks, "retentions of blocks elsewhere are miscounted")
    held_bytes = sum(of_tenant.values())
    counted = (retention.held_bytes, retention.held_blocks)
    require((held_bytes, len(retained)) == counted, "retained blocks are miscounted")
    require(held_bytes <= retention.budget_bytes, f"{held_bytes} bytes are retained, over the budget")
    for tenant, (tenant_bytes, budget_bytes) in retention.shares().items():
        name = "of no tenant" if tenant is None else f"of tenant {tenant.name}"
        require(of_tenant[tenant] == tenant_bytes, f"retained blocks {name} are miscounted")
        require(tenant_bytes <= budget_bytes, f"{tenant_bytes} bytes {name} are retained, over its budget")
    return retained


def check_tenants(store: Store) -> None:
    """Quotas: what tenants occupy is what is counted for them, and no more than they may."""
    slot_bytes: Counter[Tenant | None] = Counter()
    for namespace in store.namespaces.by_id.values():
        expected = store.tenants.get(namespace.description.name)
        require(namespace.tenant is expected, f"namespace {namespace.id} is of the wrong tenant")
        slot_bytes[namespace.tenant] += namespace.slot_bytes
    granted: Counter[Tenant | None] = Counter()
    for record in store.records.values():
        require(record.tenant is None or record.state is RecordState.GRANTED, f"slot {record.slot} is counted twice")
        granted[record.tenant] += record.slot_bytes
    retired: Counter[Tenant | None] = Counter()
    clean: Counter[Tenant | None] = Counter()
    for block, is_clean in store.retired.all().items():
        tenant = block.namespace.tenant
        retired[tenant] += block.slot_bytes
        clean[tenant] += is_clean * block.slot_bytes
        require(
            tenant is None or block in (tenant.clean if is_clean else tenant.dirty), "a tenant's queue lacks a block"
        )
    leased: Counter[Tenant | None] = Counter()
    for namespace in store.namespaces.by_id.values():
        leased[namespace.tenant] += sum(block.slot_bytes for block in namespace.blocks.values() if block.held)
    for tenant in store.tenants.values():
        require(tenant.leased_bytes == leased[tenant], f"leased blocks of tenant {tenant.name} are miscounted")
        found = (slot_bytes[tenant], granted[tenant], retired[tenant], clean[tenant])
        counted = (tenant.slot_bytes, tenant.granted_bytes, tenant.retired_bytes, tenant.clean_bytes)
        require(found == counted, f"of tenant {tenant.name} are counted {counted}, found {found}")
        require(
            tenant.slot_bytes <= tenant.limit_bytes,
            f"tenant {tenant.name} has {tenant.slot_bytes} bytes, over its quota",
        )
    if store.ssd is not None:
        for tenant in store.ssd.tenants.values():
            spaces = [space for space in store.ssd.namespaces.values() if space.tenant is tenant]
            writing = sum(record.slot_bytes for space in spaces for record in space.writing.values())
            below = sum(space.slot_bytes for space in spaces) + writing
            require(below == tenant.slot_bytes, f"tenant {tenant.name} has {below} bytes on the SSD, counted otherwise")
            require(below <= tenant.limit_bytes, f"tenant {tenant.name} has {below} bytes on the SSD, over its quota")
