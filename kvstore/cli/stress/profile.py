"""Blocks of a daemon stage: prompts of chained keys, sizes, and payloads that follow from the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore.cli.stress.pattern import KeyTable, count_wrong, expected_tail, fill, spoil

__all__ = ["PROFILES", "Blocks", "Buffer", "Profile"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
DEPTH: Final = 6
"""Blocks of one prompt."""

_GUARD: Final = bytes(range(1, 17))
"""What stands behind a block in a buffer, before and after a read."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes and number of the blocks: more than the daemon holds, so that it evicts all the time."""

    name: str
    lengths: tuple[int, ...]
    prompts: int


PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("64 KiB", (64 * KIB,), 180),
        Profile("1 MiB", (MIB,), 12),
        Profile(
            "mixed",
            # More sizes than a client has lanes; some take the same slots, some do not fill whole words or pages.
            (3840, 64 * KIB, MIB, 20_001, 65_000, 150_003, 256 * KIB, 400_000, 4, 512 * KIB, 700_007, 30_000, 100_001),
            60,
        ),
    )
}
"""By name."""


class Blocks:
    """All blocks of a profile.

    Args:
        profile: whose.
    """

    def __init__(self, profile: Profile) -> None:
        count = profile.prompts * DEPTH
        self.prompts = profile.prompts
        self.table = KeyTable(profile.name, [profile.lengths[at % len(profile.lengths)] for at in range(count)])
        self.max_length = max(profile.lengths)

    def __len__(self) -> int:
        return len(self.table)

    def chain(self, prompt: int) -> range:
        """Numbers of a prompt's blocks, from the first on."""
        return range(prompt * DEPTH, (prompt + 1) * DEPTH)

    def key(self, number: int) -> bytes:
        """A block's key."""
        return self.table.keys[number]

    def parent(self, number: int) -> bytes | None:
        """The key of the block before it in its prompt."""
        return self.table.keys[number - 1] if number % DEPTH else None

    def wrong_bytes(self, address: int, length: int, data: memoryview, number: int) -> int:
        """How many bytes of a hit are not the block's, counted by the word.

        Args:
            address: of the data, aligned to 8.
            length: that the store named.
            data: the same memory, for the bytes behind the last whole word.
            number: of the block.
        """
        expected = self.table.lengths[number]
        if length != expected:
            return expected
        wrong = 8 * count_wrong(address, length, self.table.row(number))
        tail = expected_tail(self.key(number), length)
        return wrong + (bytes(data[length - len(tail) : length]) != tail)


class Buffer:
    """Memory for one block, aligned to 64 bytes."""

    def __init__(self, max_length: int) -> None:
        self._memory = np.zeros(max_length + 64 + len(_GUARD), np.uint8)
        begin = -int(self._memory.ctypes.data) % 64
        self.data = self._memory.data[begin:]
        self.address = int(self._memory.ctypes.data) + begin

    def write(self, blocks: Blocks, number: int) -> memoryview:
        """Make it a block's payload."""
        length = blocks.table.lengths[number]
        fill(self.address, length, blocks.table.row(number))
        tail = expected_tail(blocks.key(number), length)
        self.data[length - len(tail) : length] = tail
        return self.data[:length]

    def prepare(self, blocks: Blocks, number: int) -> memoryview:
        """Make it a target for a block: what it held is spoiled, and what lies behind the block is known."""
        length = blocks.table.lengths[number]
        spoil(self.address, length)
        self.data[max(length - 8, 0) : length] = bytes(min(length, 8))
        self.data[length : length + len(_GUARD)] = _GUARD
        return self.data[:length]

    def wrong_bytes(self, blocks: Blocks, number: int, length: int) -> int:
        """Of a block that was read into it; bytes written behind it count as well."""
        expected = blocks.table.lengths[number]
        overrun = bytes(self.data[expected : expected + len(_GUARD)]) != _GUARD
        return blocks.wrong_bytes(self.address, length, self.data, number) + 8 * overrun
