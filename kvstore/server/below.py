"""What requests want of the tier below DRAM: blocks brought up, made durable, foretold; and whether a load pays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from kvstore.core.block import Block
from kvstore.core.events import PersistWanted
from kvstore.core.namespaces import NamespaceState
from kvstore.core.prefetched import Prefetched
from kvstore.core.ssd_record import SsdBlock
from kvstore.policy.prefetch import Outcome, Urgency
from kvstore.protocol.keys import KEY_BYTES, split_keys
from kvstore.protocol.messages import PutStatus, Reason, TierId
from kvstore.protocol.statistics import LoadingStats, PrefetchStats
from kvstore.server.executor import Executor
from kvstore.server.loads import Loads
from kvstore.server.ssd import SsdTier

_ANSWER_SHARE: Final = 0.9
"""Of a request's time, after which it is answered whatever is missing."""

_NO_DEADLINE_S: Final = 5.0
_PREFETCH_S: Final = 30.0
"""How long a prefetch may take whose client does not say."""

_AHEAD_SHARE: Final = 2
"""What waits to be brought up ahead is by default at most this part of the DRAM tier; of one client half of that."""

_LEAD_SHARE: Final = 0.5
"""A hint of something that is further ahead than blocks stay is begun this part of their stay before its time."""

_MOST_HINTED_KEYS: Final = 1 << 18
"""Keys of hints that wait for their time."""

_AT_ONCE_SHARE: Final = 2
"""What is brought up for one request is at most this part of it: the last must not push out the first."""


