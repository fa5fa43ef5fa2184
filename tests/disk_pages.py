"""Pages of letters, for tests of files of slots."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

PAGE_BYTES = 4096


class Slabs(Protocol):
    """``SlabFile`` or its twin, as far as these need it."""

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None: ...


def pages(*letters: str) -> list[memoryview]:
    """Aligned buffers of one page, each full of its letter."""
    memory = memoryview(mmap.mmap(-1, max(len(letters), 1) * PAGE_BYTES))
    found = [memory[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] for at in range(len(letters))]
    for page, letter in zip(found, letters, strict=True):
        page[:] = letter.encode() * PAGE_BYTES
    return found


def read_pages(slabs: Slabs, first: int, count: int) -> str:
    """The letters of pages of a slab file; a zero byte is ``.``, and a page of several letters is shown by all."""
    found = pages(*"?" * count)
    slabs.read(first * PAGE_BYTES, found)
    return "".join("".join(sorted({chr(byte) for byte in set(page)})) for page in found).replace("\0", ".")
