"""Records what is looked up, when asked: a watcher that puts the reports of each request together.

A request says in several reports what it wants: its match names the blocks that are there and some of those that are
not, its gets and puts name others. What has one access number is one request; it is over when nothing came for a while,
and then goes to a thread that writes it. Memory is bounded twice: by blocks of requests that are not over, of which the
oldest are closed early, and by blocks that wait for the thread, past which requests are dropped and counted.

Covers: collecting, starting and stopping, figures. Does not cover: files, see ``kvstore.server.recording_writer``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from kvstore.core.ssd_record import SsdBlock
from kvstore.core.watching import Cause
from kvstore.format.lookup_trace import MAX_BLOCKS_PER_LOOKUP, SALT_BYTES, Lookup, NamespaceFacts
from kvstore.protocol.statistics import RecordStats
from kvstore.server.recording_writer import RecordingWriter
from kvstore.tiers.recordings import RecordingDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.core.block import Block
    from kvstore.core.store import Store

__all__ = ["Recorder"]

_OVER_NS: Final = 30_000_000_000
"""A request that nothing came from for so long is over: an engine computes for some seconds before it puts."""
_OLDEST_NS: Final = 120_000_000_000
_MOST_REQUESTS: Final = 1 << 14
_MOST_BLOCKS: Final = 1 << 18
_NS_PER_MS: Final = 1_000_000
_END_TIMEOUT_S: Final = 10.0


class _Request:
    """What is known of a request so far: keys in the order of its prefix."""

    __slots__ = ("asked", "below", "end", "first_ns", "hits", "keys", "last_ns", "namespace_id")

    def __init__(self, namespace_id: int, now_ns: int) -> None:
        self.namespace_id = namespace_id
        self.first_ns = now_ns
        self.last_ns = now_ns
        self.keys: dict[bytes, None] = {}
        self.asked = 0
        self.hits = 0
        self.below = 0
        self.end = b""


class Recorder:
    """See the module. Everything but ``finished`` is for the event loop's thread.

    Args:
        store: watched while it records.
        path: directory for recordings.
        max_bytes, files: see ``RecordingWriter``.
        clock: nanoseconds that never go back.
        make_directory: gives the directory, for tests.
        failed: told once why a recording has ended by itself.
    """

    def __init__(
        self,
        store: Store,
        path: Path,
        max_bytes: int,
        files: int,
        clock: Callable[[], int],
        make_directory: Callable[[Path], RecordingDirectory] = RecordingDirectory,
        failed: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._store = store
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._clock = clock
        self._make_directory = make_directory
        self._failed = failed
        self._failure_told = False
        self._writer: RecordingWriter | None = None
        self._recording = False
        self._requests: dict[int, _Request] = {}
        self._ends: dict[bytes, int] = {}
        self._blocks = 0
        self._closed_access = 0
        self._numbers: dict[int, int] = {}
        self._slot_bytes: dict[int, int] = {}
        self._facts: dict[int, NamespaceFacts] = {}
        self._started_ns = 0
        self._started_unix_s = 0.0
        self._dropped = 0

    @property
    def recording(self) -> bool:
        """Whether it records."""
        return self._recording

    def start(self) -> None:
        """Begin a new recording; does nothing while one goes on.

        Raises:
            PermissionRefused: the directory will not do.
            OSError: no file can be made in it.
        """
        if self._recording:
            return
        started_unix_ns = time.time_ns()
        writer = RecordingWriter(
            self._make_directory(self._path),
            recording=secrets.token_bytes(16),
            salt=secrets.token_bytes(SALT_BYTES),
            started_unix_ns=started_unix_ns,
            max_bytes=self._max_bytes,
            files=self._files,
            dram_bytes=self._store.limits.capacity_bytes,
        )
        writer.start()
        self._writer = writer
        self._started_ns, self._started_unix_s = self._clock(), started_unix_ns / 1e9
        self._numbers, self._slot_bytes, self._facts = {}, {}, {}
        self._dropped = 0
        self._failure_told = False
        self._recording = True
        self._store.watchers.append(self)

    def stop(self) -> None:
        """Close all requests and end the recording; what waits is still written, see ``finished``."""
        if not self._recording:
            return
        self._recording = False
        self._store.watchers.remove(self)
        self._close(len(self._requests))
        assert self._writer is not None
        self._writer.end()

    def finished(self) -> bool:
        """Wait until a recording that was stopped is written; False where it takes too long. Not for the event loop."""
        return self._writer is None or self._recording or self._writer.join(_END_TIMEOUT_S)

    def tick(self) -> None:
        """Close requests that are over; end a recording that failed, and say so, also of one that failed at its end."""
        if self._writer is not None and self._writer.failure:
            self.stop()
            if not self._failure_told:
                self._failure_told = True
                self._failed(self._writer.failure)
            return
        if not self._recording:
            return
        now_ns = self._clock()
        over = 0
        for request in self._requests.values():
            if now_ns - request.last_ns < _OVER_NS and now_ns - request.first_ns < _OLDEST_NS:
                break
            over += 1
        self._close(over)

    def statistics(self) -> RecordStats:
        """Figures of the recording that goes on, or of the last one."""
        writer = self._writer
        if writer is None:
            return RecordStats(state="off", directory=str(self._path), max_bytes=self._max_bytes)
        return RecordStats(
            state="failed" if writer.failure else "on" if self._recording else "off",
            directory=str(self._path),
            problem=writer.failure,
            file=writer.file,
            started_unix_s=self._started_unix_s,
            requests=writer.written_lookups,
            blocks=writer.written_blocks,
            bytes_written=writer.written_bytes,
            open_requests=len(self._requests),
            dropped_requests=self._dropped,
            max_bytes=self._max_bytes,
        )

    def accessed(
        self,
        namespace_id: int,
        access: int,
        runs: Sequence[tuple[Block | SsdBlock, int]],
        asked: int,
        missing: Sequence[bytes],
    ) -> None:
        """See ``Watcher``."""
        request = self._requests.get(access)
        if request is None:
            if access <= self._closed_access:
                return
            request = self._begin(namespace_id, access)
            request.hits = sum(length for _, length in runs)
            request.below = sum(length for block, length in runs if isinstance(block, SsdBlock))
        request.last_ns = self._clock()
        request.asked = max(request.asked, asked)
        if runs and runs[-1][0].key not in request.keys:
            self._add_runs(request, runs)
        if missing:
            self._add(request, missing)
        self._mark_end(request, access)

    def stored(self, block: Block, access: int, *, promoted: bool) -> None:
        """See ``Watcher``: a put names a block that its request's match did not."""
        if promoted:
            return
        if block.slot_bytes > self._slot_bytes.get(block.namespace.id, 0):
            self._note_size(block.namespace.id, block.slot_bytes)
        request = self._requests.get(access)
        if request is None:
            # Of a client that does not say which request its put belongs to: the one that ends where this begins.
            access = self._ends.get(block.parent_key, 0)
            request = self._requests.get(access)
            if request is None or request.namespace_id != block.namespace.id:
                return
        request.last_ns = self._clock()
        if block.key not in request.keys:
            self._add(request, (block.key,))
            self._mark_end(request, access)

    def left(self, block: Block, cause: Cause) -> None:
        """See ``Watcher``: what leaves is nothing that was asked for."""

    def _begin(self, namespace_id: int, access: int) -> _Request:
        if len(self._requests) >= _MOST_REQUESTS or self._blocks >= _MOST_BLOCKS:
            self._close(1 + len(self._requests) // 8)
        request = self._requests[access] = _Request(namespace_id, self._clock())
        return request

    def _add_runs(self, request: _Request, runs: Sequence[tuple[Block | SsdBlock, int]]) -> None:
        for deepest, length in runs:
            self._note_size(request.namespace_id, deepest.slot_bytes)
            keys = _walked(deepest, length)
            if not request.keys:
                above = self._above(request.namespace_id, keys[0])
                request.hits += len(above)
                request.asked += len(above)
                self._add(request, above)
            self._add(request, keys)

    def _above(self, namespace_id: int, key: bytes) -> list[bytes]:
        """Keys of all blocks above one, which a request that begins in the middle needs as well."""
        state = self._store.namespaces.by_id.get(namespace_id)
        above = [] if state is None else [found for found, _ in state.upward(key)]
        above.reverse()
        return above[:-1]

    def _add(self, request: _Request, keys: Sequence[bytes]) -> None:
        before = len(request.keys)
        request.keys.update(dict.fromkeys(keys[: MAX_BLOCKS_PER_LOOKUP - before]))
        self._blocks += len(request.keys) - before

    def _mark_end(self, request: _Request, access: int) -> None:
        """Puts go on where a request's known keys end, as long as it asked for more."""
        if request.end:
            self._ends.pop(request.end, None)
            request.end = b""
        if request.keys and len(request.keys) < request.asked:
            request.end = next(reversed(request.keys))
            self._ends[request.end] = access

    def _note_size(self, namespace_id: int, slot_bytes: int) -> None:
        if slot_bytes > self._slot_bytes.get(namespace_id, 0):
            self._slot_bytes[namespace_id] = slot_bytes
            self._facts.pop(namespace_id, None)

    def _close(self, count: int) -> None:
        """Hand the oldest requests to the thread."""
        if not count:
            return
        lookups = []
        for access in [access for access, _ in zip(self._requests, range(count), strict=False)]:
            request = self._requests.pop(access)
            self._closed_access = max(self._closed_access, access)
            self._blocks -= len(request.keys)
            if request.end and self._ends.get(request.end) == access:
                del self._ends[request.end]
            if request.asked:
                lookups.append(self._lookup(request))
        if lookups and (self._writer is None or not self._writer.put(lookups)):
            self._dropped += len(lookups)

    def _lookup(self, request: _Request) -> Lookup:
        return Lookup(
            (request.first_ns - self._started_ns) // _NS_PER_MS,
            self._namespace(request.namespace_id),
            list(request.keys),
            max(request.asked, len(request.keys)),
            request.hits,
            request.below,
        )

    def _namespace(self, namespace_id: int) -> NamespaceFacts:
        facts = self._facts.get(namespace_id)
        if facts is None:
            number = self._numbers.setdefault(namespace_id, len(self._numbers))
            state = self._store.namespaces.by_id.get(namespace_id)
            description = None if state is None else state.description
            facts = self._facts[namespace_id] = NamespaceFacts(
                number,
                0 if description is None else description.block_tokens,
                self._slot_bytes.get(namespace_id, 0),
                "" if description is None else description.codec,
            )
        return facts


def _walked(deepest: Block | SsdBlock, length: int) -> list[bytes]:
    """Keys of a run, parents first; those of blocks that left meanwhile are missing in front."""
    keys: list[bytes] = []
    at: Block | SsdBlock | None = deepest
    while at is not None and len(keys) < length:
        keys.append(at.key)
        at = at.parent
    keys.reverse()
    return keys
