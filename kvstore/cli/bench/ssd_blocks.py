"""Blocks that the SSD tier's benchmark puts, and finds again: chains by number, known to every process that counts.

Two kinds: ``RawBlocks``, plain bytes, and ``CodedBlocks``, KV of an engine as records of a codec. The KV is encoded
once, when the object is made, and its bytes are copied into each slot: what is measured is the way of records to the
SSD and back, not the codec (``kvstore bench codecs`` measures that).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from ctypes import memmove
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.cli.bench.codecs_memory import KVMemory
from kvstore.cli.bench.codecs_work import Payloads
from kvstore.cli.bench.local_blocks import Buffers, wrong
from kvstore.errors import Throttled
from kvstore.format.record import checksum
from kvstore.protocol.keys import KEY_BYTES, chain_keys
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client
from kvstore_client.tensors import TensorStore
from kvstore_client.tensors.backends import Backend
from kvstore_kernels import cpu
from kvstore_kernels.codecs import Codec, get_codec
from kvstore_kernels.encoded import EncodedBlocks
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

__all__ = ["BLOCK_BYTES", "CHAIN_BLOCKS", "CODEC", "Blocks", "CodedBlocks", "RawBlocks", "blocks_of", "keys_of"]

BLOCK_BYTES: Final = 1 << 20
"""Payload of a raw block."""

CHAIN_BLOCKS: Final = 32
CODEC: Final = "kivi4"

_TIMEOUT_S: Final = 60.0
_NAMESPACE: Final = Namespace(name="bench ssd")
_LAYOUT: Final = KVLayout(16, 8, 128, "bfloat16", 64)
"""4 MiB of KV, whose records are a little longer than 1 MiB."""

_DIFFERENT: Final = 8
"""Blocks of KV with different numbers; each stands several times in a chain."""

_RETRY_S: Final = 0.001


def keys_of(chain: int) -> list[bytes]:
    """Keys of the chain of a number."""
    return chain_keys(range(CHAIN_BLOCKS), 1, salt=b"bench ssd %d" % chain)


class Blocks(Protocol):
    """Chains of one kind of block, through a client of its own.

    Attributes:
        client: mapped.
        namespace: that it joined.
        codec: name, "" where blocks are plain bytes.
        block_bytes: of a block as an engine holds it.
        record_bytes: of its payload as it is stored.
    """

    client: Client
    namespace: Namespace
    codec: str
    block_bytes: int
    record_bytes: int

    def put(self, chain: int) -> None:
        """Store all blocks of a chain.

        Raises:
            Throttled: there was no room for them in time.
        """

    def check(self, chain: int) -> None:
        """Read all blocks of a chain and compare every byte.

        Raises:
            RemoteError: one is not there, or not what was put.
        """

    def close(self) -> None:
        """Close the connection."""


class RawBlocks:
    """Blocks of plain bytes: those of their place in the chain, with their key at the beginning.

    Args:
        endpoint: of the daemon.
    """

    def __init__(self, endpoint: str) -> None:
        self.codec = ""
        self.block_bytes = self.record_bytes = BLOCK_BYTES
        self.namespace = _NAMESPACE
        self.client = Client(
            endpoint, namespace=self.namespace, timeout=_TIMEOUT_S, mapped=True, payload_bytes=(BLOCK_BYTES,)
        )
        self._buffers = Buffers(BLOCK_BYTES, CHAIN_BLOCKS)
        self._buffers.derive()
        self._received = np.zeros(BLOCK_BYTES, np.uint8)

    def put(self, chain: int) -> None:
        """See ``Blocks``."""
        keys, arrays = keys_of(chain), self._buffers.arrays
        for key, array in zip(keys, arrays, strict=True):
            array.data[:KEY_BYTES] = key
        _check_stored(chain, self.client.put_many(keys, arrays))

    def check(self, chain: int) -> None:
        """See ``Blocks``."""
        received = self._received
        for key, array in zip(keys_of(chain), self._buffers.arrays, strict=True):
            received.fill(0xA5)
            length = self.client.get_into(key, received)
            same = received[:KEY_BYTES].tobytes() == key and np.array_equal(received[KEY_BYTES:], array[KEY_BYTES:])
            if length != BLOCK_BYTES or not same:
                raise wrong(f"block {key.hex()} of chain {chain} came from the SSD with wrong bytes (length {length})")

    def close(self) -> None:
        """See ``Blocks``."""
        self.client.close()


class _EncodedBefore:
    """Kernels whose encoder copies what was encoded before; for ``Backend``."""

    def __init__(self, payloads: Payloads, section_bytes: npt.NDArray[np.int64]) -> None:
        self._memory = payloads  # addresses keep nothing alive
        self._addresses = payloads.addresses.tolist()
        self._section_bytes = section_bytes
        self._lengths = section_bytes.sum(axis=1).tolist()
        self.decode = cpu.decode

    def encode(
        self, codec: Codec, kv: PagedKV, pages: npt.NDArray[np.int32], payloads: npt.NDArray[np.uint64], **options: Any
    ) -> EncodedBlocks:
        """As ``kvstore_kernels.cpu.encode``, of blocks of one page, whose id is the block's number."""
        numbers = pages[:, 0].tolist()
        for number, target in zip(numbers, payloads.tolist(), strict=True):
            memmove(target, self._addresses[number], self._lengths[number])
        return EncodedBlocks(self._section_bytes[numbers], np.zeros(len(numbers), np.int64))


