"""The queue of loads over a tier whose files are in memory, in time that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fakes.faulty_disk import FaultyDirectory
from fakes.ssd_life import Life, loop_transfers
from fakes.virtual_loop import VirtualLoop

from kvstore.core.instructions import Refuse
from kvstore.core.namespaces import NamespaceState
from kvstore.core.ssd_record import SsdBlock, SsdRecord
from kvstore.format.constants import PAGE_BYTES
from kvstore.policy.prefetch import Outcome, Urgency
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus, Reason

BLOCKS = 18


def key_of(number: int) -> bytes:
    return bytes([1 + number]) * 32


class Tier:
    """A chain of 18 blocks of a page, the first of which left DRAM of 12 pages."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.below = life.below
        self.loads = life.below.loads
        self.order: list[int] = []
        read = life.tier.promotions.read

        def noted(namespace: object, record: object, *arguments: object, **options: object) -> None:
            self.order.append(record.key[0] - 1)  # type: ignore[attr-defined]
            read(namespace, record, *arguments, **options)  # type: ignore[arg-type]

        life.tier.promotions.read = noted  # type: ignore[method-assign, assignment]

    @property
    def lower(self) -> list[SsdBlock]:
        """Blocks that are below only, parents first."""
        return self.below.lacking(self.life.namespace, map(key_of, range(BLOCKS)))

    def deadline_ns(self, seconds: float = 20.0) -> int:
        return self.life.clock() + int(seconds * 1e9)

    def prefetch(
        self, blocks: list[SsdBlock], urgency: Urgency = Urgency.AHEAD, seconds: float = 20.0, session: int = 0
    ) -> int:
        return self.loads.prefetch(self.life.namespace, blocks, urgency, self.deadline_ns(seconds), session)

    async def idle(self) -> None:
        while len(self.loads.queue):
            await asyncio.sleep(0.01)

    def is_up(self, block: SsdBlock) -> bool:
        return block.key in self.life.namespace.blocks


def in_a_tier(test: Callable[[Tier], Awaitable[None]]) -> None:
    async def run() -> None:
        life = await Life.begin(FaultyDirectory(), ssd_slabs=6)
        try:
            parent = ROOT_KEY
            for number in range(BLOCKS):
                await life.put(key_of(number), parent, bytes([number]) * 1000)
                parent = key_of(number)
            assert await life.settle()
            tier = Tier(life)
            tier.loads.most_bytes = 64 * PAGE_BYTES
            await test(tier)
            life.check()
            assert life.log.errors == []
            await life.stop()
        finally:
            life.end()

    loop = VirtualLoop()
    try:
        with loop_transfers(5):
            loop.run_until_complete(run())
    finally:
        loop.close()


def test_prefetch_brings_up_the_chain_in_its_order_and_counts_it() -> None:
    async def test(tier: Tier) -> None:
        some = tier.lower[:4]
        assert len(some) == 4
        assert tier.prefetch(some) == 4
        await tier.idle()
        assert tier.order == [block.key[0] - 1 for block in some]
        assert all(map(tier.is_up, some))
        stats = tier.below.prefetch_statistics()
        assert (stats.blocks, stats.bytes, stats.unused_blocks) == (4, 4 * PAGE_BYTES, 4)
        assert stats.wanted == {"ahead": 4}

    in_a_tier(test)


def test_get_of_a_block_that_is_prefetched_waits_for_that_load() -> None:
    async def test(tier: Tier) -> None:
        some = tier.lower[:4]
        tier.prefetch(some)
        await tier.loads.bring_up(tier.life.namespace, some[2:3], tier.deadline_ns())
        assert tier.is_up(some[2])
        await tier.idle()
        assert sorted(tier.order) == sorted({block.key[0] - 1 for block in some})
        assert tier.loads.queue.merged == 1
        # Somebody waited for it: it did not come ahead of its use.
        assert tier.below.prefetch_statistics().blocks == 3

    in_a_tier(test)


