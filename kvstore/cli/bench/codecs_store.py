"""Blocks from an engine's pages through a daemon into other pages, beside the codec alone on the same pages.

The store's way is ``save_blocks`` into slots, answered, and ``load_blocks`` out of them: finding slots, headers and
checksums, publishing by the daemon, and checks included. Keys are new in each round, and the tier is full: each block
that is saved evicts one. Blocks that were loaded are compared with what the codec alone decodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from typing import Final

import numpy as np

from kvstore.cli.bench.codecs_work import CodecWork
from kvstore.cli.bench.local_blocks import touch_mapping, wrong
from kvstore.cli.bench.report import Row
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import padded_bytes
from kvstore.protocol.keys import chain_keys
from kvstore_client.tensors import TensorStore
from kvstore_kernels import cpu

__all__ = ["BLOCKS", "CODEC", "CODEC_ALONE", "SAVE_AND_LOAD", "measure_store"]

CODEC: Final = "kivi4"
BLOCKS: Final = 64
CODEC_ALONE: Final = "codec alone"
SAVE_AND_LOAD: Final = "save and load"
_LIMIT: Final = 0.8
_TIER_ROUNDS: Final = 3
"""How many rounds' blocks the tier holds."""

_SMALLEST_CAPACITY_BYTES: Final = 64 << 20
_TIMEOUT_S: Final = 60.0
_WARM_UP_ROUNDS: Final = _TIER_ROUNDS + 1


def measure_store(work: CodecWork, rounds: int, on_round: Callable[[], None] = lambda: None) -> list[Row]:
    """Measure ``BLOCKS`` blocks, or all where there are fewer, by one thread.

    Args:
        work: of the codec ``CODEC``.
        rounds: turns of both.
        on_round: called after each.

    Raises:
        KVStoreError: the daemon did not take or give a block, or gave other numbers.
    """
    slot_bytes = padded_bytes(RECORD_HEADER_BYTES + max(int(lengths.sum()) for lengths in work.section_bytes))
    blocks = min(BLOCKS, work.memory.blocks)
    capacity_bytes = max(_SMALLEST_CAPACITY_BYTES, _TIER_ROUNDS * blocks * slot_bytes)
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(
            PrivateDaemon(
                capacity_bytes=capacity_bytes, grant_bytes=max(_SMALLEST_CAPACITY_BYTES, 2 * blocks * slot_bytes)
            )
        )
        store = stack.enter_context(
            TensorStore(
                work.memory.layout,
                CODEC,
                name="bench codecs",
                endpoint=daemon.endpoint,
                mapped=True,
                timeout=_TIMEOUT_S,
            )
        )
        store.client.ping()
        touch_mapping(store.client)
        both = _Both(work, store, blocks)
        for _ in range(_WARM_UP_ROUNDS + capacity_bytes // slot_bytes // blocks):
            both.store()
        both.forget()
        for number in range(rounds):
            for side in (both.alone, both.store) if number % 2 else (both.store, both.alone):
                side()
            on_round()
    return both.rows()


class _Both:
    """Both ways and their times."""

    def __init__(self, work: CodecWork, store: TensorStore, blocks: int) -> None:
        self._work = work
        self._store = store
        self._blocks = blocks
        self._turn = 0
        self._key_turn = 0
        self.forget()

    def forget(self) -> None:
        """Begin with no times."""
        self._times_ns: dict[str, list[int]] = {"encode": [], "decode": [], "save": [], "load": []}

    def alone(self) -> None:
        """Encode into private memory and decode from there."""
        work, form, begin = self._work, self._work.memory.paged, self._next()
        end = begin + self._blocks
        pages, addresses = form.pages[begin:end], work.payloads.addresses[begin:end]
        work.payloads.spoil(begin, end)
        form.spoil_target(begin, end)
        times, clock = self._times_ns, perf_counter_ns
        started = clock()
        encoded = cpu.encode(work.codec, form.source, pages, addresses)
        times["encode"].append(clock() - started)
        started = clock()
        cpu.decode(work.codec, form.target, pages, addresses, encoded.section_bytes)
        times["decode"].append(clock() - started)
        work.check_payloads(begin, encoded.section_bytes, "the codec alone")
        work.check_decoded(form, begin, end, "the codec alone")

    def store(self) -> None:
        """Save under keys that nobody used before, and load."""
        form, begin = self._work.memory.paged, self._next()
        end = begin + self._blocks
        pages = form.pages[begin:end]
        keys = chain_keys(np.arange(self._blocks), 1, salt=b"%d" % self._key_turn)
        self._key_turn += 1
        form.spoil_target(begin, end)
        times, clock = self._times_ns, perf_counter_ns
        started = clock()
        saved = self._store.save_blocks(keys, form.source, pages=pages)
        times["save"].append(clock() - started)
        started = clock()
        loaded = self._store.load_blocks(keys, form.target, pages=pages)
        times["load"].append(clock() - started)
        if saved.stored != self._blocks or loaded.loaded != self._blocks:
            raise wrong(f"the daemon stored {saved.stored} and gave {loaded.loaded} of {self._blocks} blocks: {loaded}")
        for number in range(begin, end):
            self._work.check_decoded(form, number, number + 1, "the store")

    def _next(self) -> int:
        """First block of the next turn: another part of the KV each time."""
        parts = self._work.memory.blocks // self._blocks
        self._turn += 1
        return self._turn % parts * self._blocks

    def rows(self) -> list[Row]:
        """Saving, loading, and both together, each beside the codec alone."""
        times = self._times_ns
        pairs = {"save": "encode", "load": "decode"}
        rows = [self._row(ours, times[ours], times[alone]) for ours, alone in pairs.items()]
        together, alone = (
            [first + second for first, second in zip(times[one], times[other], strict=True)]
            for one, other in (("save", "load"), ("encode", "decode"))
        )
        return [*rows, self._row(SAVE_AND_LOAD, together, alone, _LIMIT)]

    def _row(self, op: str, ours_ns: list[int], alone_ns: list[int], limit: float | None = None) -> Row:
        ours, alone = median(ours_ns), median(alone_ns)
        size = self._work.memory.layout.block_bytes
        return Row(
            op=op,
            codec=self._work.codec.name,
            size_bytes=size,
            batch=self._blocks,
            cache="cold",
            memory=self._work.memory.paged.name,
            threads=1,
            samples=len(ours_ns),
            median_us=round(ours / 1000, 2),
            gb_per_s=round(size * self._blocks / ours, 3),
            baseline=CODEC_ALONE,
            baseline_median_us=round(alone / 1000, 2),
            ratio=round(alone / ours, 4),
            limit=limit,
        )
