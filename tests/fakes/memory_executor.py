"""Carries out the store's instructions on slots that hold objects, and sees every misuse of a slot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from kvstore.core.block import Record, RecordState
from kvstore.core.events import Event, Quiesced, SlotWanted
from kvstore.core.instructions import Grant, Instruction, Move, Refuse, TryAgain, Withdraw
from kvstore.core.store import Store

EMPTY: Final = "empty"
"""What a slot holds that nobody wrote since it was free."""

MAX_TRIES: Final = 10_000


@dataclass
class MemoryExecutor:
    """An arena of objects with pins.

    Attributes:
        store: the state.
        now_ns: the time that events carry.
        contents: what each slot holds; a slot that is not there was never written or is free again.
        quiesce_at_once: answer ``Quiesced`` for slots that nobody pins as soon as they are withdrawn; else they wait
            for ``quiesce``.
        last: instructions of the last event, those of its repetitions included.
    """

    store: Store
    now_ns: int = 0
    contents: dict[int, object] = field(default_factory=dict)
    quiesce_at_once: bool = True
    last: list[Instruction] = field(default_factory=list)
    _pins: Counter[int] = field(default_factory=Counter)
    _pinned: dict[int, object] = field(default_factory=dict)
    _withdrawn: set[int] = field(default_factory=set)

    def apply(self, event: Event) -> Instruction | None:
        """Give an event to the store and carry out what it wants; its answer, where it has one."""
        self.last = []
        return self._apply(event)

    def _apply(self, event: Event) -> Instruction | None:
        answer: Instruction | None = None
        for instruction in self.store.handle(event, self.now_ns):
            assert answer is None, f"{instruction} stands behind the answer {answer}"
            self.last.append(instruction)
            if isinstance(instruction, Withdraw):
                self._withdraw(instruction.slots)
            elif isinstance(instruction, Move):
                self._move(instruction)
            else:
                answer = instruction
        return answer

    def want_slot(self, session: int, record_bytes: int) -> Record | Refuse:
        """A granted slot, or why there is none."""
        self.last = []
        for _ in range(MAX_TRIES):
            answer = self._apply(SlotWanted(session, record_bytes))
            if isinstance(answer, Grant):
                slot = answer.record.slot
                assert slot not in self.contents, f"slot {slot} is granted but holds {self.contents[slot]}"
                assert slot not in self._pins, f"slot {slot} is granted while a transfer reads it"
                assert slot not in self._withdrawn, f"slot {slot} is granted while it waits to be quiesced"
                return answer.record
            if isinstance(answer, Refuse):
                return answer
            assert isinstance(answer, TryAgain), f"{answer} is no answer to SlotWanted"
        raise AssertionError(f"no answer after {MAX_TRIES} tries for a slot")

    def write(self, slot: int, content: object) -> None:
        """A client writes a granted slot."""
        assert self.store.records[slot].state is RecordState.GRANTED
        assert slot not in self._pins
        self.contents[slot] = content

    def pin(self, slot: int) -> None:
        """A transfer reads a slot until ``unpin``."""
        self._pins[slot] += 1
        self._pinned[slot] = self.contents[slot]

    def unpin(self, slot: int) -> None:
        """A transfer is over; it must have read the same all the time."""
        assert self.contents[slot] == self._pinned[slot], f"slot {slot} changed while it was read"
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot], self._pinned[slot]
            if slot in self._withdrawn and self.quiesce_at_once:
                self.quiesce([slot])

    @property
    def pinned(self) -> list[int]:
        """Slots that transfers read."""
        return sorted(self._pins)

    @property
    def waiting(self) -> list[int]:
        """Withdrawn slots that could be quiesced now."""
        return sorted(self._withdrawn - set(self._pins))

    def quiesce(self, slots: list[int]) -> None:
        """Answer ``Quiesced`` for withdrawn slots."""
        for slot in slots:
            assert slot not in self._pins
            self._withdrawn.remove(slot)
            self.contents.pop(slot, None)
        assert self.store.handle(Quiesced(slots), self.now_ns) == []

    def _withdraw(self, slots: list[int]) -> None:
        assert slots, "an empty Withdraw"
        for slot in slots:
            assert self.store.records[slot].state is RecordState.LIMBO
            assert slot not in self._withdrawn, f"slot {slot} is withdrawn twice"
        self._withdrawn.update(slots)
        if self.quiesce_at_once:
            free = [slot for slot in slots if slot not in self._pins]
            if free:
                self.quiesce(free)

    def _move(self, move: Move) -> None:
        assert move.target not in self.contents, f"slot {move.target} is written but holds something"
        assert move.target not in self._pins
        assert move.source not in self._withdrawn, f"slot {move.source} is copied after it was withdrawn"
        self.contents[move.target] = self.contents[move.source]

    def forget(self, slot: int) -> None:
        """A grant came back without being published."""
        self.contents.pop(slot, None)
