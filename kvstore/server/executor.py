"""Carries the store's instructions out on arena and index; answers ``Quiesced`` when nobody reads a slot any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvstore.core.block import Record
from kvstore.core.events import Displaced, Event, Quiesced, SlotWanted
from kvstore.core.instructions import (
    Demote,
    EndNamespace,
    Grant,
    Instruction,
    Move,
    Namespaced,
    Publish,
    Refuse,
    Replace,
    TryAgain,
    Withdraw,
)
from kvstore.core.store import Store
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.protocol.messages import Reason
from kvstore.tiers.dram import Arena
from kvstore.tiers.index import Index


class Executor:
    """Between the store, which decides, and the arena and the index, which hold the bytes.

    Args:
        store: the state.
        arena: the memory its slots lie in.
        clock: nanoseconds, monotonic.
        index: what clients read; None where none of them maps.
    """

    def __init__(self, store: Store, arena: Arena, clock: Callable[[], int], index: Index | None = None) -> None:
        self.store = store
        self.arena = arena
        self.index = index
        self._clock = clock
        self._pins: Counter[int] = Counter()
        self._withdrawn: set[int] = set()
        self._hazarded: dict[int, None] = {}
        self.demote: Callable[[list[Record], list[int]], None] | None = None
        """Writes records to the tier below, where there is one."""
        self.hurry: Callable[[], None] = lambda: None
        """Has what was written below become durable at once, because somebody waits for its room."""

    def apply(self, event: Event) -> Instruction | None:
        """Give an event to the store and carry out what it wants; its answer, where it has one."""
        answer: Instruction | None = None
        for instruction in self.store.handle(event, self._clock()):
            if isinstance(instruction, Withdraw):
                self._withdraw(instruction.slots)
            elif isinstance(instruction, Publish):
                self._publish(instruction.records)
            elif isinstance(instruction, Replace):
                if self.index is not None:
                    self.index.replace(instruction.slot, instruction.record)
            elif isinstance(instruction, Move):
                self._move(instruction)
            elif isinstance(instruction, Demote):
                assert self.demote is not None
                self.demote(instruction.records, instruction.accesses)
            elif isinstance(instruction, EndNamespace):
                if self.index is not None:
                    self.index.end_namespace(instruction.namespace_id)
            else:
                answer = instruction
        if isinstance(answer, Namespaced) and self.index is not None:
            state = answer.namespace
            self.index.begin_namespace(state.id, state.generation, state.parts, state.digest)
        return answer

    def want_slot(self, event: SlotWanted) -> Record | Refuse:
        """A granted slot, after whatever had to leave for it; or why there is none."""
        looked = False
        while True:
            answer = self.apply(event)
            if isinstance(answer, Grant):
                return answer.record
            if isinstance(answer, Refuse):
                if answer.reason is Reason.DEMOTING:
                    self.hurry()
                if looked or not self._hazarded:
                    return answer
                # What was read in place when it was last looked at may be free by now.
                looked = True
                self.look_at_hazards()
                continue
            assert isinstance(answer, TryAgain)

    def slots_ahead(self, session: int, slot_bytes: int, count: int) -> list[Record]:
        """Up to so many granted slots, as long as nothing has to leave for them."""
        event = SlotWanted(session, slot_bytes, ahead=True)
        handle, now_ns = self.store.handle, self._clock()
        records: list[Record] = []
        for _ in range(count):
            (answer,) = handle(event, now_ns)
            if not isinstance(answer, Grant):
                break
            records.append(answer.record)
        return records

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
                    if slot not in self._hazarded:
                        quiesced.append(slot)
        if quiesced:
            self.apply(Quiesced(quiesced))

    @property
    def pinned_slots(self) -> int:
        """Slots that transfers read at this moment."""
        return len(self._pins)

    @property
    def hazarded_slots(self) -> int:
        """Withdrawn slots that were last seen to be read in place by a client."""
        return len(self._hazarded)

    def hazarded_bytes(self, slots: list[int]) -> list[int]:
        """Payload bytes of each of the slots that is withdrawn and waits for a client."""
        records = [self.store.records[slot] for slot in set(slots) if slot in self._hazarded]
        # One that was never committed holds no record.
        return [max(record.record_bytes - RECORD_HEADER_BYTES, 0) or record.slot_bytes for record in records]

    def look_at_hazards(self) -> None:
        """Let go of withdrawn slots that no client reads in place any more."""
        if not self._hazarded or self.index is None:
            return
        waiting = list(self._hazarded)
        self._hazarded = dict.fromkeys(self.index.still_read(waiting))
        quiesced = [slot for slot in waiting if slot not in self._hazarded and slot not in self._withdrawn]
        if quiesced:
            self.apply(Quiesced(quiesced))

    def _publish(self, records: list[Record]) -> None:
        if self.index is None:
            return
        for record in self.index.publish(records):
            # Making room for an earlier one may have cost this one its place.
            if record.block is not None:
                self.apply(Displaced(record.slot, self.index.others(record)))

    def _move(self, instruction: Move) -> None:
        self.arena.move(instruction.source, instruction.target, instruction.slot_bytes)
        if self.index is not None:
            self.index.move(instruction.source, instruction.target)

    def _withdraw(self, slots: list[int]) -> None:
        held = self.index.withdraw(slots) if self.index is not None else []
        if held:
            self._hazarded.update(dict.fromkeys(held))
        if self._pins:
            self._withdrawn.update(slot for slot in slots if slot in self._pins)
        if held or self._pins:
            slots = [slot for slot in slots if slot not in self._hazarded and slot not in self._withdrawn]
        if slots:
            self.store.handle(Quiesced(slots), self._clock())