class CodedBlocks:
    """KV of an engine as records of a codec, through a ``TensorStore``.

    Args:
        endpoint: of the daemon.
        codec: name.
        layout: of a block.

    Raises:
        InsufficientMemory: there is not enough for the KV.
    """

    def __init__(self, endpoint: str, codec: str = CODEC, layout: KVLayout = _LAYOUT) -> None:
        memory = KVMemory(layout, _DIFFERENT)
        self.codec = codec
        self.block_bytes = layout.block_bytes
        self._form, spec = memory.contiguous, get_codec(codec)
        payloads = Payloads(sum(spec.max_section_bytes(layout)), _DIFFERENT)
        encoded = cpu.encode(spec, self._form.source, self._form.pages, payloads.addresses)
        if encoded.void_groups.any():
            raise wrong(f"{codec} could not hold ordinary numbers")
        cpu.decode(spec, self._form.target, self._form.pages, payloads.addresses, encoded.section_bytes)
        self._decoded = [checksum(self._form.target_block(number).data) for number in range(_DIFFERENT)]
        self.record_bytes = int(encoded.section_bytes.sum()) // _DIFFERENT
        self._store = TensorStore(layout, codec, name="bench ssd", endpoint=endpoint, mapped=True, timeout=_TIMEOUT_S)
        self._store._backends["cpu"] = Backend(_EncodedBefore(payloads, encoded.section_bytes), threads=1)
        self.client = self._store.client
        self.namespace = self._store.namespace
        self._pages = np.arange(CHAIN_BLOCKS, dtype=np.int32).reshape(-1, 1) % np.int32(_DIFFERENT)

    def put(self, chain: int) -> None:
        """See ``Blocks``."""
        keys, deadline = keys_of(chain), time.monotonic() + _TIMEOUT_S
        while True:
            saved = self._store.save_blocks(keys, self._form.source, pages=self._pages)
            if PutStatus.THROTTLED not in saved.statuses or time.monotonic() > deadline:
                break
            time.sleep(_RETRY_S)
        _check_stored(chain, saved.statuses)

    def check(self, chain: int) -> None:
        """See ``Blocks``."""
        keys = keys_of(chain)
        for begin in range(0, CHAIN_BLOCKS, _DIFFERENT):
            part = keys[begin : begin + _DIFFERENT]
            self._form.spoil_target(0, len(part))
            loaded = self._store.load_blocks(part, self._form.target, pages=self._pages[: len(part)])
            if loaded.loaded != len(part):
                raise wrong(f"{loaded.loaded} of {len(part)} blocks of chain {chain} could be loaded: {loaded}")
            for number in range(len(part)):
                if checksum(self._form.target_block(number).data) != self._decoded[number]:
                    raise wrong(f"block {part[number].hex()} of chain {chain} came from the SSD with wrong numbers")

    def close(self) -> None:
        """See ``Blocks``."""
        self._store.close()


def blocks_of(codec: str, endpoint: str) -> Blocks:
    """Blocks of a codec, of plain bytes where it is ""."""
    return CodedBlocks(endpoint, codec) if codec else RawBlocks(endpoint)


def _check_stored(chain: int, statuses: Iterable[PutStatus]) -> None:
    refused = [status for status in statuses if status not in (PutStatus.STORED, PutStatus.EXISTS)]
    if refused:
        raise Throttled(f"the daemon took {CHAIN_BLOCKS - len(refused)} of {CHAIN_BLOCKS} blocks of chain {chain}")
