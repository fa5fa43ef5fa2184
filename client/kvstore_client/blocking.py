"""How the blocking client waits: drives operations, keeps the connection, and counts puts that nobody waits for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import zmq

from kvstore.errors import ConnectionLost, DeadlineExceeded
from kvstore.protocol.framing import decode_reply, encode
from kvstore_client.base import (
    UNWAITED_BYTES,
    UNWAITED_REQUESTS,
    BaseClient,
)
from kvstore_client.link import Link
from kvstore_client.session import Ask, Steps, Told, is_lost_session

R = TypeVar("R")


class _LinkLost(Exception):
    """The connection broke while an answer was awaited."""


class Blocking(BaseClient):
    """The waiting half of ``Client``. Calls of several threads are served one after the other."""

    def __init__(self, endpoint: str | None = None, **options: Any) -> None:
        super().__init__(endpoint, **options)
        self._lock = threading.Lock()
        self._unwaited: dict[int, tuple[int, int]] = {}
        self._unwaited_bytes = 0

    def _run(self, steps: Steps[R], timeout: float | None = None) -> R:
        """Drive an operation to its result."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        with self._held(deadline):
            try:
                ask = next(steps)
                while True:
                    try:
                        told = self._ask(ask, deadline)
                    except DeadlineExceeded as late:
                        # Some operations know what that means for their result.
                        ask = steps.throw(late)
                    else:
                        ask = steps.send(told)
            except StopIteration as stop:
                result: R = stop.value
                return result

    @contextlib.contextmanager
    def _held(self, deadline: float) -> Iterator[None]:
        """The client to ourselves."""
        self._check_usable()
        acquired: list[bool] = []
        try:
            # A single call of C code: an interrupt strikes before the lock is taken, or after the list knows of it.
            acquired.extend(map(self._lock.acquire, (True,), (max(deadline - time.monotonic(), 0.0),)))
            if not acquired[0]:
                raise DeadlineExceeded(
                    f"another thread kept this client for {self.timeout:g} s; use one client a thread"
                )
            self._check_usable()
            yield
        finally:
            if acquired and acquired[0]:
                self._lock.release()

    def _ask(self, ask: Ask, deadline: float) -> Told:
        """One request, once more after a lost connection or session: operations may be repeated."""
        for last in (False, True):
            link = self._connected(deadline)
            try:
                told = self._exchange(link, ask, deadline)
            except _LinkLost:
                self._disconnect()
                if last:
                    raise ConnectionLost(
                        f"the daemon at {self.endpoint} closed the connection twice on one request; see its log"
                    ) from None
                continue
            if not last and is_lost_session(told.reply):
                self._disconnect()
                continue
            return told
        raise AssertionError("unreachable")

    def _connected(self, deadline: float) -> Link:
        """A greeted connection, a new one where there is none or an interrupt tore the last one."""
        if self._link is not None and self._link.torn:
            self._disconnect()
        if self._link is None:
            self._connect(deadline)
        assert self._link is not None
        return self._link

    def _connect(self, deadline: float) -> None:
        """Connect and greet.

        Raises:
            DaemonUnavailable, PermissionRefused, ProtocolMismatch, DeadlineExceeded: why not.
        """
        left_s = max(deadline - time.monotonic(), 0.001)
        link = self._link = Link(self.endpoint, left_s, patience=left_s, own=self._own)
        greeting = self._session.greet(link.in_own_process)
        try:
            with contextlib.suppress(StopIteration):
                ask = next(greeting)
                while True:
                    ask = greeting.send(self._exchange(link, ask, deadline))
            self._begin_mapping()
        except BaseException as error:
            self._disconnect()
            if not isinstance(error, _LinkLost):
                raise
            raise ConnectionLost(f"the daemon at {self.endpoint} closed the connection during the greeting") from None

    def _disconnect(self) -> None:
        self._end_mapping()
        self._lose_unwaited()
        if self._link is not None:
            self._link.close()
            self._link = None
        self._session.forget()

    def _exchange(self, link: Link, ask: Ask, deadline: float) -> Told:
        """Send one request and wait for its reply."""
        if ask.pause_s:
            time.sleep(max(min(ask.pause_s, deadline - time.monotonic()), 0.0))
        refused = self._session.refused(ask)
        if refused is not None:
            return Told(refused, [])
        request = self._session.request(ask, deadline - time.monotonic())
        try:
            link.send(encode(request), ask.payloads)
        except zmq.Again:
            raise _LinkLost from None
        while True:
            told = self._receive(link, deadline)
            if told.reply.id == request.id:
                self._lose_unwaited(before=request.id)
                return told
            self._note(told)

    def _receive(self, link: Link, deadline: float) -> Told:
        while True:
            message = link.receive()
            if message is not None:
                return Told(decode_reply(message[0]), message[1])
            if link.lost():
                raise _LinkLost
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0:
                raise self._late()
            link.wait(left_ms)

    def _note(self, told: Told) -> None:
        """A reply that nobody waits for: an unwaited put's, or one that came too late."""
        self._lose_unwaited(before=told.reply.id)
        unwaited = self._unwaited.pop(told.reply.id, None)
        if unwaited is not None:
            self._unwaited_bytes -= unwaited[1]
            self._operations.note_unwaited(told, unwaited[0])

    def _lose_unwaited(self, before: int | None = None) -> None:
        """Replies come in the order of their requests: one that was not there before a later one never comes."""
        while self._unwaited and (before is None or next(iter(self._unwaited)) < before):
            records, payload_bytes = self._unwaited.pop(next(iter(self._unwaited)))
            self._unwaited_bytes -= payload_bytes
            self._operations.note_lost(records)

    def _send_unwaited(self, ask: Ask, deadline: float) -> None:
        payload_bytes = sum(memoryview(payload).nbytes for payload in ask.payloads)
        for last in (False, True):
            link = self._connected(deadline)
            try:
                while self._unwaited and (
                    self._unwaited_bytes + payload_bytes > UNWAITED_BYTES or len(self._unwaited) >= UNWAITED_REQUESTS
                ):
                    self._note(self._receive(link, deadline))
                refused = self._session.refused(ask)
                if refused is not None:
                    self._operations.note_unwaited(Told(refused, []), len(ask.payloads) // 2)
                    return
                request = self._session.request(ask, self.timeout)
                link.send(encode(request), ask.payloads)
            except (_LinkLost, zmq.Again):
                self._disconnect()
                if last:
                    raise ConnectionLost(f"the daemon at {self.endpoint} closed the connection twice") from None
                continue
            self._unwaited[request.id] = (len(ask.payloads) // 2, payload_bytes)
            self._unwaited_bytes += payload_bytes
            return
