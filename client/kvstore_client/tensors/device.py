"""The CUDA kernels, and how they reach slots in host memory.

Slots are pinned for the device slab by slab, when a slab is first used (``cudaHostRegister``): the kernels then write
into slots and read out of them over the bus. Where that is not possible (a read-only arena, a limit on locked memory, a
device that cannot use host pointers) payloads go through pinned scratch memory and are copied once more.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore.mapped.arena import ARENA_HEADER_BYTES
from kvstore_client.tensors.backends import Addresses, Backend, Bytes, Pages, Words
from kvstore_kernels import cuda
from kvstore_kernels.codecs import Codec
from kvstore_kernels.cuda.device import cupy_module, device_of
from kvstore_kernels.paged import PagedKV

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

__all__ = ["device_backend"]

_log: Final = logging.getLogger("kvstore_client")

_GROUP_BYTES: Final = 64 << 20
"""Payload bytes of one call: one launch for many blocks."""
_GROUP_BLOCKS: Final = 64
_PORTABLE_MAPPED: Final = 1 | 2
"""Flags of ``cudaHostRegister``: for all contexts, and into the device's address space."""
_CAN_USE_HOST_POINTER: Final = 91
"""Device attribute: what is registered has the same address on the device."""


class _Pinned:
    """The slabs of one arena that are pinned for the device."""

    def __init__(self, runtime: Any, mapped: MappedSession) -> None:
        self._runtime = runtime
        self._first_slab = mapped.arena_address + ARENA_HEADER_BYTES
        self._slab_bytes = mapped.slab_bytes
        self._slab_count = mapped.slab_count
        self._addresses: dict[int, int] = {}
        self._pinning = threading.Lock()
        self.usable = mapped.writable

    def pin(self, payloads: Addresses, payload_bytes: Words | int) -> bool:
        """Pin the slabs that payloads lie in; False where that cannot be done, now and from then on.

        A payload may go on into the slab behind its own. Kernels read and write it as one piece all the same: what is
        registered has the same addresses for the device.
        """
        begin = payloads.view(np.int64) - self._first_slab
        ends = begin + (payload_bytes - 1)
        slabs = np.unique(np.concatenate((begin, ends)) // self._slab_bytes)
        slabs = slabs[slabs < self._slab_count].tolist()
        with self._pinning:
            for slab in slabs:
                if slab not in self._addresses and self.usable:
                    address = self._first_slab + slab * self._slab_bytes
                    try:
                        self._runtime.hostRegister(address, self._slab_bytes, _PORTABLE_MAPPED)
                    except self._runtime.CUDARuntimeError as error:
                        why = str(error)
                        _log.warning("slots cannot be pinned for the device, payloads are copied once more: %s", why)
                        self.usable = False
                        break
                    self._addresses[slab] = address
            return all(slab in self._addresses for slab in slabs)

    def release(self) -> None:
        """Unpin all, while the memory is still mapped."""
        while self._addresses:
            _, address = self._addresses.popitem()
            self._runtime.hostUnregister(address)


class _DeviceBackend(Backend):
    """The CUDA kernels."""

    group_bytes = _GROUP_BYTES
    group_blocks = _GROUP_BLOCKS

    def __init__(self, kernels: Any, threads: int, cupy: Any) -> None:
        super().__init__(kernels, threads)
        self._cupy = cupy
        self._arenas: weakref.WeakKeyDictionary[MappedSession, _Pinned] = weakref.WeakKeyDictionary()
        device = cupy.cuda.runtime.getDevice()
        self._same_addresses = bool(cupy.cuda.runtime.deviceGetAttribute(_CAN_USE_HOST_POINTER, device))

    def reaches(self, mapped: MappedSession, payloads: Addresses, payload_bytes: Words | int) -> bool:
        """As ``Backend.reaches``; pins what is not pinned yet."""
        if not self._same_addresses:
            return False
        arena = self._arenas.get(mapped)
        if arena is None:
            # The daemon waits a moment with the slots of a process that ends, for transfers that outlive it.
            mapped.note_device()
            arena = self._arenas[mapped] = _Pinned(self._cupy.cuda.runtime, mapped)
            weakref.finalize(mapped, arena.release).atexit = False
        return arena.pin(payloads, payload_bytes)

    def _allocate(self, least_bytes: int) -> Bytes:
        memory: Bytes = np.frombuffer(self._cupy.cuda.alloc_pinned_memory(least_bytes), np.uint8, least_bytes)
        return memory

    def check(self, codec: Codec, kv: PagedKV) -> str:
        """As ``Backend.check``."""
        try:
            self._kernels.check(codec, kv)
        except ValueError as error:
            return str(error)
        return ""

    def encode(
        self, codec: Codec, kv: PagedKV, pages: Pages, payloads: Addresses, stream: object
    ) -> tuple[Words, npt.NDArray[np.bool_]]:
        """As ``Backend.encode``."""
        with self._finished(kv):
            return super().encode(codec, kv, pages, payloads, stream)

    def decode(
        self, codec: Codec, kv: PagedKV, pages: Pages, payloads: Addresses, section_bytes: Words, stream: object
    ) -> None:
        """As ``Backend.decode``."""
        with self._finished(kv):
            super().decode(codec, kv, pages, payloads, section_bytes, stream)

    @contextmanager
    def _finished(self, kv: PagedKV) -> Iterator[None]:
        """Where an exception (an interrupt) ends a call, wait for the device: slots are given back then."""
        try:
            yield
        except BaseException:
            with self._cupy.cuda.Device(device_of(int(kv.sections[0].bases[0]))):
                self._cupy.cuda.runtime.deviceSynchronize()
            raise

    def _options(self, stream: object) -> dict[str, object]:
        return {"stream": stream}


def device_backend(threads: int) -> Backend:
    """The CUDA kernels on the current device.

    Raises:
        InvalidArgument: CuPy, a driver or a device are missing; says which, and what to do.
    """
    try:
        cupy = cupy_module()
    except cuda.CudaUnavailable as error:
        raise InvalidArgument(f"the cache is on a CUDA device: {error}") from None
    return _DeviceBackend(cuda, threads, cupy)
