"""What a client of a daemon stage does: every operation of the SDK at random, every byte of every hit checked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import numpy as np

from kvstore.cli.stress.profile import Blocks, Buffer
from kvstore.errors import ConnectionLost, DaemonUnavailable, DeadlineExceeded, Throttled
from kvstore_client import AsyncClient, Client
from kvstore_client.results import FlushResult, MatchResult

__all__ = ["Actor", "Tally", "Verbs"]

_CANCELLED: Final = 0.05
_CANCELLED_AFTER_S: Final = 0.005
_PASSES: Final = 4
_BUFFERS: Final = 6
_MAX_VIEWS: Final = 5
_PATIENT: Final = 0.15
"""Share of actors that begin with holding views for long."""

_PATIENT_PASSES: Final = 10
_ALL_VIEWS: Final = 40
_PATIENCE_S: Final = 2.2
_AWAY_S: Final = 0.02


class Tally:
    """Counts of one process, by name, and its slowest operation. For several threads."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.slowest_s = 0.0
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + count

    def add_hit(self, wrong_bytes: int, what: str) -> None:
        """Count a hit that was checked."""
        self.add("hits")
        if wrong_bytes:
            self.add("wrong_blocks")
            self.add("wrong_bytes", wrong_bytes)
            self.add(f"wrong by {what}")


