"""Leases of blocks that a scheduler was promised, until they are loaded, the request ends, or their time is over."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from kvstore.errors import Throttled
from kvstore.protocol.keys import BlockKey
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST
from kvstore_client.client import Match
from kvstore_client.integrations.row_tier.counters import Counters

__all__ = ["Leases"]

_MOST_GAPS: Final = 8
"""Blocks that went meanwhile, after which the rest of a batch is not leased."""

_MOST_WAITING: Final = 1024
"""Batches that may wait; those beyond are not leased or touched."""


class Matches(Protocol):
    """What is asked of a client."""

    def match(self, keys: Sequence[BlockKey], *, lease: float | None = None, prefetch: bool = False) -> Match:
        """See ``Client.match``."""


class Leases:
    """Takes and gives back leases on a thread of its own; also tells the store what is used.

    Args:
        client: what is asked, None where there is no store now.
        failed: told of errors.
        counters: ``leases`` are counted by what became of them.
        lease_s: 0 for none.
    """

    def __init__(
        self,
        client: Callable[[], Matches | None],
        failed: Callable[[BaseException], None],
        counters: Counters,
        lease_s: float,
    ) -> None:
        self._client = client
        self._failed = failed
        self._counters = counters
        self._lease_s = lease_s
        self._held: dict[str, list[Match]] = {}
        """Only of requests that were promised something; the thread's own."""
        self._waiting: queue.Queue[tuple[str, str, list[BlockKey]] | None] = queue.Queue(_MOST_WAITING)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-tier-leases", daemon=True)
        self._thread.start()

    def promise(self, request: str, keys: list[BlockKey]) -> None:
        """Lease blocks that a request was told are there."""
        if self._lease_s and keys:
            self._put("lease", request, keys)

    def release(self, request: str) -> None:
        """Give back what was leased for a request: it loaded it, or ended."""
        if self._lease_s:
            self._put("release", request, [])

    def touch(self, keys: list[BlockKey]) -> None:
        """Say that blocks are used, of which no byte is read."""
        if keys:
            self._put("touch", "", keys)

    def close(self, timeout_s: float) -> bool:
        """End the thread; whether it ended. What is still leased ends with the connection."""
        self._closing = True
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _put(self, what: str, request: str, keys: list[BlockKey]) -> None:
        try:
            self._waiting.put_nowait((what, request, keys))
        except queue.Full:
            # A lease that is not given back ends by its time.
            self._counters.add("leases", "skipped")

    # -------------------------------------------------------------- the thread

    def _run(self) -> None:
        while (task := self._waiting.get()) is not None and not self._closing:
            client = self._client()
            if client is None:
                self._held.clear()
                continue
            what, request, keys = task
            try:
                if what == "lease":
                    self._lease(client, request, keys)
                elif what == "release":
                    for match in self._held.pop(request, ()):
                        match.release()
                else:
                    client.match(keys[:MAX_KEYS_PER_REQUEST])
            except Throttled:
                self._counters.add("leases", "throttled")
            except Exception as error:
                self._failed(error)

    def _lease(self, client: Matches, request: str, keys: list[BlockKey]) -> None:
        """Lease runs of blocks that are there."""
        held = self._held.setdefault(request, [])
        gaps = at = 0
        while at < len(keys) and gaps < _MOST_GAPS:
            match = client.match(keys[at : at + MAX_KEYS_PER_REQUEST], lease=self._lease_s, prefetch=True)
            if match.lease:
                held.append(match)
                self._counters.add("leases", "taken")
            at += match.hits
            if match.hits < MAX_KEYS_PER_REQUEST and at < len(keys):
                gaps += 1
                at += 1