def test_get_overtakes_prefetches_that_wait() -> None:
    async def test(tier: Tier) -> None:
        *ahead, wanted = tier.lower[:6]
        begun = tier.loads._begin
        tier.loads._begin = lambda load: False  # type: ignore[method-assign]
        tier.prefetch(ahead, Urgency.HINTED)
        tier.prefetch(tier.lower[1:3], Urgency.ARRIVED)
        waiting = asyncio.ensure_future(tier.loads.bring_up(tier.life.namespace, [wanted], tier.deadline_ns()))
        await asyncio.sleep(0)
        tier.loads._begin = begun  # type: ignore[method-assign]
        tier.loads.pump()
        await waiting
        await tier.idle()
        assert tier.order == [wanted.key[0] - 1, *(block.key[0] - 1 for block in (*ahead[1:3], ahead[0], *ahead[3:]))]

    in_a_tier(test)


def test_prefetch_whose_time_is_over_is_dropped_and_counted() -> None:
    async def test(tier: Tier) -> None:
        begun = tier.loads._begin
        tier.loads._begin = lambda load: False  # type: ignore[method-assign]
        tier.prefetch(tier.lower[:3], seconds=1.0)
        await asyncio.sleep(2.0)
        tier.loads._begin = begun  # type: ignore[method-assign]
        await tier.idle()
        stats = tier.below.prefetch_statistics()
        assert (stats.expired, stats.blocks, stats.waiting_bytes, tier.order) == (3, 0, 0, [])

    in_a_tier(test)


def test_prefetches_of_a_client_that_is_gone_are_dropped_unless_another_wants_them() -> None:
    async def test(tier: Tier) -> None:
        some = tier.lower[:4]
        begun = tier.loads._begin
        tier.loads._begin = lambda load: False  # type: ignore[method-assign]
        tier.prefetch(some, session=7)
        tier.prefetch(some[:1], session=8)
        tier.below.client_gone(7)
        tier.loads._begin = begun  # type: ignore[method-assign]
        await tier.idle()
        assert tier.order == [some[0].key[0] - 1]
        assert tier.below.prefetch_statistics().cancelled == 4

    in_a_tier(test)


def test_prefetches_are_bounded_in_bytes_and_for_each_client() -> None:
    async def test(tier: Tier) -> None:
        some = tier.lower[:6]
        tier.loads.most_bytes = 6 * PAGE_BYTES
        assert tier.prefetch(some, session=1) == 3
        assert tier.prefetch(some[3:], session=2) == 3
        assert tier.prefetch(some[:1], session=3) == 0
        assert tier.below.prefetch_statistics().refused == {"client_bytes": 3, "bytes": 1}
        await tier.idle()
        # What is over counts no more.
        assert tier.prefetch(tier.lower[:3], session=1) == len(tier.lower[:3])
        await tier.idle()
        assert tier.loads._session_bytes == {}

    in_a_tier(test)


def test_loads_without_room_keep_no_others_waiting() -> None:
    async def test(tier: Tier) -> None:
        life, slot_for = tier.life, tier.life.tier.promotions.slot_for
        large = key_of(60)
        await life.put(large, ROOT_KEY, bytes(5000))
        for number in range(30, 42):
            await life.put(key_of(number), ROOT_KEY, b"x" * 1000)
        assert await life.settle()
        below = tier.below.lacking(life.namespace, [large])

        def refusing(namespace: NamespaceState, record: SsdRecord, access: int, **options: bool) -> object:
            if record.home_bytes == PAGE_BYTES:
                return Refuse(PutStatus.THROTTLED, Reason.DEMOTING)
            return slot_for(namespace, record, access, **options)

        life.tier.promotions.slot_for = refusing  # type: ignore[method-assign, assignment]
        assert tier.prefetch(tier.lower[:4], Urgency.ARRIVED) == 4
        await tier.loads.bring_up(life.namespace, below, tier.deadline_ns())
        assert large in life.namespace.blocks
        assert len(tier.loads.queue) == 4
        life.tier.promotions.slot_for = slot_for  # type: ignore[method-assign]
        await tier.idle()
        assert len(tier.order) == 5

    in_a_tier(test)