class Verbs:
    """The two clients under one interface: a blocking client's methods as coroutines that never wait."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self._sync = client if isinstance(client, Client) else None
        self._async = client if isinstance(client, AsyncClient) else None

    @property
    def can_be_cancelled(self) -> bool:
        """Whether operations can be cancelled while they wait."""
        return self._async is not None

    async def match(self, keys: list[bytes], lease: float | None) -> MatchResult:
        """``match``; a lease is given back by expiring."""
        if self._sync is not None:
            return self._sync.match(keys, lease=lease)
        assert self._async is not None
        return await self._async.match(keys, lease=lease)

    async def get_into(self, key: bytes, out: memoryview) -> int | None:
        """``get_into``."""
        if self._sync is not None:
            return self._sync.get_into(key, out)
        assert self._async is not None
        return await self._async.get_into(key, out)

    async def get_many_into(self, keys: list[bytes], outs: list[memoryview], request: int) -> list[int | None]:
        """``get_many_into``."""
        if self._sync is not None:
            return self._sync.get_many_into(keys, outs, request=request)
        assert self._async is not None
        return await self._async.get_many_into(keys, outs, request=request)

    @contextlib.asynccontextmanager
    async def view(self, key: bytes) -> AsyncIterator[memoryview | None]:
        """``view``."""
        if self._sync is not None:
            with self._sync.view(key) as data:
                yield data
        else:
            assert self._async is not None
            async with self._async.view(key) as data:
                yield data

    async def put(self, key: bytes, data: memoryview, parent: bytes | None, wait: bool) -> None:
        """``put``."""
        if self._sync is not None:
            self._sync.put(key, data, parent=parent, wait=wait)
        else:
            assert self._async is not None
            await self._async.put(key, data, parent=parent, wait=wait)

    async def put_many(
        self, keys: list[bytes], datas: list[memoryview], parent: bytes | None, wait: bool, request: int
    ) -> None:
        """``put_many``."""
        if self._sync is not None:
            self._sync.put_many(keys, datas, parent=parent, wait=wait, request=request)
        else:
            assert self._async is not None
            await self._async.put_many(keys, datas, parent=parent, wait=wait, request=request)

    async def remove(self, keys: list[bytes]) -> int:
        """``remove``."""
        if self._sync is not None:
            return self._sync.remove(keys)
        assert self._async is not None
        return await self._async.remove(keys)

    async def clear(self) -> int:
        """``clear``."""
        if self._sync is not None:
            return self._sync.clear()
        assert self._async is not None
        return await self._async.clear()

    async def flush(self) -> FlushResult:
        """``flush``."""
        if self._sync is not None:
            return self._sync.flush()
        assert self._async is not None
        return await self._async.flush()


class Actor:
    """One thread of actions with buffers of its own.

    Args:
        verbs: of a client, which other actors may share.
        blocks: to put and get.
        rng: chooses.
        tally: where it counts, shared with the other actors of the process.
    """

    def __init__(self, verbs: Verbs, blocks: Blocks, rng: random.Random, tally: Tally) -> None:
        self._verbs = verbs
        self._blocks = blocks
        self._rng = rng
        self._tally = tally
        self._buffers = [Buffer(blocks.max_length) for _ in range(_BUFFERS)]

    async def act(self, ends: Callable[[], bool]) -> None:
        """Act until ``ends()``; a daemon that is away or busy is no error, one that is late is."""
        # Not kept: an actor that refers to itself would live on with all its buffers.
        weighted = (
            (35, self.request),
            (15, self.get),
            (25, self.view),
            (20, self.put),
            (3, self.remove),
            (2, self.flush),
            (0.02, self.clear),
        )
        weights, actions = zip(*weighted, strict=True)
        patient = self._rng.random() < _PATIENT
        self._tally.add("patient", patient)
        while not ends():
            begin = time.monotonic()
            action = self.hold if patient else self._rng.choices(actions, weights)[0]
            patient = False
            try:
                if self._verbs.can_be_cancelled and self._rng.random() < _CANCELLED:
                    await asyncio.wait_for(action(), self._rng.uniform(0.0, _CANCELLED_AFTER_S))
                else:
                    await action()
            except Throttled:
                self._tally.add("throttled")
            except (DaemonUnavailable, ConnectionLost):
                self._tally.add("unavailable")
                await asyncio.sleep(_AWAY_S)
            except DeadlineExceeded:
                self._tally.add("late")
            except TimeoutError:
                self._tally.add("cancelled")
            if action != self.hold:
                self._tally.slowest_s = max(self._tally.slowest_s, time.monotonic() - begin)
            await asyncio.sleep(0)  # a mapped operation never waits: let the others in

    def _any(self) -> int:
        return self._rng.randrange(len(self._blocks))

    async def request(self) -> None:
        """An engine's request: match a prompt, get what is there, put the rest."""
        blocks, numbers = self._blocks, list(self._blocks.chain(self._rng.randrange(self._blocks.prompts)))
        keys = [blocks.key(number) for number in numbers]
        match = await self._verbs.match(keys, self._rng.choice([None, None, None, 0.05]))
        hits = len(match)
        if hits:
            buffers = self._buffers[:hits]
            outs = [buffer.prepare(blocks, number) for buffer, number in zip(buffers, numbers, strict=False)]
            lengths = await self._verbs.get_many_into(keys[:hits], outs, match.request)
            self._tally.add("reads", hits)
            for buffer, number, length in zip(buffers, numbers, lengths, strict=False):
                if length is not None:
                    self._tally.add_hit(buffer.wrong_bytes(blocks, number, length), "get_many_into")
        rest = numbers[hits : self._rng.randint(hits, len(numbers))]
        if rest:
            datas = [buffer.write(blocks, number) for buffer, number in zip(self._buffers, rest, strict=False)]
            wait = self._rng.random() < 0.3
            await self._verbs.put_many(
                [blocks.key(number) for number in rest], datas, blocks.parent(rest[0]), wait, match.request
            )
            self._tally.add("puts", len(rest))

    async def get(self) -> None:
        """One block."""
        number, buffer = self._any(), self._buffers[0]
        length = await self._verbs.get_into(self._blocks.key(number), buffer.prepare(self._blocks, number))
        self._tally.add("reads")
        if length is not None:
            self._tally.add_hit(buffer.wrong_bytes(self._blocks, number, length), "get_into")

    async def view(self) -> None:
        """Blocks read in place, several times over, while this client's and others' puts make room for themselves."""
        await self._read_in_place(self._rng.randint(1, _MAX_VIEWS), _PASSES)

    async def hold(self) -> None:
        """As many views as the client gets, for longer than the daemon takes to look at who holds what."""
        await self._read_in_place(_ALL_VIEWS, _PATIENT_PASSES)

    async def _read_in_place(self, views: int, passes: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            held: list[tuple[int, memoryview]] = []
            for _ in range(views):
                number = self._any()
                data = await stack.enter_async_context(self._verbs.view(self._blocks.key(number)))
                self._tally.add("reads")
                if data is not None:
                    held.append((number, data))
            worst = [0] * len(held)
            for turn in range(passes):
                for at, (number, data) in enumerate(held):
                    worst[at] = max(worst[at], self._wrong_in(number, data))
                if turn and passes > _PASSES:
                    await asyncio.sleep(_PATIENCE_S / passes)
                if turn == 0 or passes > _PASSES:
                    await self.put()
            for wrong in worst:
                self._tally.add_hit(wrong, "view")
            del held

    def _wrong_in(self, number: int, data: memoryview) -> int:
        # An array made from a view must be gone before the view is.
        address = int(np.frombuffer(data, np.uint8).ctypes.data)
        if address % 8:  # received over the socket: anywhere
            copy = np.frombuffer(bytes(data) + bytes(8), np.uint8).copy()
            return self._blocks.wrong_bytes(int(copy.ctypes.data), len(data), copy.data, number)
        return self._blocks.wrong_bytes(address, len(data), data, number)

    async def put(self) -> None:
        """One block that nobody waits for; its buffer is used again at once."""
        number, buffer = self._any(), self._buffers[-1]
        await self._verbs.put(
            self._blocks.key(number), buffer.write(self._blocks, number), self._blocks.parent(number), False
        )
        buffer.prepare(self._blocks, number)
        self._tally.add("puts")

    async def remove(self) -> None:
        """Some blocks, so that slabs get holes."""
        removed = await self._verbs.remove([self._blocks.key(self._any()) for _ in range(4)])
        self._tally.add("removed", removed)

    async def flush(self) -> None:
        """Learn what became of puts that nobody waited for."""
        self._tally.add("lost", (await self._verbs.flush()).lost)

    async def clear(self) -> None:
        """All blocks at once, whoever reads them."""
        self._tally.add("removed", await self._verbs.clear())
