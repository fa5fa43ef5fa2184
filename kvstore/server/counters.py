"""Counts of the request path since the start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestCounters:
    """Plain integers, incremented on the hot path, read by statistics and metrics."""

    requests: int = 0
    bad_requests: int = 0
    matches: int = 0
    match_keys: int = 0
    match_hits: int = 0
    gets: int = 0
    get_keys: int = 0
    get_hits: int = 0
    get_throttled: int = 0
    bytes_out: int = 0
    mapped_reads: int = 0
    stored: int = 0
    exists: int = 0
    throttled: int = 0
    rejected: int = 0
    bytes_in: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
