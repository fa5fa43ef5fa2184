"""The asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import zmq

from kvstore.errors import ConnectionLost, DeadlineExceeded, KVStoreError
from kvstore.format.record import RecordHeader
from kvstore.protocol.framing import decode_reply, encode
from kvstore.protocol.messages import Bye, Configured, PutStatus, VerifyReply
from kvstore.protocol.statistics import DaemonStats, RecordStats
from kvstore.protocol.version import MAX_OUTSTANDING_REQUESTS
from kvstore_client.arguments import check_durable, check_read
from kvstore_client.base import DRAM, GOODBYE_MS, UNWAITED_BYTES, VERIFY_TIMEOUT_S, BaseClient
from kvstore_client.link import Link
from kvstore_client.operations import MISSED, NOT_THERE
from kvstore_client.results import FlushResult, MatchResult
from kvstore_client.session import Ask, Steps, Told, is_lost_session
from kvstore_client.views import AsyncView
from kvstore_client.warming import AsyncWarmingCalls
from kvstore_client.why import Explanation

if TYPE_CHECKING:
    from kvstore_client.mapped_session import MappedSession

R = TypeVar("R")


class _LinkLost(Exception):
    """The connection broke while an answer was awaited."""


@dataclass(frozen=True, slots=True)
class AsyncMatch(MatchResult):
    """A match that can give its lease back; also an async context manager that does so."""

    _client: AsyncClient | None = field(default=None, repr=False, compare=False)
    _session: int = field(default=0, repr=False, compare=False)

    async def release(self) -> None:
        """Give the lease back, if there is one and it still holds."""
        if self.lease and self._client is not None and self._client._session.number == self._session:
            await self._client.release(self.lease)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.release()


class AsyncClient(AsyncWarmingCalls, BaseClient):
    """A connection to a daemon on an asyncio loop; any number of operations may be under way.

    Use it with ``async with``, or call ``connect`` and ``close``. All calls must come from one loop. A cancelled
    operation leaves the client usable; a cancelled put may or may not have been stored. Operations, arguments, results
    and errors are those of ``Client``.

    Args: see ``BaseClient``.
    """

    def __init__(self, endpoint: str | None = None, **options: Any) -> None:
        super().__init__(endpoint, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._greeted = False
        self._loaded = False
        self._connecting = asyncio.Lock()
        self._slots = asyncio.Semaphore(MAX_OUTSTANDING_REQUESTS)
        self._replies: dict[int, asyncio.Future[Told]] = {}
        self._puts: set[asyncio.Task[None]] = set()
        self._unwaited_bytes = 0

    # -------------------------------------------------------------- life

    async def connect(self) -> None:
        """Connect and greet; done by the first operation otherwise.

        Raises:
            DaemonUnavailable, PermissionRefused, ProtocolMismatch, DeadlineExceeded: why not.
        """
        self._check_usable()
        if not self._loaded:
            await asyncio.to_thread(self._load_compiled)
            self._loaded = True
        await self._connect(time.monotonic() + self.timeout)

    async def close(self) -> None:
        """Wait for unanswered puts, say goodbye, free everything. May be called again."""
        if self._closed or self._is_of_another_process():
            return
        with contextlib.suppress(KVStoreError):
            if self._puts:
                await self.flush()
        self._closed = True
        link = self._link
        if link is not None:
            with contextlib.suppress(zmq.ZMQError):
                link.send(encode(self._session.request(Ask(Bye), 0.2)))
        self._disconnect(ConnectionLost("the client was closed"), GOODBYE_MS)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -------------------------------------------------------------- operations

    async def put(
        self,
        key: bytes,
        data: object,
        *,
        parent: bytes | None = None,
        part: int = 0,
        wait: bool = True,
        request: int | None = None,
        durable: bool = False,
    ) -> PutStatus:
        """See ``Client.put``."""
        mapped = self._mapped
        if mapped is not None and not (wait or durable) and mapped.put_unwaited(key, data, parent, part, request):
            if mapped.refused:
                self._operations.note_mapped(mapped)
            return PutStatus.PENDING
        statuses = await self.put_many(
            [key], [data], parent=parent, part=part, wait=wait, request=request, durable=durable
        )
        return statuses[0]

    async def put_many(
        self,
        keys: Sequence[bytes],
        datas: Sequence[object],
        *,
        parent: bytes | None = None,
        part: int = 0,
        wait: bool = True,
        request: int | None = None,
        durable: bool = False,
    ) -> list[PutStatus]:
        """See ``Client.put_many``."""
        check_durable(durable, wait)
        await self.connect()
        chain = self._operations.check_chain(keys, datas, parent, part, request)
        if wait:
            return await self._run(self._operations.put_chain(chain, time.monotonic() + self.timeout, durable))
        rest = await self._run(self._operations.put_unwaited(chain))
        deadline = time.monotonic() + self.timeout
        for ask in self._operations.put_asks(rest):
            await self._send_unwaited(ask, deadline)
        return [PutStatus.PENDING] * len(keys)

    async def get(self, key: bytes, *, part: int = 0, request: int | None = None) -> bytes | None:
        """See ``Client.get``."""
        async with self.view(key, part=part, request=request) as payload:
            return None if payload is None else bytes(payload)

    async def get_into(self, key: bytes, out: object, *, part: int = 0, request: int | None = None) -> int | None:
        """See ``Client.get_into``."""
        mapped = await self._mapping()
        if mapped is not None:
            check_read(part, request)
            below = mapped.lower_tiers
            length = mapped.get_into(key, out, part, request or 0, not (self._puts or below))
            if length >= 0:
                return length
            if length in NOT_THERE:
                return None
            if below and length == MISSED:
                return (await self._receive_into([key], [out], [key], part, request))[0]
        return (await self._receive_into([key], [out], [], part, request))[0]

    async def get_many_into(
        self, keys: Sequence[bytes], outs: Sequence[object], *, part: int = 0, request: int | None = None
    ) -> list[int | None]:
        """See ``Client.get_many_into``. Copying from mapped memory keeps the loop for as long as it takes."""
        mapped = await self._mapping()
        if mapped is None or len(keys) != len(outs) or not keys:
            return await self._receive_into(keys, outs, [], part, request)
        found = self._read_mapped(mapped, keys, outs, part, request, sure=not self._puts)
        if isinstance(found, list):
            return list[int | None](found)
        if found.asked:
            some = await self._receive_into(*found.arguments(), part, found.access or None)
            found.fill(some)
        return found.lengths

    async def _receive_into(
        self, keys: Sequence[bytes], outs: Sequence[object], missed: Sequence[bytes], part: int, request: int | None
    ) -> list[int | None]:
        return await self._run(self._operations.read_rest(keys, outs, missed, part, request))

    async def _receive_one(
        self, pin: Callable[[MappedSession], bool], key: bytes, part: int, request: int | None, missed: bool
    ) -> tuple[RecordHeader, memoryview] | None:
        return await self._run(self._operations.view_rest(pin, key, part, request, missed))

    async def _mapping(self) -> MappedSession | None:
        """The daemon's memory, after connecting where that was not done yet."""
        if self._mapped is None and not self._greeted:
            await self.connect()
        return self._mapped

    def view(self, key: bytes, *, part: int = 0, request: int | None = None) -> AsyncView:
        """See ``Client.view``."""
        return AsyncView(self, key, part, request)

    async def match(
        self, keys: Sequence[bytes], *, lease: float | None = None, prefetch: bool | float = False
    ) -> AsyncMatch:
        """See ``Client.match``."""
        mapped = await self._mapping()
        if mapped is not None and lease is None and not self._puts:
            known = self._match_mapped(mapped, keys)
            if known is not None:
                return AsyncMatch(known[0], DRAM * known[0], known[1], 0, 0.0, known[2], 0, self, 0)
        found = await self._run(self._operations.match(keys, lease, prefetch))
        fields = (found.hits, found.tiers, found.request, found.lease, found.lease_s, found.fidelity, found.recompute)
        return AsyncMatch(*fields, self, self._session.number)

    async def release(self, lease: int) -> bool:
        """See ``Client.release``."""
        return await self._run(self._operations.release(lease))

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See ``Client.exists``."""
        return await self._run(self._operations.exists(keys))

    async def remove(self, keys: Sequence[bytes]) -> int:
        """See ``Client.remove``."""
        return await self._run(self._operations.remove(keys))

    async def clear(self) -> int:
        """See ``Client.clear``."""
        return await self._run(self._operations.clear())

    async def flush(self) -> FlushResult:
        """See ``Client.flush``."""
        if self._puts:
            await asyncio.wait(self._puts, timeout=self.timeout)
        return await self._run(self._operations.flush())

    async def invalidate(self) -> None:
        """See ``Client.invalidate``."""
        await self._run(self._operations.invalidate())

    async def retain(
        self, keys: Sequence[bytes], *, priority: int = 80, ttl_s: float | None = None, drop: bool = False
    ) -> int:
        """See ``Client.retain``."""
        return await self._run(self._operations.retain(keys, priority, ttl_s, drop))

    async def why(
        self, keys: Sequence[bytes], *, chained: bool = True, prefixes: Sequence[str] = (), namespace: str = ""
    ) -> Explanation:
        """See ``Client.why``."""
        return await self._run(self._operations.why(keys, chained, prefixes, namespace))

    async def stats(self) -> DaemonStats:
        """See ``Client.stats``."""
        return await self._run(self._operations.stats())

    async def configure(self, *, policy: str = "", ssd_policy: str = "", admission: str = "") -> Configured:
        """See ``Client.configure``."""
        return await self._run(self._operations.configure(policy, ssd_policy, admission))

    async def record(self, action: str = "") -> RecordStats:
        """See ``Client.record``."""
        return await self._run(self._operations.record(action))

    async def verify(self, *, timeout: float = VERIFY_TIMEOUT_S) -> VerifyReply:
        """See ``Client.verify``."""
        return await self._run(self._operations.verify(), timeout)

    async def ping(self) -> float:
        """See ``Client.ping``."""
        begin = time.perf_counter()
        await self._run(self._operations.ping())
        return time.perf_counter() - begin

    # -------------------------------------------------------------- waiting

    async def _run(self, steps: Steps[R], timeout: float | None = None) -> R:
        await self.connect()
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        try:
            ask = next(steps)
            while True:
                try:
                    told = await self._ask(ask, deadline)
                except DeadlineExceeded as late:
                    # Some operations know what that means for their result.
                    ask = steps.throw(late)
                else:
                    ask = steps.send(told)
        except StopIteration as stop:
            result: R = stop.value
            return result

    async def _ask(self, ask: Ask, deadline: float) -> Told:
        for last in (False, True):
            await self._connect(deadline)
            link = self._link
            try:
                told = await self._exchange(ask, deadline)
            except _LinkLost:
                if last:
                    raise ConnectionLost(
                        f"the daemon at {self.endpoint} closed the connection twice on one request; see its log"
                    ) from None
                continue
            if not last and is_lost_session(told.reply):
                if self._link is link:
                    self._disconnect(_LinkLost())
                continue
            return told
        raise AssertionError("unreachable")

    async def _connect(self, deadline: float) -> None:
        if self._greeted:
            return
        async with self._connecting:
            if self._greeted:
                return
            self._check_usable()
            if time.monotonic() >= deadline:
                raise self._late()
            self._loop = asyncio.get_running_loop()
            link = self._link = Link(self.endpoint, max(deadline - time.monotonic(), 0.001), own=self._own)
            for descriptor in link.descriptors():
                self._loop.add_reader(descriptor, self._on_readable)
            greeting = self._session.greet(link.in_own_process)
            try:
                with contextlib.suppress(StopIteration):
                    ask = next(greeting)
                    while True:
                        ask = greeting.send(await self._exchange(ask, deadline))
                # The client may have been closed between the last reply and now.
                self._check_usable()
                self._begin_mapping()
            except BaseException as error:
                self._disconnect(_LinkLost())
                if not isinstance(error, _LinkLost):
                    raise
                self._check_usable()
                raise ConnectionLost(
                    f"the daemon at {self.endpoint} closed the connection during the greeting"
                ) from None
            self._greeted = True

    def _disconnect(self, error: Exception, linger_ms: int = 0) -> None:
        """Give the link up; every operation under way gets ``error``."""
        self._end_mapping()
        link, self._link = self._link, None
        self._greeted = False
        if link is not None and self._loop is not None:
            for descriptor in link.descriptors():
                self._loop.remove_reader(descriptor)
            link.close(linger_ms)
        self._session.forget()
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            if not reply.done():
                reply.set_exception(error)
                # Whoever was cancelled meanwhile will not look at it.
                reply.exception()

    async def _exchange(self, ask: Ask, deadline: float) -> Told:
        """Send one request and wait for its reply."""
        if ask.pause_s:
            await asyncio.sleep(max(min(ask.pause_s, deadline - time.monotonic()), 0.0))
        return await self._answer(await self._send(ask, deadline), deadline)

    async def _send(self, ask: Ask, deadline: float) -> asyncio.Future[Told]:
        """Hand one request to libzmq; the future of its reply."""
        left_s = deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{MAX_OUTSTANDING_REQUESTS} requests of this client were unanswered for {self.timeout:g} s"
            ) from None
        link, loop = self._link, self._loop
        if link is None or loop is None:
            self._slots.release()
            raise _LinkLost
        reply: asyncio.Future[Told] = loop.create_future()
        refused = self._session.refused(ask)
        if refused is not None:
            self._slots.release()
            reply.set_result(Told(refused, []))
            return reply
        request = self._session.request(ask, left_s)
        self._replies[request.id] = reply
        reply.add_done_callback(lambda _: self._ended(request.id))
        try:
            link.send(encode(request), ask.payloads)
        except zmq.ZMQError:
            reply.cancel()
            self._disconnect(_LinkLost())
            raise _LinkLost from None
        # libzmq's descriptor is edge-triggered: a send may have consumed the edge of a reply that is already there.
        if link.pending():
            loop.call_soon(self._on_readable)
        return reply

    def _ended(self, number: int) -> None:
        self._replies.pop(number, None)
        self._slots.release()

    async def _answer(self, reply: asyncio.Future[Told], deadline: float) -> Told:
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                return await reply
        except TimeoutError:
            raise self._late() from None

    async def _send_unwaited(self, ask: Ask, deadline: float) -> None:
        """Hand a put to libzmq, which copies it: the caller's buffers are free when this returns."""
        payload_bytes = sum(len(payload) for payload in ask.payloads)
        while self._puts and self._unwaited_bytes + payload_bytes > UNWAITED_BYTES:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(
                    f"{self._unwaited_bytes} bytes of puts of this client were unanswered for {self.timeout:g} s"
                )
            await asyncio.wait(self._puts, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for last in (False, True):
            await self._connect(deadline)
            try:
                reply = await self._send(ask, deadline)
            except _LinkLost:
                if last:
                    raise ConnectionLost(f"the daemon at {self.endpoint} closed the connection twice") from None
                continue
            self._unwaited_bytes += payload_bytes
            task = asyncio.ensure_future(self._unwaited(reply, len(ask.payloads) // 2, payload_bytes))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)
            return

    async def _unwaited(self, reply: asyncio.Future[Told], records: int, payload_bytes: int) -> None:
        try:
            told = await self._answer(reply, time.monotonic() + self.timeout)
        except (_LinkLost, KVStoreError):
            self._operations.note_lost(records)
        else:
            self._operations.note_unwaited(told, records)
        finally:
            self._unwaited_bytes -= payload_bytes

    def _on_readable(self) -> None:
        link = self._link
        if link is None:
            return
        while (message := link.receive()) is not None:
            told = Told(decode_reply(message[0]), message[1])
            reply = self._replies.pop(told.reply.id, None)
            if reply is not None and not reply.done():
                reply.set_result(told)
        if link.lost():
            self._disconnect(_LinkLost())
