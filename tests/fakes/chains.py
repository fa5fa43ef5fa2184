"""Blocks of prefix trees as watchers of the store see them, without a store; and loads of requests made of them."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from kvstore.core.watching import Watcher

SLOT_BYTES = 65_536


@dataclass(eq=False)
class Space:
    id: int = 1


SPACE = Space()


@dataclass(eq=False)
class Link:
    key: bytes
    depth: int
    parent: Link | None
    slot_bytes: int = SLOT_BYTES
    namespace: Space = SPACE


class Chains:
    """All blocks that were ever asked for, by the number that stands for a prefix."""

    def __init__(self, slot_bytes: int = SLOT_BYTES) -> None:
        self._links: dict[int, Link] = {}
        self._slot_bytes = slot_bytes

    def known(self, ids: Sequence[int]) -> int:
        """How many leading blocks were asked for before."""
        return next((index for index, number in enumerate(ids) if number not in self._links), len(ids))

    def links(self, ids: Sequence[int]) -> list[Link]:
        """The blocks of a request, made where they are new."""
        made: list[Link] = []
        for depth, number in enumerate(ids):
            link = self._links.get(number)
            if link is None:
                parent = made[-1] if made else None
                link = Link(sha256(number.to_bytes(8)).digest(), depth, parent, self._slot_bytes)
                self._links[number] = link
            made.append(link)
        return made


def ask(watcher: Watcher, chains: Chains, ids: Sequence[int], access: int, told: int | None = None) -> None:
    """An engine request as a store with room for everything tells it: a match, then puts of what is new.

    Args:
        watcher: is told.
        chains: the blocks.
        ids: the request's.
        access: its number.
        told: missing keys that the match names; None: all.
    """
    hits = chains.known(ids)
    links = chains.links(ids)
    runs = [(links[hits - 1], hits)] if hits else []
    missing = [link.key for link in links[hits:]][:told]
    watcher.accessed(1, access, runs, len(ids), missing)  # type: ignore[arg-type]
    for link in links[hits:]:
        watcher.stored(link, access, promoted=False)  # type: ignore[arg-type]


def chat_load(requests: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Requests of chat sessions as (seconds, block numbers): four system prompts of eight blocks, turns that come back
    after a minute or so, and many that never do.
    """
    rng = random.Random(seed)
    numbers = iter(range(1, 1 << 40))
    prompts = [[next(numbers) for _ in range(8)] for _ in range(4)]
    waiting: list[tuple[float, list[int]]] = []
    now = 0.0
    for _ in range(requests):
        now += rng.expovariate(2.0)
        due = [one for one in waiting if one[0] <= now]
        if due and rng.random() < 0.6:
            waiting.remove(due[0])
            ids = due[0][1]
        else:
            ids = prompts[min(rng.randrange(10), 3)]
        ids = [*ids, *(next(numbers) for _ in range(rng.randrange(1, 12)))]
        if rng.random() < 0.7:
            waiting.append((now + rng.expovariate(1 / 90), ids))
        yield now, ids


def lru_hit_rate(load: Sequence[tuple[float, Sequence[int]]], capacity_blocks: int) -> float:
    """Usable prefix hits of a tail-first LRU, exactly."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for _, ids in load:
        asked += len(ids)
        hits += next((index for index, number in enumerate(ids) if number not in held), len(ids))
        for number in reversed(ids):
            held.pop(number, None)
            held[number] = None
        while len(held) > capacity_blocks:
            held.popitem(last=False)
    return hits / asked
