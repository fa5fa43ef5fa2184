"""A client process of a daemon stage: a blocking client, one that threads share, an asyncio one, for a second each."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import psutil

from kvstore.cli.stress.actor import Actor, Tally, Verbs
from kvstore.cli.stress.profile import PROFILES, Blocks
from kvstore.cli.stress.worker import Post
from kvstore.errors import KVStoreError
from kvstore_client import AsyncClient, Client

__all__ = ["NAMESPACE", "TIMEOUT_S", "client"]

NAMESPACE: Final = "stress"
TIMEOUT_S: Final = 10.0
_PROGRESS_S: Final = 0.2
_ACTORS: Final = 3
_LONGEST_LIFE_S: Final = 2.0


class Process:
    """All clients that this process makes one after the other.

    Args:
        post: hears how it goes, and says when to stop.
        endpoint: of the daemon.
        profile: see ``PROFILES``.
        seconds: how long to work.
        seed: of everything random.
    """

    def __init__(self, post: Post, endpoint: str, profile: str, seconds: float, seed: int) -> None:
        self._post = post
        self._endpoint = endpoint
        self._profile = PROFILES[profile]
        self._blocks = Blocks(self._profile)
        self._rng = random.Random(seed)
        self._end = time.monotonic() + seconds
        self._next_progress = 0.0
        self._life_end = 0.0
        self._main = threading.get_ident()
        self._self = psutil.Process()
        self._away = 0
        self.tally = Tally()

    def _ends(self) -> bool:
        """Whether the client of the moment has lived long enough; only the main thread talks to the starter."""
        now = time.monotonic()
        if threading.get_ident() == self._main:
            if now >= self._next_progress:
                self._next_progress = now + _PROGRESS_S
                self._post.send("progress", self.result())
            if self._post.stopped():
                self._end = 0.0
            away = self.tally.counts.get("unavailable", 0)
            if away != self._away:
                # The daemon was killed: this client is to live until it found the next one.
                self._away, self._life_end = away, now + _LONGEST_LIFE_S
        return now >= self._life_end or now >= self._end

    def result(self) -> dict[str, Any]:
        """What was counted so far, and what the process uses."""
        memory = self._self.memory_info()
        return {
            "counts": dict(self.tally.counts),
            "slowest_ms": int(self.tally.slowest_s * 1000),
            "private_bytes": memory.rss - memory.shared,
        }

    def run(self) -> None:
        """Live one client after the other until time is over."""
        ways: tuple[Callable[[dict[str, Any]], None], ...] = (self._blocking, self._threads, self._asyncio)
        number = self._rng.randrange(len(ways))
        while time.monotonic() < self._end and not self._post.stopped():
            number += 1
            self._life_end = time.monotonic() + self._rng.uniform(0.2, _LONGEST_LIFE_S)
            # Sizes that are declared get slots of their own size, from then on and for everybody.
            declared = self._profile.lengths if self._rng.random() < 0.3 else ()
            options = {"namespace": NAMESPACE, "timeout": TIMEOUT_S, "payload_bytes": declared, "mapped": True}
            try:
                ways[number % len(ways)](options)
            except KVStoreError as error:
                # Between two daemons. Whatever lasts is seen by the hits that are missing.
                self.tally.add(f"no client: {type(error).__name__}")
                time.sleep(0.05)

    def _note(self, client: Client | AsyncClient, greeted: int) -> None:
        """Count a client whose life ends; ``greeted``: the daemon of its beginning."""
        self.tally.add("reconnected", client.incarnation != greeted)
        self.tally.add("corrupt_records", client.corrupt_records)
        self.tally.add("clients")

    def _actor(self, verbs: Verbs) -> Actor:
        return Actor(verbs, self._blocks, random.Random(self._rng.random()), self.tally)

    def _blocking(self, options: dict[str, Any]) -> None:
        with Client(self._endpoint, **options) as client:
            greeted = client.incarnation
            asyncio.run(self._actor(Verbs(client)).act(self._ends))
            self._note(client, greeted)

    def _threads(self, options: dict[str, Any]) -> None:
        with Client(self._endpoint, **options) as client:
            greeted = client.incarnation
            actors = [self._actor(Verbs(client)) for _ in range(_ACTORS)]
            failed: list[BaseException] = []

            def act(actor: Actor) -> None:
                try:
                    asyncio.run(actor.act(self._ends))
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=act, args=(actor,)) for actor in actors[1:]]
            for thread in threads:
                thread.start()
            act(actors[0])
            for thread in threads:
                thread.join()
            self._note(client, greeted)
            if failed:
                raise failed[0]

    def _asyncio(self, options: dict[str, Any]) -> None:
        async def together() -> None:
            async with AsyncClient(self._endpoint, **options) as client:
                greeted = client.incarnation
                await asyncio.gather(*(self._actor(Verbs(client)).act(self._ends) for _ in range(_ACTORS)))
                self._note(client, greeted)

        asyncio.run(together())


def client(post: Post, *, endpoint: str, profile: str, seconds: float, seed: int) -> dict[str, Any]:
    """Role: use the daemon for so long; what came of it, also in between."""
    process = Process(post, endpoint, profile, seconds, seed)
    process.run()
    gc.collect()
    return process.result() | {"mappings": _arenas_mapped()}


def _arenas_mapped() -> int:
    """Arenas that this process still maps although it has no client any more."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        return len({line.split()[4] for line in maps if "/arena-" in line})
