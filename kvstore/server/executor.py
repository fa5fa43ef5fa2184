"""Carries out the store's instructions on the arena, and answers ``Quiesced`` when nobody reads a slot any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvstore.core.block import Record
from kvstore.core.events import Event, Quiesced, SlotWanted
from kvstore.core.instructions import Grant, Instruction, Move, Refuse, TryAgain, Withdraw
from kvstore.core.store import Store
from kvstore.tiers.dram import Arena


class Executor:
    """Between the store, which decides, and the arena, which holds the bytes.

    Args:
        store: the state.
        arena: the memory its slots lie in.
        clock: nanoseconds, monotonic.
    """

    def __init__(self, store: Store, arena: Arena, clock: Callable[[], int]) -> None:
        self.store = store
        self.arena = arena
        self._clock = clock
        self._pins: Counter[int] = Counter()
        self._withdrawn: set[int] = set()

    def apply(self, event: Event) -> Instruction | None:
        """Give an event to the store and carry out what it wants; its answer, where it has one."""
        answer: Instruction | None = None
        for instruction in self.store.handle(event, self._clock()):
            if isinstance(instruction, Withdraw):
                self._withdraw(instruction.slots)
            elif isinstance(instruction, Move):
                self.arena.move(instruction.source, instruction.target, instruction.slot_bytes)
            else:
                answer = instruction
        return answer

    def want_slot(self, session: int, record_bytes: int) -> Record | Refuse:
        """A granted slot, after whatever had to leave for it; or why there is none."""
        event = SlotWanted(session, record_bytes)
        while True:
            answer = self.apply(event)
            if isinstance(answer, Grant):
                return answer.record
            if isinstance(answer, Refuse):
                return answer
            assert isinstance(answer, TryAgain)

    def pin(self, slots: list[int]) -> None:
        """A transfer reads these slots: they are not reused until ``unpin``."""
        self._pins.update(slots)

    def unpin(self, slots: list[int]) -> None:
        """A transfer is over."""
        quiesced = []
        for slot in slots:
            self._pins[slot] -= 1
            if not self._pins[slot]:
                del self._pins[slot]
                if slot in self._withdrawn:
                    self._withdrawn.discard(slot)
                    quiesced.append(slot)
        if quiesced:
            self.apply(Quiesced(quiesced))

    @property
    def pinned_slots(self) -> int:
        """Slots that transfers read at this moment."""
        return len(self._pins)

    def _withdraw(self, slots: list[int]) -> None:
        if self._pins:
            pinned = [slot for slot in slots if slot in self._pins]
            if pinned:
                self._withdrawn.update(pinned)
                slots = [slot for slot in slots if slot not in self._pins]
        if slots:
            self.store.handle(Quiesced(slots), self._clock())
