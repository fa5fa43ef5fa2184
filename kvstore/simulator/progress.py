"""How far a simulation is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

RequestT = TypeVar("RequestT")

ProgressTold = Callable[[int], None]
"""Is given the number of requests done."""

PROGRESS_REQUESTS: Final = 256
"""Requests between two calls of ``ProgressTold``."""


def numbered(requests: Sequence[RequestT], progress: ProgressTold | None) -> Iterator[tuple[int, RequestT]]:
    """Requests with their numbers, from 1 on; ``progress`` is told every few hundred that are done, and at the end."""
    for number, request in enumerate(requests, 1):
        yield number, request
        if progress is not None and not number % PROGRESS_REQUESTS:
            progress(number)
    if progress is not None:
        progress(len(requests))
