"""How fast an engine computes prompts, measured on its own steps: what ``Client.report_prefill`` is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["CpuMark", "CudaMark", "Mark", "PrefillTimes"]

_LEAST_TOKENS: Final = 128
"""Of prompts in a step. A smaller step takes about as long with twice the tokens: it says nothing of long prompts."""
_LEAST_SHARE: Final = 0.5
"""Of prompts in a step's tokens: the others are taken for part of what it costs to compute prompts in this load."""
_REPORTED_AFTER_S: Final = 1.0
_MOST_WAITING: Final = 256


class Mark(Protocol):
    """A point in the work of a device."""

    def is_reached(self) -> bool:
        """Whether the work before it is done."""

    def seconds_since(self, earlier: Mark) -> float:
        """Time between two marks that are reached."""


class CpuMark:
    """Now, where a step is computed when the engine's call of it returns."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def is_reached(self) -> bool:
        """See ``Mark``."""
        return True

    def seconds_since(self, earlier: Mark) -> float:
        """See ``Mark``."""
        assert isinstance(earlier, CpuMark)
        return self.seconds - earlier.seconds


class CudaMark:
    """A mark in the current CUDA stream; the host does not wait for it."""

    def __init__(self) -> None:
        import torch

        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def is_reached(self) -> bool:
        """See ``Mark``."""
        return bool(self.event.query())

    def seconds_since(self, earlier: Mark) -> float:
        """See ``Mark``."""
        assert isinstance(earlier, CudaMark)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class PrefillTimes:
    """Sums up steps that compute little but prompts, from when their loads are over to the end of their model.

    Args:
        mark: makes a mark of now; see ``CpuMark`` and ``CudaMark``.
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self._mark = mark
        self._step: tuple[int, Mark] | None = None
        self._waiting: deque[tuple[int, Mark, Mark]] = deque(maxlen=_MOST_WAITING)
        self._tokens = 0
        self._seconds = 0.0

    def begin(self, prefill_tokens: int, other_tokens: int) -> None:
        """A step begins to compute so many tokens of prompts, and others.

        A step that began and did not end does not count.
        """
        counts = prefill_tokens >= max(_LEAST_TOKENS, _LEAST_SHARE * (prefill_tokens + other_tokens))
        self._step = (prefill_tokens, self._mark()) if counts else None

    def end(self) -> None:
        """The step that began is computed, or all of it is queued on the device's current stream."""
        step, self._step = self._step, None
        if step is not None:
            self._waiting.append((*step, self._mark()))

    def take(self) -> tuple[int, float] | None:
        """Tokens and seconds since the last answer, once there is a second of them; None before. Never waits."""
        while self._waiting and self._waiting[0][2].is_reached():
            tokens, begun, ended = self._waiting.popleft()
            self._tokens += tokens
            self._seconds += max(ended.seconds_since(begun), 0.0)
        if self._seconds < _REPORTED_AFTER_S:
            return None
        taken = self._tokens, self._seconds
        self._tokens, self._seconds = 0, 0.0
        return taken
