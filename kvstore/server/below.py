"""What requests want of the tier below DRAM: blocks brought up, made durable, foretold; and whether a load pays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from kvstore.core.block import Block
from kvstore.core.events import PersistWanted
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_record import SsdBlock
from kvstore.protocol.messages import PutStatus, Reason, TierId
from kvstore.server.executor import Executor
from kvstore.server.ssd import SsdTier

_ANSWER_SHARE: Final = 0.9
"""Of a request's time, after which it is answered whatever is missing."""

_NO_DEADLINE_S: Final = 5.0
_PREFETCH_S: Final = 30.0
_PREFETCH_SHARE: Final = 4
"""What is brought up ahead of one request is at most this part of the DRAM tier."""

_AT_ONCE_SHARE: Final = 2
"""What is brought up for one request is at most this part of it: the last must not push out the first."""


class Below:
    """The tiers below DRAM as requests see them.

    Args:
        tier: the SSD tier.
        executor: of the store.
        clock: nanoseconds, monotonic.
    """

    def __init__(self, tier: SsdTier, executor: Executor, clock: Callable[[], int]) -> None:
        self.tier = tier
        self._executor = executor
        self._store = executor.store
        self._clock = clock
        self._prefetches: set[asyncio.Task[None]] = set()

    def deadline_ns(self, timeout_ms: int) -> int:
        """When a request that waits so long must be answered."""
        seconds = timeout_ms / 1000 if timeout_ms else _NO_DEADLINE_S
        return self._clock() + int(seconds * _ANSWER_SHARE * 1e9)

    # -------------------------------------------------------------- bringing up

    def lacking(self, namespace: NamespaceState | None, keys: Iterable[bytes], part: int = -1) -> list[SsdBlock]:
        """Blocks of which DRAM lacks something (of one part, or of any) that the SSD has."""
        below = None if namespace is None else namespace.ssd
        if namespace is None or below is None or not below.tree.blocks:
            return []
        found: list[SsdBlock] = []
        for key in keys:
            copy = below.tree.blocks.get(key)
            if copy is None:
                continue
            block = namespace.blocks.get(key)
            above = () if block is None else block.parts
            if (part < 0 and any(number not in above for number in copy.parts)) or (
                part in copy.parts and part not in above
            ):
                found.append(copy)
        return found

    async def promote(self, namespace: NamespaceState, blocks: Sequence[SsdBlock], deadline_ns: int) -> None:
        """Bring blocks up, as many as there may be at once; ends when that is done, or cannot be, or time is over."""
        before = self.tier.promotions.blocks
        await self.tier.promotions.promote(namespace, self._leading(blocks, _AT_ONCE_SHARE), deadline_ns)
        self.tier.hits += self.tier.promotions.blocks - before

    def prefetch(self, namespace: NamespaceState, blocks: Sequence[SsdBlock]) -> None:
        """Begin to bring blocks up, as many as a share of DRAM takes."""
        some = self._leading(blocks, _PREFETCH_SHARE)
        if some:
            task = asyncio.ensure_future(self.promote(namespace, some, self._clock() + int(_PREFETCH_S * 1e9)))
            self._prefetches.add(task)
            task.add_done_callback(self._prefetches.discard)

    def _leading(self, blocks: Sequence[SsdBlock], share: int) -> Sequence[SsdBlock]:
        """The first blocks, at least one, up to a part of the DRAM tier."""
        room = self._store.limits.capacity_bytes // share
        for index, block in enumerate(blocks):
            room -= sum(record.home_bytes for record in block.parts.values())
            if room < 0:
                return blocks[: max(index, 1)]
        return blocks

    def worth_loading(self, blocks: list[Block | SsdBlock]) -> list[Block | SsdBlock]:
        """Leading blocks without those that take longer to load than to compute anew."""
        rate = self.tier.settings.prefill_tokens_per_s
        bytes_per_s = self.tier.promotions.bytes_per_s
        first = next((index for index, block in enumerate(blocks) if isinstance(block, SsdBlock)), len(blocks))
        if not rate or not bytes_per_s or first == len(blocks):
            return blocks
        lower = [block for block in blocks[first:] if isinstance(block, SsdBlock)]
        tokens = len(lower) * lower[0].namespace.block_tokens
        slot_bytes = sum(block.slot_bytes for block in lower)
        if not tokens or slot_bytes / bytes_per_s <= tokens / rate:
            return blocks
        self.tier.refused_loads += len(lower)
        return blocks[:first]

    # -------------------------------------------------------------- durability

    @property
    def unsaid(self) -> bool:
        """Whether something ended that the log does not say durably yet."""
        return self.tier.ssd.something_to_log or self.tier.ssd.synced < self.tier.ssd.position

    async def said(self, deadline_ns: int) -> bool:
        """Wait until the log says durably what ended until now; False where that failed."""
        position = self.tier.ssd.position
        try:
            return await asyncio.wait_for(
                self.tier.groups.wait(position), max((deadline_ns - self._clock()) / 1e9, 0.001)
            )
        except TimeoutError:
            return False

    async def persist(self, namespace_id: int, keys: list[bytes], deadline_ns: int) -> tuple[bytes, bytes]:
        """Make blocks and their ancestors durable; a status and a reason for each."""
        while True:
            left = self._undurable(namespace_id, keys)
            if not any(left) or self.tier.state != "ok" or self._clock() >= deadline_ns:
                break
            wanted = [key for key, missing in zip(keys, left, strict=True) if missing]
            self._executor.apply(PersistWanted(namespace_id, wanted))
            self.tier.groups.hurry()
            await self.tier.groups.next_group(max((deadline_ns - self._clock()) / 1e9, 0.001))
        namespace = self._store.namespaces.by_id.get(namespace_id)
        statuses, reasons = bytearray(), bytearray()
        for key, missing in zip(keys, left, strict=True):
            known = namespace is not None and (
                key in namespace.blocks or (namespace.ssd is not None and key in namespace.ssd.tree.blocks)
            )
            if not known:
                status, reason = PutStatus.REJECTED, Reason.MISSING
            elif not missing:
                status, reason = PutStatus.STORED, Reason.NONE
            elif self.tier.state != "ok":
                status, reason = PutStatus.REJECTED, Reason.NOT_DURABLE
            else:
                status, reason = PutStatus.THROTTLED, Reason.DEMOTING
            statuses.append(status)
            reasons.append(reason)
        return bytes(statuses), bytes(reasons)

    def _undurable(self, namespace_id: int, keys: list[bytes]) -> list[bool]:
        """For each key whether something of its block, or of those before it, is in DRAM only."""
        namespace = self._store.namespaces.by_id.get(namespace_id)
        if namespace is None or not namespace.current:
            return [False] * len(keys)
        known: dict[bytes, bool] = {}
        for key in keys:
            path: list[bytes] = []
            missing = False
            for at, block in namespace.upward(key):
                if at in known:
                    missing = known[at]
                    break
                path.append(at)
                # Blocks whose copies are below may name each other as parents: a circle ends here.
                known[at] = False
                if block is not None and self._store.missing_below(block):
                    missing = True
                    break
            known.update(dict.fromkeys(path, missing))
        return [known.get(key, False) for key in keys]

    async def stop(self) -> None:
        """Bring nothing more up ahead."""
        for task in list(self._prefetches):
            task.cancel()
        if self._prefetches:
            await asyncio.wait(self._prefetches, timeout=1.0)


def tiers_of(blocks: Sequence[Block | SsdBlock]) -> tuple[tuple[int, int], ...]:
    """Runs of (tier, count) of blocks."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        tier = int(TierId.SSD if isinstance(block, SsdBlock) else TierId.DRAM)
        if runs and runs[-1][0] == tier:
            runs[-1] = (tier, runs[-1][1] + 1)
        else:
            runs.append((tier, 1))
    return tuple(runs)


def deepest_of(blocks: Sequence[Block | SsdBlock]) -> list[tuple[Block | SsdBlock, int]]:
    """A chain's hits as runs: up to the deepest block in DRAM, and up to the deepest block below."""
    runs: list[tuple[Block | SsdBlock, int]] = []
    for kind in (Block, SsdBlock):
        for index in range(len(blocks) - 1, -1, -1):
            if isinstance(blocks[index], kind):
                runs.append((blocks[index], index + 1))
                break
    return runs
