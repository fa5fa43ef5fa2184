"""``view``: a record's data read in place, or a received copy of it where it cannot be.

Written for speed: pinning costs less than a microsecond, and all that Python does around it costs more.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES
from kvstore.format.record import RecordHeader, decode_header
from kvstore.mapped.context import LARGE
from kvstore_client.arguments import check_read
from kvstore_client.operations import MISSED, NOT_THERE

if TYPE_CHECKING:
    from kvstore_client.aio import AsyncClient
    from kvstore_client.client import Client
    from kvstore_client.mapped_session import MappedSession

_view_of: Final[Callable[[Any], memoryview]] = memoryview
_OURS: Final = 2
"""References to an array that nothing else refers to: the variable, and ``getrefcount``'s argument."""
_LENGTH_MASK: Final = (1 << 32) - 1


class _Pinned:
    """What both kinds of view do with a mapping."""

    __slots__ = ("_data", "_hazard", "_header", "_held", "_key", "_length", "_part", "_request", "_why")

    _data: memoryview | None
    _held: MappedSession | None
    _hazard: int
    _header: RecordHeader | None
    _key: bytes
    _length: int
    _part: int
    _request: int | None
    _why: int

    @property
    def length(self) -> int:
        """Bytes that are held, 0 for none."""
        return self._length

    @property
    def fidelity(self) -> int:
        """Effective fidelity of what is held: 255 where it is exact, and was computed on exact blocks; 0 for none."""
        data, held = self._data, self._held
        if data is None:
            return 0
        if held is None:
            return 0 if self._header is None else self._header.effective_fidelity
        begin = int(data.obj.ctypes.data) - int(held.arena_view.ctypes.data) - RECORD_HEADER_BYTES  # type: ignore[attr-defined]
        return decode_header(held.arena_view[begin : begin + RECORD_HEADER_BYTES].data).effective_fidelity

    def _receive(self, record: tuple[RecordHeader, memoryview] | None) -> None:
        if record is not None:
            self._header, self._data = record

    def _pin(self, mapped: MappedSession, sure: bool) -> bool:
        """Whether the answer is known: the data, or that there is none (if a miss is ``sure`` to be one)."""
        part, request = self._part, self._request
        if request is not None or type(part) is not int or not 0 <= part < 1 << 16:
            check_read(part, request)
        hazards = mapped.free_hazards
        if not hazards:
            mapped.reclaim()
            if not hazards:
                self._why = LARGE
                return False
        hazard = hazards.pop()
        # Before anything is held: should an interrupt strike from here on, ``reclaim`` finds what nobody uses.
        mapped.views[hazard] = self
        key = self._key
        unsure = 0 if sure and not mapped.pending else mapped.unsure(key, sure)
        where = mapped.pin_one(mapped.address, id(key), hazard, part, request or 0, unsure)
        if where < 0 or mapped.hazard_bytes + (where & _LENGTH_MASK) > mapped.most_hazard_bytes:
            where = mapped.pin_failed(where, key, hazard, part, request or 0, unsure)
            if where < 0:
                self._why = where
                return where in NOT_THERE
        self._length = length = where & _LENGTH_MASK
        mapped.hazard_bytes += length
        begin = (where >> 32) * PAGE_BYTES + RECORD_HEADER_BYTES
        # An array of its own, which everything that is made from the view refers to.
        self._data = _view_of(mapped.arena_view[begin : begin + length])
        self._hazard = hazard
        self._held = mapped
        return True

    def _pin_again(self, mapped: MappedSession) -> bool:
        """As ``_pin``, after what was missed came up as far as it does."""
        return self._pin(mapped, True)

    def _release(self, *error: object) -> None:
        """Let go of the data; where a slice or array made from it is still there, its slot is held until that is gone.

        Raises:
            BufferError: something has exported the view itself.
        """
        data, held = self._data, self._held
        self._data = self._held = None
        if data is None:
            return
        array = data.obj
        try:
            data.release()
        finally:
            if held is None:
                pass
            elif getrefcount(array) > _OURS:
                held.linger(array, self._hazard, self._length)
            else:
                held.unpin(self._hazard, self._length)


class View(_Pinned):
    """A context manager that gives a read-only memoryview of a record's payload, or None for a miss."""

    __slots__ = ("_client",)

    def __init__(self, client: Client, key: bytes, part: int, request: int | None) -> None:
        self._client = client
        self._key = key
        self._part = part
        self._request = request
        self._data = self._held = self._header = None
        self._length = 0

    def __enter__(self) -> memoryview | None:
        client = self._client
        mapped = client._mapped
        if mapped is None or not self._pin(mapped, not (client._unwaited or mapped.lower_tiers)):
            missed = mapped is not None and bool(mapped.lower_tiers) and self._why == MISSED
            self._receive(client._receive_one(self._pin_again, self._key, self._part, self._request, missed))
        return self._data

    __exit__ = _Pinned._release


class AsyncView(_Pinned):
    """An async context manager that gives a read-only memoryview of a record's payload, or None for a miss."""

    __slots__ = ("_client",)

    def __init__(self, client: AsyncClient, key: bytes, part: int, request: int | None) -> None:
        self._client = client
        self._key = key
        self._part = part
        self._request = request
        self._data = self._held = self._header = None
        self._length = 0

    async def __aenter__(self) -> memoryview | None:
        client = self._client
        mapped = await client._mapping()
        if mapped is None or not self._pin(mapped, not (client._puts or mapped.lower_tiers)):
            missed = mapped is not None and bool(mapped.lower_tiers) and self._why == MISSED
            self._receive(await client._receive_one(self._pin_again, self._key, self._part, self._request, missed))
        return self._data

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
