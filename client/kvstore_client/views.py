"""``view``: a record's data read in place, or a received copy of it where it cannot be."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from kvstore.mapped.context import MISS, STALE
from kvstore_client.operations import check_read

if TYPE_CHECKING:
    from kvstore_client.aio import AsyncClient
    from kvstore_client.client import Client
    from kvstore_client.mapped_session import MappedSession


class _Pinned:
    """What both kinds of view do with a mapping."""

    __slots__ = ("_data", "_hazard", "_held", "_key", "_length", "_part", "_request")

    def __init__(self, key: bytes, part: int, request: int | None) -> None:
        self._key = key
        self._part = part
        self._request = request
        self._data: memoryview | None = None
        self._held: MappedSession | None = None

    def _pin(self, mapped: MappedSession, sure: bool) -> bool:
        """Whether the answer is known: the data, or that there is none (if a miss is ``sure`` to be one)."""
        check_read(self._part, self._request)
        pinned = mapped.pin(self._key, self._part, self._request or 0)
        if type(pinned) is tuple:
            self._data, self._hazard, self._length = pinned
            self._held = mapped
            return True
        return sure and pinned in (MISS, STALE)

    def _release(self) -> None:
        """Let go of the data.

        Raises:
            BufferError: an array made from it is still there. Its slot stays held until that is gone.
        """
        data, self._data = self._data, None
        held, self._held = self._held, None
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
        super().__init__(key, part, request)
        self._client = client

    def __enter__(self) -> memoryview | None:
        mapped = self._client._mapped
        if mapped is None or not self._pin(mapped, not self._client._unwaited):
            self._data = self._client._receive_one(self._key, self._part, self._request)
        return self._data

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


class AsyncView(_Pinned):
    """An async context manager that gives a read-only memoryview of a record's payload, or None for a miss."""

    __slots__ = ("_client",)

    def __init__(self, client: AsyncClient, key: bytes, part: int, request: int | None) -> None:
        super().__init__(key, part, request)
        self._client = client

    async def __aenter__(self) -> memoryview | None:
        mapped = await self._client._mapping()
        if mapped is None or not self._pin(mapped, not self._client._puts):
            self._data = await self._client._receive_one(self._key, self._part, self._request)
        return self._data

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
