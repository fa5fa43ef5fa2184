"""The kernels that encode and decode, for the device that a paged cache lies on.

Payloads lie in host memory: slots of the mapped arena, or scratch memory. ``kvstore_kernels`` is loaded here, when the
first cache of a device is used.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore_kernels.codecs import Codec
from kvstore_kernels.paged import PagedKV

__all__ = ["Backend", "Scratch", "backend_for"]

Words = npt.NDArray[np.int64]
Addresses = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int32]

_ALIGNED: Final = 64
_CPU_GROUP_BYTES: Final = 1 << 20
"""Payload bytes of one call on the CPU: what was encoded is still in the cache when its checksum is made."""


class Backend:
    """One device's kernels.

    Args:
        kernels: the module.
        threads: that one call may use.
        group_bytes: payload bytes that one call should make.
    """

    def __init__(self, kernels: Any, threads: int, group_bytes: int) -> None:
        self._kernels = kernels
        self._threads = threads
        self.group_bytes = group_bytes

    def encode(
        self, codec: Codec, kv: PagedKV, pages: Pages, payloads: Addresses
    ) -> tuple[Words, npt.NDArray[np.bool_]]:
        """Encode blocks to payloads; their section lengths ``[count, sections]``, and which have void groups."""
        encoded = self._kernels.encode(codec, kv, pages, payloads, threads=self._threads)
        return encoded.section_bytes, encoded.void_groups > 0

    def decode(self, codec: Codec, kv: PagedKV, pages: Pages, payloads: Addresses, section_bytes: Words) -> None:
        """Decode payloads into the pages of a cache.

        Raises:
            ValueError: a payload is none of the codec's.
        """
        self._kernels.decode(codec, kv, pages, payloads, section_bytes, threads=self._threads)


class Scratch:
    """Memory that payloads are encoded to before their place is known; kept, because fresh pages cost more than a copy.

    Lists are safe between threads: each call has memory of its own.
    """

    def __init__(self) -> None:
        self._spare: list[npt.NDArray[np.uint8]] = []

    def take(self, least_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory of at least this size, aligned to 64 bytes; give it back with ``put``."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.nbytes < least_bytes:
            whole = np.empty(least_bytes + _ALIGNED, np.uint8)
            begin = -int(whole.ctypes.data) % _ALIGNED
            memory = whole[begin : begin + least_bytes]
        return memory

    def put(self, memory: npt.NDArray[np.uint8]) -> None:
        """Keep memory for the next one who asks."""
        if len(self._spare) < _KEPT:
            self._spare.append(memory)


_KEPT: Final = 2


def backend_for(kv: PagedKV, threads: int) -> Backend:
    """The kernels for the device of a paged cache.

    Raises:
        InvalidArgument: they cannot be loaded; says what is missing.
    """
    name = f"kvstore_kernels.{kv.device}"
    try:
        kernels = importlib.import_module(name)
    except ImportError as error:
        raise InvalidArgument(f"the cache is on {kv.device}, whose kernels cannot be loaded: {error}") from None
    return Backend(kernels, threads, _CPU_GROUP_BYTES)
