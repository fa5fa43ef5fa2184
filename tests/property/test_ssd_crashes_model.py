"""The SSD tier against a plain model, with crashes at any point, faults, and disks that lose what was not synced.

For each key the model knows which payloads a reader may see, which one it must see because it is durable, and which may
come back because their removal was not acknowledged.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

from fakes.crash_medium import Choose, lose_everything
from fakes.durable_model import Expected
from fakes.faulty_disk import Crashed, FaultyDirectory
from fakes.ssd_life import Life, loop_transfers
from fakes.virtual_loop import VirtualLoop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.core.ssd_record import SsdRecord, SsdState
from kvstore.format.constants import PAGE_BYTES
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus

T = TypeVar("T")

CHAINS, LENGTH = 5, 3
KEYS = [bytes([chain, at]).ljust(32, b"k") for chain in range(CHAINS) for at in range(LENGTH)]
some_key = st.sampled_from(KEYS)
some_chains = st.lists(st.integers(0, CHAINS - 1), min_size=1, unique=True)


def parent_of(key: bytes) -> bytes:
    return bytes([key[0], key[1] - 1]) + key[2:] if key[1] else ROOT_KEY


def payload_of(key: bytes, number: int) -> bytes:
    """Of one page or two, by the key; no two are alike."""
    size_bytes = (1 + key[0] % 2) * PAGE_BYTES - 512 - key[1]
    return random.Random(number).randbytes(size_bytes)


def crash_seeds() -> st.SearchStrategy[Choose | None]:
    """Only the process dies; all that was not synced is lost; or anything."""
    seeds = st.integers(0, 2**32).map(lambda seed: random.Random(seed).randrange)
    return st.one_of(st.none(), st.just(lose_everything), seeds)


class SsdCrashes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.loop.set_exception_handler(self._unexpected)
        self.problems: list[str] = []
        self.flipped: set[int] = set()
        """Pages of the slab file."""
        self.expected = {key: Expected() for key in KEYS}
        self.number = 0
        self.faulty = False
        """Whether there are faults now."""
        self.degraded = False
        """Whether there were some, of which the log may tell."""
        self.left_until_crash = 0
        self.crash_at = ""

    @initialize(seed=st.integers(0, 2**16), slabs=st.integers(1, 4))
    def begin(self, seed: int, slabs: int) -> None:
        self.slabs = slabs
        self.patch = loop_transfers(seed)
        self.patch.__enter__()
        self.life = self.loop.run_until_complete(Life.begin(FaultyDirectory(), slabs))
        self._watch()

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self._let_end()
            self.patch.__exit__(None, None, None)
        self.loop.close()

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), Crashed):
            self.problems.append(f"{context['message']}: {context.get('exception')!r}")

    # -------------------------------------------------------------- lives

    def _watch(self) -> None:
        self.life.directory.before = self.life.directory.after = self._point

    def _point(self, op: str, name: str) -> None:
        if self.left_until_crash and (not self.crash_at or op == self.crash_at):
            self.left_until_crash -= 1
            if not self.left_until_crash:
                self.died.set_result(None)
                raise Crashed

    def _let_end(self) -> None:
        """Nothing of the life goes on: its process is dead."""

        async def ends() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.loop.run_until_complete(ends())
        self.loop.forget()
        self.life.end()
        self.problems = []

    def _restart(self, choose: Choose | None) -> None:
        assert not self.problems, self.problems
        self.left_until_crash = 0
        self._let_end()
        self._next(self.life.directory.crash(choose))

    def _next(self, directory: FaultyDirectory) -> None:
        self._forget_evicted()
        for expected in self.expected.values():
            expected.crashed()
        self.faulty = False
        self.life = self.loop.run_until_complete(Life.begin(directory, self.slabs))
        self._watch()
        for record in self.life.records():
            assert self.life.payload_on_disk(record) is not None or self._flipped(record), (
                f"the log has a record of {record.key[:2].hex()} in slot {record.slot}, and its bytes are not there"
            )
        for key, expected in self.expected.items():
            found = self.life.on_disk(key)
            if expected.durable is not None:
                assert found == expected.durable, f"{key[:2].hex()} was durable and is lost, or has other bytes"
            elif found is not None:
                assert found in expected.possible, f"{key[:2].hex()} has bytes that were never put, or came back"
            elif self.life.stored(key) is None:
                expected.possible = set()

    def _flipped(self, record: SsdRecord) -> bool:
        pages = range(record.slot, record.slot + record.slot_bytes // PAGE_BYTES)
        return not self.flipped.isdisjoint(pages)

    def _damaged(self, key: bytes) -> bool:
        """Whether a block's record was damaged by a test, which the tier need not know yet."""
        record = self.life.stored(key)
        return record is not None and self._flipped(record)

    def _run(self, call: Coroutine[Any, Any, T]) -> tuple[bool, T | None]:
        """Whether the process lived until the call was over, and what it gave."""
        self.died = self.loop.create_future()
        task = self.loop.create_task(call)
        self.loop.run_until_complete(asyncio.wait({task, self.died}, return_when=asyncio.FIRST_COMPLETED))
        if self.died.done():
            task.cancel()
            return False, None
        return True, task.result()

    def _forget_evicted(self) -> None:
        for key in self.life.evicted:
            self.expected[key].durable = None
        self.life.evicted.clear()

    # -------------------------------------------------------------- what clients do

    def _seen(self, key: bytes, found: bytes | None) -> None:
        self._forget_evicted()
        expected = self.expected[key]
        if found is None:
            if self.faulty:
                # What cannot be read is forgotten.
                expected.durable = None
            there = "but its record is there" if self.life.stored(key) else "and has no record"
            assert expected.durable is None, f"{key[:2].hex()} was durable and is not found, {there}"
            if self.life.stored(key) is None:
                expected.missed()
        else:
            assert found in expected.possible, f"{key[:2].hex()} has bytes that were never put, or came back"
            expected.possible = {found}

    @rule(key=some_key)
    def get(self, key: bytes) -> None:
        lived, found = self._run(self.life.get(key))
        if lived:
            self._seen(key, found)
        else:
            self._restart(None)

    @rule(chains=some_chains, length=st.integers(1, LENGTH), durable=st.booleans(), crash=crash_seeds())
    def store(self, chains: list[int], length: int, durable: bool, crash: Choose | None) -> None:
        for chain in chains:
            for key in KEYS[chain * LENGTH :][:length]:
                if not (self._put(key, crash) and (not durable or self._persist(key, crash))):
                    return

    def _put(self, key: bytes, crash: Choose | None) -> bool:
        lived, found = self._run(self.life.get(key))
        if not lived:
            self._restart(crash)
            return False
        self._seen(key, found)
        expected = self.expected[key]
        if found is None and self.life.stored(key) is not None:
            return False
        self.number += 1
        payload = found if found is not None else payload_of(key, self.number)
        lived, status = self._run(self.life.put(key, parent_of(key), payload))
        if not lived:
            expected.possible.add(payload)
            self._restart(crash)
        elif status is PutStatus.STORED or status is PutStatus.EXISTS:
            assert found is not None or status is PutStatus.STORED
            expected.possible = {payload}
            return True
        else:
            assert status is not PutStatus.THROTTLED or self.life.tier.formatting.formatted == 0, (
                "no room was made for a block"
            )
        return False

    @rule(keys=st.lists(some_key, min_size=1, unique=True), crash=crash_seeds())
    def persist(self, keys: list[bytes], crash: Choose | None) -> None:
        for key in keys:
            if self.expected[key].possible and not self._persist(key, crash):
                return

    def _persist(self, key: bytes, crash: Choose | None) -> bool:
        lived, status = self._run(self.life.persist(key))
        self._forget_evicted()
        expected = self.expected[key]
        if not lived:
            self._restart(crash)
        elif status is PutStatus.STORED:
            # What is there was put in this life, or was seen at its start.
            if len(expected.possible) == 1 and not self._damaged(key):
                (expected.durable,) = expected.possible
                expected.ghosts = set()
            return True
        elif not self.degraded:
            assert status is PutStatus.REJECTED, "a block was not made durable in time"
            assert self.life.store.find(self.life.namespace.id, key, 0) is None
        return False

    @rule(keys=st.lists(some_key, min_size=1, max_size=4, unique=True), crash=crash_seeds(), then=st.booleans())
    def remove(self, keys: list[bytes], crash: Choose | None, then: bool) -> None:
        self._end(keys, *self._run(self.life.remove(keys)), crash, then)

    @precondition(lambda self: any(expected.durable for expected in self.expected.values()))
    @rule(data=st.data(), crash=crash_seeds(), then=st.booleans())
    def remove_durable(self, data: st.DataObject, crash: Choose | None, then: bool) -> None:
        durable = [key for key, expected in self.expected.items() if expected.durable is not None]
        self.remove([data.draw(st.sampled_from(durable))], crash, then)

    @rule(crash=crash_seeds(), then=st.booleans())
    def clear(self, crash: Choose | None, then: bool) -> None:
        self._end(KEYS, *self._run(self.life.clear()), crash, then)

    @rule(crash=crash_seeds(), then=st.booleans())
    def invalidate(self, crash: Choose | None, then: bool) -> None:
        self._end(KEYS, *self._run(self.life.invalidate()), crash, then)

    def _end(self, keys: list[bytes], lived: bool, done: bool | None, crash: Choose | None, then: bool) -> None:
        for key in keys:
            if lived:
                self.expected[key].gone(acknowledged=bool(done))
            else:
                self.expected[key].unsure()
        if lived and not self.degraded:
            assert done, "a removal was not made durable by a disk without faults"
        if then or not lived:
            self._restart(crash)

    # -------------------------------------------------------------- what the tier does by itself

    @rule()
    def settle(self) -> None:
        lived, rests = self._run(self.life.settle())
        if not lived:
            self._restart(None)
        else:
            assert rests or self.degraded, "the tier does not come to rest"

    @rule(crash=crash_seeds())
    def checkpoint(self, crash: Choose | None) -> None:
        async def whole() -> None:
            # What is tidied at the start is over by then.
            await asyncio.sleep(1.0)
            groups = self.life.tier.groups
            async with groups._turn:
                await groups._begin_checkpoint()
            await asyncio.sleep(1.0)

        if self.life.tier.state == "ok":
            lived, _ = self._run(whole())
            if not lived:
                self._restart(crash)

    # -------------------------------------------------------------- the end of lives

    @rule(
        op=st.sampled_from(["", "data_write", "data_sync", "log_append", "log_sync", "checkpoint_rename"]),
        points=st.integers(1, 40),
    )
    def crash_soon(self, op: str, points: int) -> None:
        """Before or after one of the next operations, of any kind or of this one."""
        self.crash_at = op
        self.left_until_crash = 1 + points // 8 if op else points

    @rule(crash=crash_seeds())
    def crash_now(self, crash: Choose | None) -> None:
        self._restart(crash)

    @rule(first=crash_seeds(), points=st.integers(1, 40), second=crash_seeds())
    def crash_twice(self, first: Choose | None, points: int, second: Choose | None) -> None:
        """The second time during recovery, or after it."""
        self._let_end()
        directory = self.life.directory.crash(first)
        directory.before = directory.after = self._point
        self.left_until_crash, self.crash_at = points, ""
        _, life = self._run(Life.begin(directory, self.slabs))
        self.left_until_crash = 0
        if life is not None:
            self.life = life
        self._let_end()
        self._next(directory.crash(second))

    @precondition(lambda self: not self.faulty)
    @rule()
    def stop_and_start(self) -> None:
        self.left_until_crash = 0
        self.died = self.loop.create_future()
        self.loop.run_until_complete(self.life.stop())
        self._let_end()
        self._next(self.life.directory.reopen())

    # -------------------------------------------------------------- faults

    @rule(
        op=st.sampled_from(["data_sync", "data_write", "log_append", "log_sync", "log_create", "rename", "read"]),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
        passes=st.integers(0, 3),
        times=st.sampled_from([1, 3, 1000]),
    )
    def fail(self, op: str, number: int, passes: int, times: int) -> None:
        self.life.directory.fail(op, number, passes=passes, times=times)
        self.faulty = self.degraded = True

    @rule(room_pages=st.integers(0, 30))
    def fill(self, room_pages: int) -> None:
        self.life.directory.full_after(room_pages * PAGE_BYTES)
        self.faulty = self.degraded = True

    @rule()
    def make_read_only(self) -> None:
        self.life.directory.read_only = True
        self.faulty = self.degraded = True

    @rule(
        op=st.sampled_from(["data_sync", "data_write", "log_append", "log_sync"]),
        passes=st.integers(0, 1),
        chain=st.integers(0, CHAINS - 1),
        how=st.sampled_from(["clear", "remove", "store"]),
        crash=crash_seeds(),
    )
    def fail_once(self, op: str, passes: int, chain: int, how: str, crash: Choose | None) -> None:
        """An operation fails, the tier comes back by itself, the operation is repeated, and then all ends."""
        life = self.life
        life.directory.fail(op, errno.EIO, passes=passes, times=1)
        self.faulty = self.degraded = True
        for last in (False, True):
            if how == "store":
                self.store([chain], LENGTH, True, crash)
            elif how == "remove":
                self.remove(KEYS[chain * LENGTH :][:LENGTH], crash, last)
            else:
                self.clear(crash, last)
            if self.life is not life:
                return
            self.heal()
            if self.life is not life:
                return
        self._restart(crash)

    @precondition(lambda self: self.faulty)
    @rule()
    def heal(self) -> None:
        self.life.directory.heal()
        lived, _ = self._run(asyncio.sleep(120))
        self.faulty = False
        if not lived:
            self._restart(None)
        else:
            assert self.life.tier.state == "ok", f"the tier does not come back: {self.life.tier.problem}"

    @rule(data=st.data())
    def flip(self, data: st.DataObject) -> None:
        """A bit of a stored record, which is read then unless it is in DRAM."""
        stored = sorted(
            (record for record in self.life.records() if record.state is SsdState.STORED),
            key=lambda record: record.slot,
        )
        if stored:
            record = data.draw(st.sampled_from(stored))
            at = data.draw(st.integers(0, record.slot_bytes - 1))
            self.life.directory.flip("slabs", record.slot * PAGE_BYTES + at, 1 << data.draw(st.integers(0, 7)))
            self.expected[record.key].durable = None
            self.degraded = True
            self.flipped.add(record.slot + at // PAGE_BYTES)
            self.get(record.key)

    # -------------------------------------------------------------- always

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "life"):
            assert not self.problems, self.problems
            errors = [error for error in self.life.log.errors if error[0] == "ssd_task_failed" or not self.degraded]
            assert not errors, errors
            self.life.check()


SsdCrashes.TestCase.settings = settings(stateful_step_count=40)
TestSsdCrashes = SsdCrashes.TestCase
