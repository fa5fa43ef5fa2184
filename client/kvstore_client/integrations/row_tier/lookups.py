"""Answers about blocks for a scheduler that must not wait: asked for in the background where memory does not say."""

from __future__ import annotations

import enum
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.protocol.keys import BlockKey

__all__ = ["Answer", "Lookups"]


class Answer(enum.Enum):
    """What is known of a block now."""

    HIT = enum.auto()
    MISS = enum.auto()
    LATER = enum.auto()


@dataclass(slots=True)
class _Verdict:
    answer: Answer = Answer.LATER
    requests: set[str] = field(default_factory=set)


class Lookups:
    """Asks for blocks in batches, on a thread of its own, and keeps the answers as long as a request wants them.

    All calls come from the scheduler, one at a time.

    Args:
        ask: whether blocks are there; waits, and runs in the thread. What it raises is a miss.
    """

    def __init__(self, ask: Callable[[Sequence[BlockKey]], Sequence[bool]]) -> None:
        self._ask = ask
        self._verdicts: dict[BlockKey, _Verdict] = {}
        self._of_request: dict[str, set[BlockKey]] = {}
        self._batch: list[tuple[BlockKey, _Verdict]] = []
        self._asked = 0
        self._questions: queue.SimpleQueue[list[tuple[BlockKey, _Verdict]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[list[tuple[_Verdict, bool]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvstore-tier-lookups", daemon=True)
        self._thread.start()

    def look_up(self, key: BlockKey, request: str) -> Answer:
        """What is known of a block; where nothing is, it will be asked for at the next ``flush``."""
        self._take_answers()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = _Verdict()
            self._batch.append((key, verdict))
        verdict.requests.add(request)
        self._of_request.setdefault(request, set()).add(key)
        return verdict.answer

    def flush(self) -> None:
        """Ask for what was looked up since the last time."""
        self._take_answers()
        if self._batch:
            self._asked += len(self._batch)
            self._questions.put(self._batch)
            self._batch = []

    def pending(self) -> bool:
        """Whether answers are on their way."""
        self._take_answers()
        return bool(self._asked or self._batch)

    def forget(self, request: str) -> None:
        """A request wants no answers any more."""
        for key in self._of_request.pop(request, ()):
            verdict = self._verdicts[key]
            verdict.requests.discard(request)
            if not verdict.requests:
                # One that is on its way finds nobody: whoever asks then asks anew.
                del self._verdicts[key]

    def close(self, timeout_s: float) -> bool:
        """End the thread; whether it ended."""
        self._questions.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _take_answers(self) -> None:
        while True:
            try:
                answers = self._answers.get_nowait()
            except queue.Empty:
                return
            self._asked -= len(answers)
            for verdict, there in answers:
                verdict.answer = Answer.HIT if there else Answer.MISS

    def _run(self) -> None:
        while (batch := self._questions.get()) is not None:
            try:
                found = list(self._ask([key for key, _ in batch]))
            except Exception:
                found = [False] * len(batch)
            self._answers.put([(verdict, there) for (_, verdict), there in zip(batch, found, strict=True)])
