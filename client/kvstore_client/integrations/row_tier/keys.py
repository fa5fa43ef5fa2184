"""Keys of an offloading engine as block keys, and which block comes before which.

An offload key is a block hash and, behind it, the index of a KV group as four big-endian bytes. The engine hands keys
of a job over as a set; where each block ends in its prompt says their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from kvstore.protocol.keys import KEY_BYTES, BlockKey

__all__ = ["Chain", "Positions", "block_key", "chains", "group_of"]

_GROUP_BYTES: Final = 4
_PREFIX: Final = b"kvstore offload key 1\0"

OffloadKey = bytes


def group_of(key: OffloadKey) -> int:
    """Index of the KV group."""
    return int.from_bytes(key[-_GROUP_BYTES:], "big")


def block_key(key: OffloadKey) -> BlockKey:
    """The 32 bytes under which a block is stored.

    Group 0 with hashes of 32 bytes: the hash as it is, as event streams name it too. Other groups and other hashes: the
    sha256 of all of it. A group has keys of its own, not parts of one block: groups with windows store fewer blocks
    than others, and a block with a part that is never stored would never be complete.
    """
    if len(key) == KEY_BYTES + _GROUP_BYTES and not any(key[-_GROUP_BYTES:]):
        return key[:KEY_BYTES]
    return sha256(_PREFIX + key).digest()


@dataclass(slots=True)
class Positions:
    """Which block of a request ends where; grows with the request."""

    _keys: dict[tuple[int, int], OffloadKey] = field(default_factory=dict)

    def note(self, key: OffloadKey, end_token: int | None) -> None:
        """Take over where a block ends, if that is known."""
        if end_token is not None:
            self._keys[group_of(key), end_token] = key

    def note_all(self, ends: Mapping[OffloadKey, int]) -> None:
        """Take over all of a request's blocks."""
        for key, end_token in ends.items():
            self._keys[group_of(key), end_token] = key

    def at(self, group: int, end_token: int) -> OffloadKey | None:
        """The block of a group that ends there, if it is known."""
        return self._keys.get((group, end_token))


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks one behind the other, and where their bytes are.

    Attributes:
        parent: key of the block before the first; None for a prompt's first block, and where it is not known.
        keys: of the blocks.
        rows: of the host buffer.
        offload_keys: as the engine named them.
    """

    parent: BlockKey | None
    keys: list[BlockKey]
    rows: list[int]
    offload_keys: list[OffloadKey]


def chains(
    keys: Sequence[OffloadKey],
    rows: Sequence[int],
    end_of: Callable[[OffloadKey], int | None],
    block_tokens: Mapping[int, int],
    before: Callable[[int, int], OffloadKey | None],
) -> list[Chain]:
    """Sort the blocks of a store into chains.

    Args:
        keys: in any order.
        rows: of each.
        end_of: the token at which a block ends in its prompt, None where that is not known: it is a chain of its own.
        block_tokens: tokens of a block of each group.
        before: the block of a group that ends at a token, None where that is not known.
    """
    placed: list[tuple[int, int, OffloadKey, int]] = []
    found: list[Chain] = []
    for key, row in zip(keys, rows, strict=True):
        end = end_of(key)
        if end is None:
            found.append(Chain(None, [block_key(key)], [row], [key]))
        else:
            placed.append((group_of(key), end, key, row))
    placed.sort(key=lambda each: each[:2])
    previous: tuple[int, int] | None = None
    for group, end, key, row in placed:
        start = end - block_tokens.get(group, 0)
        if previous != (group, start):
            parent = before(group, start)
            found.append(Chain(None if parent is None else block_key(parent), [], [], []))
        chain = found[-1]
        chain.keys.append(block_key(key))
        chain.rows.append(row)
        chain.offload_keys.append(key)
        previous = (group, end)
    return found
