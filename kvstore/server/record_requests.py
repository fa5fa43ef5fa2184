"""Requests that begin and end the recording of lookups, or ask how it goes."""

from __future__ import annotations

from kvstore.errors import ErrorCode, KVStoreError
from kvstore.observability.logs import Log
from kvstore.protocol.messages import Record, Recorded
from kvstore.server.recorder import Recorder
from kvstore.server.refusal import Refused
from kvstore.server.sessions import Session

__all__ = ["RecordRequests"]


class RecordRequests:
    """Answers them.

    Args:
        recorder: what records.
        incarnation: of the daemon.
        log: told of each beginning and end.
    """

    def __init__(self, recorder: Recorder, incarnation: int, log: Log) -> None:
        self._recorder = recorder
        self._incarnation = incarnation
        self._log = log

    def record(self, session: Session, request: Record) -> Recorded:
        """Begin or end, where it is not so already."""
        recorder = self._recorder
        if request.action == "start" and not recorder.recording:
            try:
                recorder.start()
            except (KVStoreError, OSError) as error:
                raise Refused(ErrorCode.BAD_REQUEST, f"cannot record: {error}") from None
            self._log.info("recording_started", file=recorder.statistics().file, pid=session.pid)
        elif request.action == "stop" and recorder.recording:
            recorder.stop()
            self._log.info("recording_stopped", requests=recorder.statistics().requests, pid=session.pid)
        elif request.action not in ("", "start", "stop"):
            raise Refused(ErrorCode.BAD_REQUEST, f"a recording is told to start or to stop, not {request.action!r}")
        return Recorded(request.id, self._incarnation, recorder.statistics())
