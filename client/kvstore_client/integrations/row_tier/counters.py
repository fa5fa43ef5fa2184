"""What a tier counts, between two times that its engine asks."""

from __future__ import annotations

import threading
from collections import Counter

__all__ = ["Counters"]


class Counters:
    """Counts by name and labels, of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        """Count something."""
        with self._lock:
            self._counts[name, labels] += by  # type: ignore[assignment]

    def take(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """What was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return {key: float(count) for key, count in counts.items()}

    def so_far(self) -> dict[str, float]:
        """What was counted since the last ``take``, by name and labels in one word."""
        with self._lock:
            return {".".join((name, *labels)): float(count) for (name, labels), count in sorted(self._counts.items())}