class Below:
    """The tiers below DRAM as requests see them.

    Args:
        tier: the SSD tier.
        executor: of the store.
        clock: nanoseconds, monotonic.
        residence_s: how long blocks stay in DRAM that nobody uses; None where that is not known.
    """

    def __init__(
        self,
        tier: SsdTier,
        executor: Executor,
        clock: Callable[[], int],
        residence_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.tier = tier
        self._executor = executor
        self._store = executor.store
        self._clock = clock
        self._residence_s = residence_s
        limits = self._store.limits
        prefetched = Prefetched()
        self._store.watchers.append(prefetched)
        self.loads = Loads(
            tier.promotions,
            prefetched,
            tier.settings.prefetch_bytes or limits.capacity_bytes // _AHEAD_SHARE,
            min(limits.grant_bytes, limits.grant_bytes_per_session),
            clock,
        )
        self._hints = 0
        self._delayed_hints = 0
        self._hinted_keys = 0

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

    async def promote(
        self, namespace: NamespaceState, blocks: Sequence[SsdBlock], deadline_ns: int, session: int = 0
    ) -> None:
        """Bring blocks up, as many as there may be at once; ends when that is done, or cannot be, or time is over."""
        await self.loads.bring_up(namespace, self._leading(blocks, _AT_ONCE_SHARE), deadline_ns, session)

    def prefetch(
        self,
        namespace: NamespaceState,
        blocks: Sequence[SsdBlock],
        urgency: Urgency = Urgency.AHEAD,
        within_ms: int = 0,
        session: int = 0,
    ) -> int:
        """Begin to bring blocks up, as many as may wait for that; how many.

        What did not begin to come up within so many milliseconds (0: 30 s), or by the time that its client is gone, is
        dropped.
        """
        seconds = within_ms / 1000 if within_ms else _PREFETCH_S
        return self.loads.prefetch(namespace, blocks, urgency, self._clock() + int(seconds * 1e9), session)

    def _leading(self, blocks: Sequence[SsdBlock], share: int) -> Sequence[SsdBlock]:
        """The first blocks, at least one, up to a part of the DRAM tier."""
        room = self._store.limits.capacity_bytes // share
        for index, block in enumerate(blocks):
            room -= sum(record.home_bytes for record in block.parts.values())
            if room < 0:
                return blocks[: max(index, 1)]
        return blocks

    def within(self, blocks: Sequence[SsdBlock], budget_bytes: int, *, evict: bool) -> Sequence[SsdBlock]:
        """The first blocks that a number of bytes has room for (0: all), and no more than may push others out."""
        room = budget_bytes or self._store.limits.capacity_bytes
        if evict:
            room = min(room, self._store.limits.capacity_bytes // _AT_ONCE_SHARE)
        for index, block in enumerate(blocks):
            room -= sum(record.home_bytes for record in block.parts.values())
            if room < 0:
                return blocks[:index]
        return blocks

    def worth_loading(self, namespace_id: int, blocks: list[Block | SsdBlock]) -> list[Block | SsdBlock]:
        """The leading blocks that are worth taking: loading them takes no longer than computing them anew."""
        if not any(isinstance(block, SsdBlock) for block in blocks):
            return blocks
        decision = self.tier.costs.decide(namespace_id, *self._costs_of(blocks))
        return blocks[: decision.blocks]

    def would_load(self, namespace_id: int, blocks: list[Block | SsdBlock]) -> int:
        """How many leading blocks ``worth_loading`` would take; nothing is counted."""
        if not any(isinstance(block, SsdBlock) for block in blocks):
            return len(blocks)
        return self.tier.costs.would_take(namespace_id, *self._costs_of(blocks))

    def _costs_of(self, blocks: list[Block | SsdBlock]) -> tuple[list[int], int, int]:
        """Of a chain with blocks below: bytes to be loaded of each block, tokens a block, and bytes that come first."""
        lower = [block for block in blocks if isinstance(block, SsdBlock)]
        queue = self.loads.queue
        coming_bytes = sum(
            record.home_bytes for block in lower for record in block.parts.values() if queue.holds(record)
        )
        return (
            [max(block.slot_bytes, 1) if isinstance(block, SsdBlock) else 0 for block in blocks],
            lower[0].namespace.block_tokens,
            # What comes up for this chain already is in its own loads.
            max(self.loads.queued_bytes(Urgency.ARRIVED) - coming_bytes, 0),
        )

    def hint(self, namespace: NamespaceState, keys: list[bytes], within_ms: int = 0, session: int = 0) -> None:
        """A session with this chain is about to come back, within so many milliseconds.

        What would leave DRAM again before its time comes up later.
        """
        blocks = namespace.leading_in_tiers(keys)
        lower = [block for block in blocks if isinstance(block, SsdBlock)]
        if not lower:
            return
        self._hints += 1
        residence_s = self._residence_s()
        lead_s = within_ms / 1000
        if residence_s is None or lead_s <= residence_s:
            self.prefetch(namespace, lower, Urgency.HINTED, within_ms, session)
            return
        if self._hinted_keys + len(blocks) > _MOST_HINTED_KEYS:
            self.loads.refused["hints"] += len(lower)
            return
        self._delayed_hints += 1
        self._hinted_keys += len(blocks)
        identity, joined, left_ms = namespace.id, b"".join(keys[: len(blocks)]), int(residence_s * _LEAD_SHARE * 1000)

        def begin(*, dropped: bool) -> None:
            self._hinted_keys -= len(joined) // KEY_BYTES
            current = self._store.namespaces.by_id.get(identity)
            if current is not None and not dropped:
                found = self.lacking(current, split_keys(joined))
                self.prefetch(current, found, Urgency.HINTED, max(left_ms, 1), session)

        self.loads.later(self._clock() + within_ms * 1_000_000 - left_ms * 1_000_000, session, begin)

    def client_gone(self, session: int) -> None:
        """What only this client wanted is wanted no more."""
        self.loads.client_gone(session)

    def loading_statistics(self) -> LoadingStats:
        """See ``LoadingStats``."""
        costs = self.tier.costs
        return LoadingStats(
            read_bytes_per_s=costs.bytes_per_s,
            latency_s=costs.latency_s,
            queued_bytes=self.loads.queued_bytes(Urgency.WARMING),
            prefill_tokens_per_s=costs.shown_tokens_per_s,
            prefill_source=costs.prefill_source,
            decisions=dict(costs.decisions),
            refused_blocks=costs.refused_blocks,
            load_saved_s=costs.load_saved_s,
            refusal_saved_s=costs.refusal_saved_s,
        )

    def prefetch_statistics(self) -> PrefetchStats:
        """See ``PrefetchStats``."""
        loads, outcomes, prefetched = self.loads, self.loads.queue.outcomes, self.loads.prefetched
        residence_s = self._residence_s()
        return PrefetchStats(
            wanted=dict(loads.wanted),
            blocks=prefetched.blocks,
            bytes=prefetched.bytes,
            used_blocks=prefetched.used_blocks,
            used_bytes=prefetched.used_bytes,
            unused_blocks=prefetched.unused_blocks,
            left_blocks=prefetched.left_blocks,
            left_bytes=prefetched.left_bytes,
            merged=loads.queue.merged,
            expired=outcomes[Outcome.EXPIRED],
            cancelled=outcomes[Outcome.CANCELLED],
            refused=dict(loads.refused),
            waiting_bytes=sum(loads.queue.waiting_bytes),
            flying_bytes=loads.queue.flying_bytes,
            most_bytes=loads.most_bytes,
            hints=self._hints,
            delayed_hints=self._delayed_hints,
            residence_s=0.0 if residence_s is None else residence_s,
        )

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
        """Bring nothing more up."""
        self.loads.stop()


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
