"""When the daemon is behind, it says so at once: work nobody waits for any more, or that waited too long, is refused.

The measure is a request's own age. A client on the same host stamps its requests with CLOCK_MONOTONIC; how long it
waited in queues is then known exactly, whatever the number of clients and the depth of their pipelines.
"""

from __future__ import annotations

from kvstore.protocol.messages import Get, Put

_SMOOTHING = 1 / 64


class Overload:
    """Decides whether a request is still worth carrying out.

    Args:
        max_delay_ms: a request with payload that waited longer is throttled.
    """

    def __init__(self, max_delay_ms: int) -> None:
        self._max_delay_ns = max_delay_ms * 1_000_000
        self.delay_ns = 0.0
        self.throttled = 0

    def refuses(self, request: Put | Get, now_ns: int, same_host: bool) -> bool:
        """Whether to answer ``throttled`` instead of moving payload: it waited too long, or nobody waits any more."""
        if not same_host or not request.sent_ns:
            return False
        delay_ns = now_ns - request.sent_ns
        if delay_ns < 0:
            return False
        self.delay_ns += (delay_ns - self.delay_ns) * _SMOOTHING
        given_up = bool(request.timeout_ms) and delay_ns > request.timeout_ms * 1_000_000
        if given_up or delay_ns > self._max_delay_ns:
            self.throttled += 1
            return True
        return False
