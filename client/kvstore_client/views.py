"""``view``: a record's data read in place, or a received copy of it where it cannot be.

Written for speed: pinning costs less than a microsecond, and all that Python does around it costs more.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.context import MISS, STALE
from kvstore_client.operations import check_read

if TYPE_CHECKING:
    from kvstore_client.aio import AsyncClient
    from kvstore_client.client import Client
    from kvstore_client.mapped_session import MappedSession

_LENGTH_MASK: Final = (1 << 32) - 1


class _Pinned:
    """What both kinds of view do with a mapping."""

    __slots__ = ("_data", "_hazard", "_held", "_key", "_length", "_part", "_request")

    _data: memoryview | None
    _held: MappedSession | None
    _hazard: int
    _key: bytes
    _length: int
    _part: int
    _request: int | None

    def _pin(self, mapped: MappedSession, sure: bool) -> bool:
        """Whether the answer is known: the data, or that there is none (if a miss is ``sure`` to be one)."""
        request = self._request
        check_read(self._part, request)
        hazard = mapped.take_hazard()
        if hazard < 0:
            return False
        where = mapped.pin(self._key, self._part, request or 0, hazard)
        if where < 0:
            return sure and where in (MISS, STALE)
        length = where & _LENGTH_MASK
        begin = (where >> 32) * PAGE_BYTES + RECORD_HEADER_BYTES
        self._data = mapped.arena_view[begin : begin + length]
        self._hazard = hazard
        self._length = length
        self._held = mapped
        return True

    def _release(self) -> None:
        """Let go of the data.

        Raises:
            BufferError: an array made from it is still there. Its slot stays held until that is gone.
        """
        data, held = self._data, self._held
        self._data = self._held = None
        if data is not None:
            try:
                data.release()
            except BufferError:
                if held is not None:
                    held.linger(data, self._hazard, self._length)
                raise
        if held is not None:
            held.unpin(self._hazard, self._length)


class View(_Pinned):
    """A context manager that gives a read-only memoryview of a record's payload, or None for a miss."""

    __slots__ = ("_client",)

    def __init__(self, client: Client, key: bytes, part: int, request: int | None) -> None:
        self._client = client
        self._key = key
        self._part = part
        self._request = request
        self._data = self._held = None

    def __enter__(self) -> memoryview | None:
        client = self._client
        mapped = client._mapped
        if mapped is None or not self._pin(mapped, not client._unwaited):
            self._data = client._receive_one(self._key, self._part, self._request)
        return self._data

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


class AsyncView(_Pinned):
    """An async context manager that gives a read-only memoryview of a record's payload, or None for a miss."""

    __slots__ = ("_client",)

    def __init__(self, client: AsyncClient, key: bytes, part: int, request: int | None) -> None:
        self._client = client
        self._key = key
        self._part = part
        self._request = request
        self._data = self._held = None

    async def __aenter__(self) -> memoryview | None:
        client = self._client
        mapped = await client._mapping()
        if mapped is None or not self._pin(mapped, not client._puts):
            self._data = await client._receive_one(self._key, self._part, self._request)
        return self._data

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
