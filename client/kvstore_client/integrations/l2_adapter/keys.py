"""Objects' keys as block keys, and which chunk of a prompt comes before which."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import Final, NamedTuple, Protocol

from kvstore.protocol.keys import BlockKey

__all__ = ["Chains", "Named", "ObjectName", "named"]

_PREFIX: Final = b"kvstore l2 object 1\0"
_MOST_LINKS: Final = 65536
"""Chunks of which the one before them is remembered until they are stored."""


class ObjectName(Protocol):
    """What identifies an object, as LMCache's ``ObjectKey`` does."""

    @property
    def chunk_hash(self) -> bytes:
        """Of the chunk and all before it."""

    @property
    def model_name(self) -> str:
        """As served."""

    @property
    def kv_rank(self) -> int:
        """World size and rank, packed."""

    @property
    def object_group_id(self) -> int:
        """KV group."""

    @property
    def cache_salt(self) -> str:
        """Keeps users apart."""


class Named(NamedTuple):
    """An object's key as the store has it, and what it is one of.

    Attributes:
        key: 32 bytes.
        model: as served.
        group: KV group.
        row: what all chunks of one prompt have in common: model, rank, group, salt.
    """

    key: BlockKey
    model: str
    group: int
    row: tuple[str, int, int, str]


def named(name: ObjectName) -> Named:
    """The block key of an object: sha256 of all that identifies it, each field with its length before it."""
    digest = sha256(_PREFIX)
    for field in (
        bytes(name.chunk_hash),
        name.model_name.encode("utf-8", "surrogatepass"),
        name.cache_salt.encode("utf-8", "surrogatepass"),
        str(name.kv_rank).encode(),
        str(name.object_group_id).encode(),
    ):
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    row = (name.model_name, name.kv_rank, name.object_group_id, name.cache_salt)
    return Named(digest.digest(), name.model_name, name.object_group_id, row)


class Chains:
    """Which chunk comes before which, learned from lookups: these name a prompt's chunks in order, stores do not.

    The daemon then evicts the end of a prompt before its beginning. Bounded; thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: OrderedDict[BlockKey, BlockKey] = OrderedDict()

    def learn(self, names: Sequence[Named], found: Sequence[bool]) -> None:
        """Remember the links of chunks that were not found: they are what is stored next."""
        with self._lock:
            for index in range(1, len(names)):
                before, name = names[index - 1], names[index]
                if not found[index] and before.row == name.row and before.key != name.key:
                    self._before[name.key] = before.key
                    self._before.move_to_end(name.key)
            while len(self._before) > _MOST_LINKS:
                self._before.popitem(last=False)

    def runs(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey | None, slice]]:
        """Keys cut into runs, each with the key before its first: in a run each one's parent is the one before it."""
        with self._lock:
            before = [self._before.get(key) for key in keys]
        runs: list[tuple[BlockKey | None, slice]] = []
        start = 0
        for index in range(1, len(keys) + 1):
            if index == len(keys) or before[index] is None or before[index] != keys[index - 1]:
                if index > start:
                    runs.append((before[start], slice(start, index)))
                start = index
        return runs
