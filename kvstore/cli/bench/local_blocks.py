"""What the local benchmark reads and writes: stored blocks with known bytes and places, and buffers of the client's.

Covers: storing a set, finding where its blocks lie in the client's own mapping, checking bytes, page-aligned buffers
whose pages are there. Does not cover timing.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.cli.block_bytes import BlockBytes
from kvstore.errors import ErrorCode, RemoteError, Throttled
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.record import Buffer, checksum
from kvstore.protocol.keys import KEY_BYTES, chain_keys
from kvstore_client import Client
from kvstore_client.mapped_session import MappedSession

__all__ = [
    "CHAIN_BLOCKS",
    "Buffers",
    "Bytes",
    "StoredBlocks",
    "address_in_place",
    "mapping_of",
    "touch_mapping",
    "wrong",
]

Bytes = npt.NDArray[np.uint8]

CHAIN_BLOCKS: Final = 64
"""Blocks of one chain (a prompt); batches are consecutive blocks of one."""


def wrong(what: str) -> RemoteError:
    """The error for bytes or answers that are not what they must be: such a measurement is worth nothing."""
    return RemoteError(ErrorCode.INTERNAL, what)


def mapping_of(client: Client) -> MappedSession:
    """The client's mapping: baselines work on the very memory that the client works on.

    Raises:
        RemoteError: it has none (any more).
    """
    mapped = client._mapped
    if mapped is None:
        raise wrong(f"the client lost its mapping: {client.unmapped}")
    return mapped


def touch_mapping(client: Client) -> None:
    """Have every page of the client's mapping in its page tables: a first touch costs 0.1 to 0.5 us a page, once."""
    mapped = mapping_of(client)
    int(mapped._arena_bytes[::PAGE_BYTES].sum())
    int(mapped._index_words[:: PAGE_BYTES // 8].sum())


def address_in_place(data: memoryview) -> int:
    """Address of a view's first byte."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)


class Buffers:
    """Page-aligned buffers of one size whose pages are there, handed out in a random but constant order.

    Args:
        size_bytes: of each.
        count: how many.
        memory: other buffers of the same size, whose memory these are; None for memory of their own.
        begin: the first of those.
    """

    def __init__(self, size_bytes: int, count: int, memory: Buffers | None = None, begin: int = 0) -> None:
        self.size_bytes = size_bytes
        if memory is None:
            stride = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
            private = mmap.mmap(-1, stride * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            whole = np.frombuffer(private, np.uint8)
            whole[::PAGE_BYTES] = 1
            self.arrays: list[Bytes] = [whole[at : at + size_bytes] for at in range(0, stride * count, stride)]
        else:
            self.arrays = memory.arrays[begin : begin + count]
        self.addresses: list[int] = [int(array.ctypes.data) for array in self.arrays]
        self._order = random.Random(count).sample(range(count), count)
        self._next = 0

    def derive(self) -> None:
        """Fill each with bytes that derive from its number."""
        derived = BlockBytes(self.size_bytes, 1)
        for number, array in enumerate(self.arrays, 1):
            array[:] = np.frombuffer(derived.derive([number.to_bytes(KEY_BYTES, "big")])[0], np.uint8)

    def take(self, count: int) -> list[int]:
        """Numbers of the next buffers; whoever shares this object goes on from there."""
        begin, self._next = self._next, (self._next + count) % len(self._order)
        return [self._order[(begin + index) % len(self._order)] for index in range(count)]


class StoredBlocks:
    """A set of blocks in the store, whose bytes derive from their keys.

    Attributes:
        keys: in chains of ``CHAIN_BLOCKS``, one after the other.
        addresses: of each block's payload in the client's mapping.
        checksums: of each block's payload (xxh3_64).

    Args:
        client: puts and checks them.
        size_bytes: payload of each.
        count: how many.

    Raises:
        Throttled: the daemon did not take them all.
        RemoteError: one of them is not there, or not right.
    """

    def __init__(self, client: Client, size_bytes: int, count: int) -> None:
        self._client = client
        self.size_bytes = size_bytes
        self._bytes = BlockBytes(size_bytes, 1)
        self.keys: list[bytes] = []
        self.checksums: list[int] = []
        for begin in range(0, count, CHAIN_BLOCKS):
            length = min(CHAIN_BLOCKS, count - begin)
            chain = chain_keys(range(length), 1, salt=f"{size_bytes} {begin}".encode())
            parent = None
            for key in chain:
                payload = self._bytes.derive([key])[0]
                self.checksums.append(checksum(payload))
                client.put(key, payload, parent=parent, wait=False)
                parent = key
            self.keys += chain
        flushed = client.flush()
        if flushed.stored != count:
            raise Throttled(f"the daemon stored {flushed.stored} of {count} blocks of {size_bytes} bytes: {flushed}")
        self.addresses = self._find()

    def __len__(self) -> int:
        return len(self.keys)

    def _find(self) -> list[int]:
        found: list[int] = []
        for key in self.keys:
            with self._client.view(key) as data:
                if data is None:
                    raise wrong(f"block {key.hex()} was stored and is not there")
                found.append(address_in_place(data))
        return found

    def check_places(self) -> None:
        """Look whether every block still lies where it lay: else a baseline read something else."""
        if self._find() != self.addresses:
            raise wrong("the daemon moved blocks while they were measured; the baseline read other bytes")

    def check_all(self) -> None:
        """Read every block, by ``get_into``, ``view`` and in place, and compare every byte.

        Raises:
            RemoteError: a byte is wrong.
        """
        out = np.zeros(self.size_bytes, np.uint8)
        for key in self.keys:
            expected = np.frombuffer(self._bytes.derive([key])[0], np.uint8)
            out[:] = 0xA5
            length = self._client.get_into(key, out)
            if length != self.size_bytes or not np.array_equal(out, expected):
                raise wrong(f"get_into of {key.hex()} gave wrong bytes (length {length})")
            with self._client.view(key) as data:
                if data is None or not np.array_equal(np.frombuffer(data, np.uint8), expected):
                    raise wrong(f"view of {key.hex()} showed wrong bytes")

    def check(self, numbers: Sequence[int], buffers: Sequence[Buffer], what: str) -> None:
        """Compare buffers with what the blocks of these numbers hold, by their checksums.

        Raises:
            RemoteError: naming what read them.
        """
        for number, buffer in zip(numbers, buffers, strict=True):
            if checksum(buffer) != self.checksums[number]:
                raise wrong(f"{what} of {self.keys[number].hex()} gave wrong bytes")
