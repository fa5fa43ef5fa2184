"""The kernels that encode and decode, for the device that a paged cache lies on.

Payloads lie in host memory: in slots of the mapped arena where the kernels reach them, else in scratch memory.
``kvstore_kernels`` is loaded here, when a device's first cache is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore_kernels.codecs import Codec
from kvstore_kernels.paged import PagedKV

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

__all__ = ["Backend", "Scratch", "backend_for"]

Words = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.int32]

_CPU_GROUP_BYTES: Final = 16 << 20
"""Payload bytes of one call on the CPU: enough to make little of a call's own cost, and still in the last cache when
checksums are made."""
_CPU_GROUP_BLOCKS: Final = 32
"""Blocks of one call on the CPU: the daemon publishes them while the next are encoded."""


class Scratch:
    """Memory that payloads are encoded to before their place is known, kept: fresh pages cost more than a copy.

    Two threads never get the same memory.

    Args:
        allocate: makes so many bytes, aligned to 64.
    """

    def __init__(self, allocate: Callable[[int], Bytes]) -> None:
        self._allocate = allocate
        self._spare: list[Bytes] = []

    def take(self, least_bytes: int) -> Bytes:
        """Memory of at least this size; give it back with ``put``."""
        try:
            memory = self._spare.pop()
        except IndexError:
            return self._allocate(least_bytes)
        return memory if memory.nbytes >= least_bytes else self._allocate(least_bytes)

    def put(self, memory: Bytes) -> None:
        """Keep memory for whoever asks next."""
        if len(self._spare) < _KEPT:
            self._spare.append(memory)


_KEPT: Final = 2
_ALIGNED: Final = 64


class Backend:
    """The CPU's kernels.

    Args:
        kernels: a module with the face of ``kvstore_kernels.cpu``.
        threads: that one call may use.

    Attributes:
        scratch: memory that the kernels reach.
        group_bytes: payload bytes that one call should make at most.
        group_blocks: blocks likewise.
    """

    group_bytes = _CPU_GROUP_BYTES
    group_blocks = _CPU_GROUP_BLOCKS

    def __init__(self, kernels: Any, threads: int) -> None:
        self._kernels = kernels
        self._threads = threads
        self.scratch = Scratch(self._allocate)

    def reaches(self, mapped: MappedSession, payloads: Addresses, payload_bytes: Words | int) -> bool:
        """Whether the kernels can read and write payloads of so many bytes in slots; else they are copied."""
        return True

    def share_out(self, work: Callable[[int, int], None], count: int) -> None:
        """Have the host's work on ``count`` payloads done by as many threads as one call may use.

        ``work`` is given the number of the first payload and how many; without the interpreter lock, on any device.
        """
        from kvstore_kernels.cpu import share_out

        share_out(work, count, self._threads)

    def _allocate(self, least_bytes: int) -> Bytes:
        whole = np.empty(least_bytes + _ALIGNED, np.uint8)
        begin = -int(whole.ctypes.data) % _ALIGNED
        return whole[begin : begin + least_bytes]

    def check(self, codec: Codec, kv: PagedKV) -> str:
        """Why the kernels do not take these pages, "" where they do; the codec takes the layout."""
        return ""

    def _options(self, stream: object) -> dict[str, object]:
        return {}

    def encode(
        self, codec: Codec, kv: PagedKV, pages: Pages, payloads: Addresses, stream: object
    ) -> tuple[Words, npt.NDArray[np.bool_]]:
        """Encode blocks to payloads; their section lengths ``[count, sections]``, and which have void groups.

        ``stream`` is a device's, after whose work it is done; None for the usual one, and on the CPU.
        """
        options = self._options(stream)
        encoded = self._kernels.encode(codec, kv, pages, payloads, threads=self._threads, **options)
        return encoded.section_bytes, encoded.void_groups > 0

    def decode(
        self, codec: Codec, kv: PagedKV, pages: Pages, payloads: Addresses, section_bytes: Words, stream: object
    ) -> None:
        """Decode payloads into the pages of a cache.

        Raises:
            ValueError: a payload is none of the codec's.
        """
        options = self._options(stream)
        self._kernels.decode(codec, kv, pages, payloads, section_bytes, threads=self._threads, **options)


def backend_for(kv: PagedKV, threads: int) -> Backend:
    """The kernels for the device of a paged cache.

    Raises:
        InvalidArgument: they cannot be used; says what is missing.
    """
    if kv.device == "cpu":
        try:
            from kvstore_kernels import cpu
        except ImportError as error:
            raise InvalidArgument(f"the kernels for the CPU cannot be loaded: {error}") from None
        return Backend(cpu, threads)
    from kvstore_client.tensors.device import device_backend

    return device_backend(threads)
