"""The writer of an index stage: evicts, overwrites and moves records without a pause, under its readers' eyes.

It drives ``kvstore.tiers.index.Index`` and the arena as the daemon does, only that nothing decides: victims are random,
and a slot is written again the moment the index says that nobody reads it.
"""

from __future__ import annotations

import contextlib
import random
import secrets
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.cli.stress.faulty import ScanFirstIndex
from kvstore.cli.stress.layout import COUNTING_ONLY, NAMESPACE_ID, SHAPES, ReaderFiles, Shape, pages_for
from kvstore.cli.stress.pattern import KeyTable, fill
from kvstore.cli.stress.worker import Post
from kvstore.core.block import Block, Record
from kvstore.core.namespaces import NamespaceState
from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES, CodecId
from kvstore.mapped.arena import FIRST_SLAB_PAGE, ArenaHeader
from kvstore.mapped.checksum import xxh3_64
from kvstore.mapped.client_file import CLIENT_FILE_BYTES, HAZARD_OFFSET, STATE_OFFSET, ClientState
from kvstore.mapped.index_file import IndexHeader
from kvstore.mapped.session_file import SessionHeader, encode_session_header
from kvstore.protocol.namespace import Namespace
from kvstore.tiers.dram import Arena
from kvstore.tiers.files import Doorbell, SessionFile
from kvstore.tiers.index import Index

__all__ = ["churn"]

_BATCHES: Final = (1, 1, 2, 8)
"""Records withdrawn, or published, at once."""

_LOOK_EVERY: Final = 16
"""Rounds between two looks at slots that were found being read."""

_MOVE_EVERY: Final = 4
_DRAIN_ROUNDS: Final = 1000


