"""What happened to a key, bounded: the last changes of state, for error messages and debugging."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvstore.core.block import RecordState

STORY_LENGTH: Final = 8192


class Chapter(NamedTuple):
    """One change of state of one record."""

    now_ns: int
    key: bytes
    part: int
    slot: int
    before: RecordState
    after: RecordState
    cause: str


class Story:
    """The last changes of state of all records."""

    def __init__(self, length: int = STORY_LENGTH) -> None:
        self._chapters: deque[tuple[int, bytes, int, int, RecordState, RecordState, str]] = deque(maxlen=length)
        self.add: Final = self._chapters.append
        """Remember a change, as a tuple of a ``Chapter``'s fields: it is made at every change, and seldom read."""

    def of(self, key: bytes) -> list[Chapter]:
        """What is still remembered of a key, oldest first."""
        return [chapter for chapter in self.all() if chapter.key == key]

    def tell(self, key: bytes, slot: int) -> str:
        """The story of a key or, where it has none yet, of a slot, as text."""
        chapters = [chapter for chapter in self.all() if chapter.key == key or chapter.slot == slot]
        return "; ".join(
            f"{chapter.now_ns} slot {chapter.slot} {chapter.before.name} -> {chapter.after.name} ({chapter.cause})"
            for chapter in chapters[-16:]
        )

    def all(self) -> Iterator[Chapter]:
        """All that is remembered, oldest first."""
        return map(Chapter._make, self._chapters)
