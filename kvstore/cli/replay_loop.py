"""Drives a live daemon with a trace: match, get and check every byte, put what is missing, flush.

Covers: the loop and its figures. Does not cover: where the daemon comes from and how the figures are shown, see
``kvstore.cli.replay``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Final, Protocol

import msgspec

from kvstore.cli.bench.report import percentile
from kvstore.cli.block_bytes import BlockBytes
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import padded_bytes
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import DaemonStats
from kvstore.simulator.requests import Prompt
from kvstore.simulator.trace import TRACE_BLOCK_TOKENS, block_key
from kvstore_client import Match

__all__ = ["DaemonView", "Latency", "ReplayClient", "ReplayReport", "replay_namespace", "replay_trace", "slot_bytes"]

_PUT_ANSWERS: Final = (PutStatus.STORED, PutStatus.EXISTS, PutStatus.THROTTLED, PutStatus.REJECTED)


class ReplayClient(Protocol):
    """What of a ``Client`` a replay uses."""

    @property
    def corrupt_records(self) -> int:
        """Records that arrived damaged."""
        ...

    def match(self, keys: Sequence[bytes], /) -> Match:
        """See ``Client``."""
        ...

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[memoryview], /, *, request: int) -> list[int | None]:
        """See ``Client``."""
        ...

    def put_many(
        self, keys: Sequence[bytes], datas: Sequence[memoryview], /, *, parent: bytes | None, request: int
    ) -> list[PutStatus]:
        """See ``Client``."""
        ...

    def flush(self) -> object:
        """See ``Client``."""
        ...

    def stats(self) -> DaemonStats:
        """See ``Client``."""
        ...


class Latency(msgspec.Struct, kw_only=True):
    """Time of one kind of call, each of which carries all blocks of a request.

    Attributes:
        calls: how many.
        p50_us, p99_us: percentiles (nearest rank); 0 without a call.
    """

    calls: int
    p50_us: float
    p99_us: float


class DaemonView(msgspec.Struct, kw_only=True):
    """What the daemon's own counters say of the time of the replay, other clients of the daemon included."""

    match_keys: int
    match_hits: int
    stored_blocks: int
    evicted_blocks: int
    corrupt_records: int
    bytes_in: int
    bytes_out: int
    resident_blocks: int
    resident_bytes: int
    capacity_bytes: int


class ReplayReport(msgspec.Struct, kw_only=True):
    """Outcome of a replay.

    Attributes:
        trace: as given.
        block_bytes: payload bytes a block.
        slot_bytes: bytes that a block occupies in the daemon.
        capacity_blocks: blocks that the daemon can hold, by its capacity.
        requests: requests replayed, those without a full block included.
        blocks_asked: full blocks of all requests.
        blocks_hit: leading blocks found by ``match``.
        hit_rate: ``blocks_hit / blocks_asked``, 0 where nothing was asked.
        blocks_lost: blocks found by ``match`` that the get behind it did not give.
        corrupt_records: records that arrived damaged, which the client saw by their checksum and took for misses.
        wrong_bytes: bytes received that are not those of their key.
        bytes_read: payload bytes received and checked.
        bytes_written: payload bytes whose put was answered ``stored``.
        puts: answers to puts, by status.
        latency: by call.
        seconds: of the whole loop.
        daemon: the daemon's counters.
    """

    trace: str
    block_bytes: int
    slot_bytes: int
    capacity_blocks: int
    requests: int
    blocks_asked: int
    blocks_hit: int
    hit_rate: float
    blocks_lost: int
    corrupt_records: int
    wrong_bytes: int
    bytes_read: int
    bytes_written: int
    puts: dict[str, int]
    latency: dict[str, Latency]
    seconds: float
    daemon: DaemonView


def slot_bytes(block_bytes: int) -> int:
    """Bytes of the exact slot of a payload: header and payload, rounded up to 4096."""
    return padded_bytes(RECORD_HEADER_BYTES + block_bytes)


def replay_namespace(name: str, block_bytes: int, block_tokens: int = TRACE_BLOCK_TOKENS) -> Namespace:
    """The namespace of replays with one payload size; another size is other content under the same keys."""
    return Namespace(name=name, layout=f"trace replay, {block_bytes} bytes a block", block_tokens=block_tokens)