class Table:
    """Arena, index and clients' files of one stage, and what lies where.

    Args:
        directory: for the files; must be there, stays there.
        shape: of keys and slots.
        readers: clients to make files for.
        verify_every: of the index.
        fault: "" or which protocol to break: ``ignore-hazards``, ``scan-first``.
    """

    def __init__(self, directory: Path, shape: Shape, readers: int, verify_every: int, fault: str) -> None:
        self.shape = shape
        self.counts: Counter[str] = Counter()
        self._keys = shape.keys()
        self._incarnation = secrets.randbits(62) | 1
        self._state = NamespaceState(NAMESPACE_ID, Namespace(name="stress"), 0, Namespace(name="stress").canonical())
        self._blocks = [Block(self._state, key, bytes(32)) for key in self._keys.keys]
        self._unwritten = set(range(len(self._keys)))
        self.live: dict[int, int] = {}
        """Number of the key of each readable slot."""
        self._pages: dict[int, int] = {}
        """Pages of each slot that its region is cut into."""
        self._free: list[int] = []
        self._limbo: list[int] = []
        self._undo = contextlib.ExitStack()
        try:
            self._make_files(directory, readers, verify_every, fault)
        except BaseException:
            self._undo.close()
            raise
        self._checksums = _checksums(self._keys)
        self._used_of = Counter[int]()
        self._empty = list(range(shape.regions))

    def _make_files(self, directory: Path, readers: int, verify_every: int, fault: str) -> None:
        shape = self.shape
        header = ArenaHeader(self._incarnation, shape.region_pages * PAGE_BYTES, shape.regions, 0)
        self.arena = Arena(directory / "arena", header, 0o600)
        self._undo.callback(self.arena.close)
        for region in range(shape.regions):
            step = 0
            while not self.arena.populate_step(region, step):
                step += 1
        kind = ScanFirstIndex if fault == "scan-first" else Index
        seed, arena_bytes = secrets.randbits(62), header.arena_bytes
        index_header = IndexHeader(
            self._incarnation, shape.bucket_count, seed, arena_bytes, verify_every or COUNTING_ONLY, arena_bytes
        )
        self.index = kind(directory / "index", index_header, 0o600)
        self._undo.callback(self.index.close)
        self.index.begin_namespace(NAMESPACE_ID, 0, 1, self._state.digest)
        bell = Doorbell(directory / "doorbell", 0o600)
        self._undo.callback(bell.close)
        hazards: list[int] = []
        self._words = []
        self.files: list[ReaderFiles] = []
        for number in range(1, readers + 1):
            content = encode_session_header(SessionHeader(self._incarnation, number, mapped=True))
            path = directory / f"client-{number}"
            session = SessionFile(path, content, CLIENT_FILE_BYTES, 0o600, mapped=True)
            self._undo.callback(session.close)
            assert session.map is not None
            words = np.frombuffer(session.map, np.int64)
            words[STATE_OFFSET // 8] = int(ClientState.LIVE)
            self._words.append(words)
            hazards.append(int(words.ctypes.data) + HAZARD_OFFSET)
            paths = (str(self.arena.path), str(self.index.path), str(bell.path), str(path))
            self.files.append(ReaderFiles(*paths, self._incarnation))
        self.index.watch_hazards([] if fault == "ignore-hazards" else hazards)

    # -------------------------------------------------------------- what lies where

    def _region(self, slot: int) -> int:
        return (slot - FIRST_SLAB_PAGE) // self.shape.region_pages

    def _let_go(self, slots: list[int]) -> None:
        """Nobody reads these slots any more. A region without used slots can be cut anew."""
        for slot in slots:
            region = self._region(slot)
            self._used_of[region] -= 1
            if self._used_of[region]:
                self._free.append(slot)
            else:
                self._free = [other for other in self._free if self._region(other) != region]
                self._empty.append(region)

    def _take(self, pages: int) -> int | None:
        """A free slot of a size."""
        for at, slot in enumerate(self._free):
            if self._pages[slot] == pages:
                del self._free[at]
                self._used_of[self._region(slot)] += 1
                return slot
        if not self._empty:
            return None
        region = self._empty.pop()
        first = FIRST_SLAB_PAGE + region * self.shape.region_pages
        slots = [first + number * pages for number in range(self.shape.region_pages // pages)]
        self._pages.update(dict.fromkeys(slots, pages))
        self._free += slots[1:]
        self._used_of[region] = 1
        self.counts["regions_cut"] += 1
        return slots[0]

    # -------------------------------------------------------------- one step of the churn

    def withdraw(self, slots: list[int]) -> None:
        """Make records unfindable; their slots are free at once, or wait for a reader."""
        for slot in slots:
            self._unwritten.add(self.live.pop(slot))
        self._withdrawn(slots)

    def _withdrawn(self, slots: list[int]) -> None:
        held = set(self.index.withdraw(slots))
        self.counts["held_by_readers"] += len(held)
        self._limbo += held
        self._let_go([slot for slot in slots if slot not in held])

    def look_at_limbo(self) -> None:
        """Let go of slots whose readers are done."""
        held = set(self.index.still_read(list(self._limbo)))
        done = [slot for slot in self._limbo if slot not in held]
        self._limbo = list(held)
        self._let_go(done)

    def write(self, limit: int, rng: random.Random) -> int:
        """Write and publish up to so many records that are not there, as far as slots are free; how many."""
        records = []
        for number in rng.sample(sorted(self._unwritten), min(limit, len(self._unwritten))):
            length = self._keys.lengths[number]
            slot = self._take(pages_for(length))
            if slot is None:
                break
            fill(self.arena.address + slot * PAGE_BYTES + RECORD_HEADER_BYTES, length, self._keys.row(number))
            record = Record(slot, self._pages[slot] * PAGE_BYTES, 0)
            record.block, record.codec = self._blocks[number], int(CodecId.RAW)
            record.record_bytes, record.checksum = RECORD_HEADER_BYTES + length, self._checksums[number]
            self._unwritten.discard(number)
            self.live[slot] = number
            records.append(record)
        self.counts["written"] += len(records)
        for record in self.index.publish(records):
            self.counts["overflows"] += 1
            if record.slot not in self.live:
                continue  # it made room for the one before it
            others = [slot for slot in self.index.others(record) if slot in self.live]
            if others:
                self.withdraw(others[:1])
            if not others or self.index.publish([record]):
                self.withdraw([record.slot])
        return len(records)

    def move(self, source: int) -> None:
        """Let a record's readers find it in another slot."""
        target = self._take(self._pages[source])
        if target is None:
            return
        self.arena.move(source, target, self._pages[source] * PAGE_BYTES)
        self.index.move(source, target)
        self.live[target] = self.live.pop(source)
        self._withdrawn([source])
        self.counts["moved"] += 1

    # -------------------------------------------------------------- the end

    def leaked_slots(self) -> int:
        """Slots that do not come back when nothing is live and nobody reads any more. Nothing is live afterwards."""
        self.withdraw(list(self.live))
        for _ in range(_DRAIN_ROUNDS):
            if not self._limbo:
                break
            self.look_at_limbo()
        return sum(self._used_of.values())

    def close(self) -> None:
        """Tell the readers, unmap, remove the files."""
        self._undo.close()


def _checksums(keys: KeyTable) -> list[int]:
    """Of each key's payload, as entries carry them."""
    memory = np.zeros(max(keys.lengths) // 8 + 1, np.int64)
    at = int(memory.ctypes.data)
    checksums = []
    for number, length in enumerate(keys.lengths):
        fill(at, length, keys.row(number))
        checksums.append(xxh3_64(at, length) & ((1 << 64) - 1))
    return checksums


def churn(
    post: Post, *, directory: str, shape: str, readers: int, verify_every: int, fault: str, seed: int
) -> dict[str, Any]:
    """Role: write until told to stop. Says which files the readers map as soon as they are there."""
    rng = random.Random(seed)
    table = Table(Path(directory), SHAPES[shape], readers, verify_every, fault)
    try:
        table.write(len(table.shape.keys()), rng)
        post.send("progress", table.files)
        rounds = 0
        while not post.stopped():
            rounds += 1
            live = list(table.live)
            table.withdraw(rng.sample(live, min(rng.choice(_BATCHES), len(live) // 2)))
            if rounds % _MOVE_EVERY == 0 and table.live:
                table.move(rng.choice(list(table.live)))
            if rounds % _LOOK_EVERY == 0:
                table.look_at_limbo()
            while table.write(rng.choice(_BATCHES), rng):
                pass
        leaked = table.leaked_slots()
        return {"leaked_slots": leaked, **table.counts}
    finally:
        table.close()
