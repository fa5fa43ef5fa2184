"""Warming up: blocks on the SSD that are likely to be used come up into DRAM, by a list and as far as there is room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from kvstore.core.block import Block
from kvstore.core.namespaces import NamespaceState
from kvstore.core.store import Store
from kvstore.errors import InvalidArgument, SettingsError
from kvstore.format.warm_list import parse_warm_list
from kvstore.observability.logs import Log
from kvstore.policy.prefetch import Outcome
from kvstore.protocol.messages import TierId
from kvstore.server.below import Below
from kvstore.server.chains import list_chains
from kvstore.sizes import parse_size
from kvstore.tiers.files import read_lines

__all__ = ["WarmOutcome", "Warmup", "log_failure", "namespace_of_digest", "warm"]

_AT_ONCE: Final = 512
"""Keys that are warmed together at the start."""

_START_S: Final = 600.0
"""Longest that warming at the start goes on."""


@dataclass(slots=True)
class WarmOutcome:
    """What became of the blocks of a list; see ``Warmed``."""

    brought: int = 0
    brought_bytes: int = 0
    there: int = 0
    unknown: int = 0
    no_room: int = 0
    failed: int = 0

    def add(self, other: WarmOutcome) -> None:
        """Count another list's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def namespace_of_digest(store: Store, digest: bytes) -> NamespaceState | None:
    """The namespace whose current generation's digest begins like that.

    Raises:
        InvalidArgument: several do.
    """
    found = [one for one in store.namespaces.by_id.values() if one.current and one.digest.startswith(digest)]
    if len(found) > 1:
        raise InvalidArgument(f"{len(found)} namespaces have a digest that begins with {digest.hex()}; give more of it")
    return found[0] if found else None


async def warm(
    below: Below,
    namespace: NamespaceState | None,
    keys: list[bytes],
    deadline_ns: int,
    session: int = 0,
    *,
    evict: bool = False,
    budget_bytes: int = 0,
) -> WarmOutcome:
    """Bring blocks up; ends when each of them is there, or will not come.

    Args:
        below: the tiers.
        namespace: whose blocks they are; None: none is known.
        keys: parents before their children.
        deadline_ns: when that must have ended.
        session: the client's, 0 for the daemon itself.
        evict: others may leave for them; else they take free room only, and are as old as their copies.
        budget_bytes: most bytes of slots to bring up; 0: as there is room.
    """
    outcome = WarmOutcome()
    if namespace is None:
        outcome.unknown = len(keys)
        return outcome
    lacking = {block.key: block for block in below.lacking(namespace, keys)}
    for key in keys:
        if key not in lacking:
            block = namespace.blocks.get(key)
            known = block is not None and block.complete
            outcome.there += known
            outcome.unknown += not known
    wanted = list(lacking.values())
    some = below.within(wanted, budget_bytes, evict=evict)
    outcome.no_room = len(wanted) - len(some)
    if some:
        results = await below.loads.warm(namespace, some, deadline_ns, session, only_free=not evict)
        for copy in some:
            block = namespace.blocks.get(copy.key)
            if block is not None and _has(block, copy.parts):
                outcome.brought += 1
                outcome.brought_bytes += block.slot_bytes
            elif copy.parts and not results[Outcome.LOST]:
                outcome.no_room += 1
            else:
                outcome.failed += 1
    return outcome


def _known(store: Store, digest: bytes) -> NamespaceState | None:
    """The namespace of a list's digest, None where the list names none, or not one."""
    try:
        return namespace_of_digest(store, digest) if digest else None
    except InvalidArgument:
        return None


def _has(block: Block, parts: Iterable[int]) -> bool:
    return all(part in block.parts for part in parts)


class Warmup:
    """What ``ssd.warm`` asks for at the start.

    Args:
        setting: "hottest"; a size: the hottest blocks that take so much; or the path of a list.

    Raises:
        SettingsError: it is none of these, or the list cannot be read.
    """

    def __init__(self, setting: str) -> None:
        self.budget_bytes = 0
        self._chains: list[tuple[bytes, list[bytes]]] | None = None
        if setting == "hottest":
            return
        if not setting.startswith("/"):
            self.budget_bytes = parse_size(setting)
            return
        try:
            self._chains = [(chain.digest, chain.keys) for chain in parse_warm_list(read_lines(setting), setting)]
        except (OSError, UnicodeDecodeError, InvalidArgument) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f"ssd.warm: cannot use {setting}: {why}") from None

    async def run(self, below: Below, store: Store, clock: Callable[[], int], log: Log) -> WarmOutcome:
        """Bring blocks up until the list ends or there is no room left; says in the log what became of them."""
        outcome = WarmOutcome()
        began = time.monotonic()
        deadline_ns = clock() + int(_START_S * 1e9)
        for namespace, keys in await self._batches(store):
            if clock() >= deadline_ns:
                break
            left_bytes = self.budget_bytes - outcome.brought_bytes if self.budget_bytes else 0
            some = await warm(below, namespace, keys, deadline_ns, budget_bytes=left_bytes)
            outcome.add(some)
            if some.no_room:
                # What comes now is worth less.
                break
        log.info(
            "warmed",
            blocks=outcome.brought,
            bytes=outcome.brought_bytes,
            there=outcome.there,
            unknown=outcome.unknown,
            no_room=outcome.no_room,
            failed=outcome.failed,
            seconds=round(time.monotonic() - began, 3),
        )
        return outcome

    async def _batches(self, store: Store) -> list[tuple[NamespaceState | None, list[bytes]]]:
        """Keys of one namespace each, the hottest first."""
        found: list[tuple[NamespaceState | None, list[bytes]]]
        if self._chains is None:
            listed = await list_chains(store, TierId.SSD, self.budget_bytes)
            found = [(store.namespaces.by_id.get(identity), keys) for identity, keys in listed.segments()]
        else:
            found = [(_known(store, digest), keys) for digest, keys in self._chains]
        batches: list[tuple[NamespaceState | None, list[bytes]]] = []
        for namespace, keys in found:
            if batches and batches[-1][0] is namespace and len(batches[-1][1]) + len(keys) <= _AT_ONCE:
                batches[-1][1].extend(keys)
            else:
                batches.append((namespace, list(keys)))
        return batches


def log_failure(log: Log, task: asyncio.Task[WarmOutcome]) -> None:
    """Say that warming up ended with a defect of ours."""
    if not task.cancelled() and task.exception() is not None:
        error = task.exception()
        log.error("warming_failed", error=repr(error), exc_info=error)
