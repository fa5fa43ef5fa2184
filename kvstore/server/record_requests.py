"""Requests that begin and end the recording of lookups, or ask how it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kvstore.errors import ErrorCode, KVStoreError
from kvstore.observability.logs import Log
from kvstore.protocol.messages import Record, Recorded, Reply
from kvstore.server.recorder import Recorder
from kvstore.server.refusal import Refused
from kvstore.server.sessions import Session

__all__ = ["RecordRequests"]


class RecordRequests:
    """Answers them.

    Args:
        recorder: what records.
        drain_all: carries out what all mapped clients did.
        later: has an answer wait for something, see ``LowerRequests``.
        send: sends a reply to a connection.
        incarnation: of the daemon.
        log: told of each beginning and end.
    """

    def __init__(
        self,
        recorder: Recorder,
        drain_all: Callable[[], None],
        later: Callable[[Session, Coroutine[Any, Any, Any], Callable[[], None]], None],
        send: Callable[[bytes, Reply], None],
        incarnation: int,
        log: Log,
    ) -> None:
        self._recorder = recorder
        self._drain_all = drain_all
        self._later = later
        self._send = send
        self._incarnation = incarnation
        self._log = log

    def record(self, session: Session, request: Record) -> Reply | None:
        """Begin or end, where it is not so already; an end is answered when everything is written."""
        recorder = self._recorder
        if request.action == "start" and not recorder.recording:
            try:
                recorder.start()
            except (KVStoreError, OSError) as error:
                raise Refused(ErrorCode.BAD_REQUEST, f"cannot record: {error}") from None
            self._log.info("recording_started", file=recorder.statistics().file, pid=session.pid)
        elif request.action == "stop" and recorder.recording:
            self._drain_all()
            recorder.stop()
            self._later(session, asyncio.to_thread(recorder.finished), lambda: self._stopped(session, request))
            return None
        elif request.action not in ("", "start", "stop"):
            raise Refused(ErrorCode.BAD_REQUEST, f"a recording is told to start or to stop, not {request.action!r}")
        return Recorded(request.id, self._incarnation, recorder.statistics())

    def _stopped(self, session: Session, request: Record) -> None:
        told = self._recorder.statistics()
        if told.problem:
            # Says in the log why.
            self._recorder.tick()
        else:
            self._log.info("recording_stopped", requests=told.requests, file=told.file, pid=session.pid)
        self._send(session.identity, Recorded(request.id, self._incarnation, told))