def test_prefetched_blocks_that_are_used_and_that_left_before_are_told_apart() -> None:
    async def test(tier: Tier) -> None:
        some = tier.lower[:4]
        tier.prefetch(some)
        await tier.idle()
        watcher = tier.loads.prefetched
        block = tier.life.namespace.blocks[some[1].key]
        watcher.accessed(tier.life.namespace.id, 1, [(block, 2)], 2, [])
        stats = tier.below.prefetch_statistics()
        assert (stats.used_blocks, stats.unused_blocks) == (2, 2)
        for number in range(30, 50):
            await tier.life.put(key_of(number), ROOT_KEY, b"x" * 1000)
        stats = tier.below.prefetch_statistics()
        assert (stats.used_blocks, stats.left_blocks, stats.unused_blocks) == (2, 2, 0)

    in_a_tier(test)


def test_hint_that_is_further_ahead_than_blocks_stay_begins_later() -> None:
    async def test(tier: Tier) -> None:
        tier.below._residence_s = lambda: 10.0
        keys = [key_of(number) for number in range(BLOCKS)]
        namespace = tier.life.namespace
        tier.below.hint(namespace, keys, within_ms=60_000)
        await asyncio.sleep(50.0)
        assert tier.order == []
        await asyncio.sleep(6.0)
        assert tier.order != []
        stats = tier.below.prefetch_statistics()
        assert (stats.hints, stats.delayed_hints, stats.residence_s) == (1, 1, 10.0)
        tier.order.clear()
        # One that is soon enough begins at once; one whose client is gone does not begin.
        tier.below.hint(namespace, keys, within_ms=30_000, session=3)
        tier.below.client_gone(3)
        await asyncio.sleep(40.0)
        assert tier.order == []
        tier.below.hint(namespace, keys, within_ms=9_000)
        await asyncio.sleep(0.1)
        assert tier.order != []
        assert tier.below._hinted_keys == 0

    in_a_tier(test)


def test_warming_takes_free_room_only() -> None:
    async def test(tier: Tier) -> None:
        life = tier.life
        before = set(life.namespace.blocks)
        some = tier.lower
        assert await tier.loads.warm(life.namespace, some, tier.deadline_ns(), 0, only_free=True) == {
            Outcome.NO_ROOM: len(some)
        }
        assert set(life.namespace.blocks) == before
        results = await tier.loads.warm(life.namespace, some[:3], tier.deadline_ns(), 0, only_free=False)
        assert results == {Outcome.BROUGHT: 3}

    in_a_tier(test)


def test_warming_of_empty_memory_fills_it_with_blocks_that_are_the_first_to_leave() -> None:
    async def restarted(directory: FaultyDirectory) -> None:
        life = await Life.begin(directory, ssd_slabs=6)
        try:
            tier = Tier(life)
            blocks = tier.lower
            assert len(blocks) == BLOCKS
            results = await tier.loads.warm(life.namespace, blocks, tier.deadline_ns(), 0, only_free=True)
            # Of 12 pages a quarter is kept for puts.
            assert (results[Outcome.BROUGHT], results[Outcome.NO_ROOM]) == (9, BLOCKS - 9)
            assert set(life.namespace.blocks) == set(map(key_of, range(9)))
            used = {key: life.store.policy.used(block) for key, block in life.namespace.blocks.items()}
            assert used[key_of(8)] == blocks[8].used < life.store._access
            for number in range(40, 49):
                await life.put(key_of(number), ROOT_KEY, b"y" * 1000)
            assert set(map(key_of, range(40, 49))) <= set(life.namespace.blocks)
            assert await life.settle()
            life.check()
            assert life.log.errors == []
            await life.stop()
        finally:
            life.end()

    async def test(tier: Tier) -> None:
        life = tier.life
        await life.persist(key_of(BLOCKS - 1))
        directories.append(life.directory)

    directories: list[FaultyDirectory] = []
    in_a_tier(test)
    loop = VirtualLoop()
    try:
        with loop_transfers(6):
            loop.run_until_complete(restarted(directories[0].crash()))
    finally:
        loop.close()