def replay_trace(
    client: ReplayClient,
    requests: Sequence[Prompt],
    *,
    trace: str,
    block_bytes: int,
    blocks: BlockBytes | None = None,
    on_request: Callable[[], None] = lambda: None,
) -> ReplayReport:
    """Replay requests in order, one after the other, each flushed before the next.

    A request matches its full blocks, gets those that hit and checks them, and puts the others as one chain. A put
    that is throttled or rejected is counted and not tried again.

    Args:
        client: in a namespace of ``replay_namespace``.
        requests: of a trace.
        trace: names the trace in the report.
        block_bytes: payload bytes a block.
        blocks: derives and checks them, of the longest request; None for bytes that derive from the keys.
        on_request: called after each request.

    Raises:
        KVStoreError: the daemon went away or did not answer in time.
    """
    if blocks is None:
        blocks = BlockBytes(block_bytes, max(1, max(len(request.full_blocks) for request in requests)))
    loop = _Loop(client, blocks)
    before, corrupt_before = client.stats(), client.corrupt_records
    started = perf_counter_ns()
    for request in requests:
        loop.replay([block_key(hash_id) for hash_id in request.full_blocks])
        on_request()
    seconds = (perf_counter_ns() - started) / 1e9
    after = client.stats()
    slot = slot_bytes(block_bytes)
    return ReplayReport(
        trace=trace,
        block_bytes=block_bytes,
        slot_bytes=slot,
        capacity_blocks=after.dram.capacity_bytes // slot,
        requests=len(requests),
        blocks_asked=loop.asked,
        blocks_hit=loop.hit,
        hit_rate=round(loop.hit / loop.asked, 6) if loop.asked else 0.0,
        blocks_lost=loop.lost,
        corrupt_records=client.corrupt_records - corrupt_before,
        wrong_bytes=loop.wrong,
        bytes_read=loop.bytes_read,
        bytes_written=loop.puts[PutStatus.STORED] * block_bytes,
        puts={status.name.lower(): loop.puts[status] for status in _PUT_ANSWERS},
        latency={name: _latency(times) for name, times in loop.times_ns.items()},
        seconds=round(seconds, 3),
        daemon=_view(before, after),
    )


class _Loop:
    """State of one replay: buffers that are used again, and counts."""

    def __init__(self, client: ReplayClient, blocks: BlockBytes) -> None:
        self._client = client
        self._blocks = blocks
        self.asked = 0
        self.hit = 0
        self.lost = 0
        self.wrong = 0
        self.bytes_read = 0
        self.puts: Counter[PutStatus] = Counter()
        self.times_ns: dict[str, list[int]] = {"match": [], "get": [], "put": []}

    def replay(self, keys: list[bytes]) -> None:
        """One request: its keys, each of which stands for a whole prefix."""
        if not keys:
            return
        clock, client = perf_counter_ns, self._client
        started = clock()
        match = client.match(keys)
        self.times_ns["match"].append(clock() - started)
        hits = len(match)
        self.asked += len(keys)
        self.hit += hits
        if hits:
            found = keys[:hits]
            outs = self._blocks.receivers(hits)
            started = clock()
            lengths = client.get_many_into(found, outs, request=match.request)
            self.times_ns["get"].append(clock() - started)
            self.wrong += self._blocks.wrong_bytes(found, lengths)
            received = [length for length in lengths if length is not None]
            self.bytes_read += sum(received)
            self.lost += hits - len(received)
        if hits < len(keys):
            missing = keys[hits:]
            payloads = self._blocks.derive(missing)
            parent = keys[hits - 1] if hits else None
            started = clock()
            statuses = client.put_many(missing, payloads, parent=parent, request=match.request)
            self.times_ns["put"].append(clock() - started)
            self.puts.update(statuses)
        client.flush()


def _latency(times_ns: list[int]) -> Latency:
    if not times_ns:
        return Latency(calls=0, p50_us=0.0, p99_us=0.0)
    ranked = sorted(times_ns)
    p50_ns, p99_ns = percentile(ranked, 0.5), percentile(ranked, 0.99)
    return Latency(calls=len(ranked), p50_us=round(p50_ns / 1000, 2), p99_us=round(p99_ns / 1000, 2))


def _view(before: DaemonStats, after: DaemonStats) -> DaemonView:
    return DaemonView(
        match_keys=after.lookups.match_keys - before.lookups.match_keys,
        match_hits=after.lookups.match_hits - before.lookups.match_hits,
        stored_blocks=after.puts.stored - before.puts.stored,
        evicted_blocks=after.eviction.evicted_blocks - before.eviction.evicted_blocks,
        corrupt_records=after.eviction.corrupt_records - before.eviction.corrupt_records,
        bytes_in=after.puts.bytes_in - before.puts.bytes_in,
        bytes_out=after.lookups.bytes_out - before.lookups.bytes_out,
        resident_blocks=after.dram.blocks,
        resident_bytes=after.dram.resident_bytes,
        capacity_bytes=after.dram.capacity_bytes,
    )
