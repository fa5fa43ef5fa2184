"""One mapped client as the daemon sees it: its file's memory, what was taken from its ring, what it was lent ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.mapped.client_file import (
    ANSWER_OFFSET,
    DROPPED_REPORTS_OFFSET,
    FLAGS_OFFSET,
    HAZARD_OFFSET,
    LANE_COUNT,
    RING_RECORDS,
    STATE_OFFSET,
    ClientFlag,
    ClientState,
)
from kvstore.protocol.messages import PutStatus, Reason
from kvstore.server.sessions import Session


@dataclass(slots=True)
class Lane:
    """Slots of one size lent to a client ahead of its puts.

    Attributes:
        slot_bytes: their size; 0: the lane is not used.
        target: slots that are kept lent.
        head: grants ever put into the lane.
        lent: slots lent and not committed or returned yet.
        used: whether one was committed since the last look at idle lanes.
    """

    slot_bytes: int = 0
    target: int = 0
    head: int = 0
    lent: int = 0
    used: bool = False


@dataclass(slots=True, eq=False)
class MappedClient:
    """The daemon's view of one client's file. The mapping lives as long as this does.

    Attributes:
        address: of the file's first byte in this process.
        consumed: ring records dealt with.
        position: among all mapped clients.
        suspects: records verified because it found them corrupt, since the last tick.
        broken: its ring cannot be one: nothing it says is heard any more.
        heeded: slots that its hazards name are kept for it.
        lane_of: the lane of each slot that was lent ahead.
    """

    session: Session
    words: npt.NDArray[np.int64]
    address: int
    consumed: int = 0
    position: int = 0
    suspects: int = 0
    broken: bool = False
    heeded: bool = True
    lanes: list[Lane] = field(default_factory=lambda: [Lane() for _ in range(LANE_COUNT)])
    lane_of: dict[int, int] = field(default_factory=dict)
    _answers: npt.NDArray[np.uint16] = field(init=False)

    def __post_init__(self) -> None:
        begin = ANSWER_OFFSET // 8
        self._answers = self.words[begin : begin + RING_RECORDS * 2 // 8].view(np.uint16)
        self.words[STATE_OFFSET // 8] = int(ClientState.LIVE)

    @classmethod
    def of(cls, session: Session) -> MappedClient | None:
        """The mapped client of a session, None where the session's file is not mapped."""
        if session.file is None or session.file.map is None:
            return None
        words = np.frombuffer(session.file.map, np.int64)
        return cls(session, words, int(words.ctypes.data))

    @property
    def hazards(self) -> int:
        """Address of its hazard words."""
        return self.address + HAZARD_OFFSET

    @property
    def dropped_reports(self) -> int:
        """Access reports for which the ring had no room, as the client counts them."""
        return max(int(self.words[DROPPED_REPORTS_OFFSET // 8]), 0)

    @property
    def has_device(self) -> bool:
        """Whether transfers of a device may go on for a moment after its process is gone."""
        return bool(int(self.words[FLAGS_OFFSET // 8]) & ClientFlag.DEVICE)

    def hazarded_slots(self) -> list[int]:
        """What its hazard words name now; anything may stand there."""
        begin = HAZARD_OFFSET // 8
        return [word - 1 for word in self.words[begin : begin + 64].tolist() if word > 0]

    def answer(self, number: int, status: PutStatus, reason: Reason) -> None:
        """Say what became of a commit, before it is consumed."""
        self._answers[number & (RING_RECORDS - 1)] = status | reason << 8

    def forget_grant(self, slot: int) -> None:
        """A grant was committed or came back."""
        number = self.lane_of.pop(slot, None)
        if number is not None:
            lane = self.lanes[number]
            lane.lent -= 1
            lane.used = True

    def end(self) -> None:
        """Tell the client that its session is over."""
        self.words[STATE_OFFSET // 8] = int(ClientState.OVER)
