"""Requests of mapped clients for slots that are lent ahead."""

from __future__ import annotations

from kvstore.core.events import SlotWanted
from kvstore.core.instructions import Refuse
from kvstore.core.store import Store
from kvstore.errors import ErrorCode
from kvstore.format.constants import MAX_RECORD_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.client_file import LANE_COUNT
from kvstore.protocol.keys import KEY_BYTES
from kvstore.protocol.messages import Reply, Reserve, Reserved
from kvstore.server.mapping import Mapping
from kvstore.server.refusal import Refused
from kvstore.server.sessions import Session


class LaneRequests:
    """Answers them.

    Args:
        store: is told what was refused.
        mapping: has the lanes.
        incarnation: of the daemon.
    """

    def __init__(self, store: Store, mapping: Mapping, incarnation: int) -> None:
        self._store = store
        self._mapping = mapping
        self._incarnation = incarnation

    def reserve(self, session: Session, request: Reserve) -> Reply:
        """Keep slots for records of a size in one of the client's lanes."""
        if not 0 <= request.lane < LANE_COUNT or not RECORD_HEADER_BYTES < request.record_bytes <= MAX_RECORD_BYTES:
            raise Refused(ErrorCode.BAD_REQUEST, f"no lane {request.lane} for records of {request.record_bytes} bytes")
        if not session.locked:
            raise Refused(ErrorCode.BAD_REQUEST, "a client that does not hold the lock on its file is lent no slots")
        if len(request.parent) not in (0, KEY_BYTES):
            raise Refused(ErrorCode.BAD_REQUEST, f"the parent's key has {len(request.parent)} bytes, not {KEY_BYTES}")
        wanted = SlotWanted(
            session.id,
            request.record_bytes,
            access=request.access,
            namespace_id=request.namespace_id,
            parent_key=request.parent,
        )
        answer = self._mapping.reserve(request.lane, wanted)
        if answer is None:
            raise Refused(ErrorCode.BAD_REQUEST, "this session maps nothing, so it has no lanes")
        if isinstance(answer, Refuse):
            if request.parent:
                self._store.tell_refused_behind(request.namespace_id, request.parent, answer.reason)
            return Reserved(request.id, self._incarnation, 0, 0, answer.reason.known_in(session.protocol))
        return Reserved(request.id, self._incarnation, answer.slot_bytes, answer.lent)
