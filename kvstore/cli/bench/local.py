"""The mapped path of the SDK beside ``ctypes.memmove`` on the same memory: reads, views, puts, lookups.

Everything is checked by content, outside of the timing: each block's bytes derive from its key. Each round lets all
sides work in turns of a few megabytes, so a change of the machine's load meets all of them. First touches of pages are
not the steady state: the client's mapping and its buffers are touched once before anything is timed.

The baseline of a put writes into the arena past the daemon, so the daemon must be the benchmark's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.cli.bench.local_blocks import CHAIN_BLOCKS, Buffers, StoredBlocks, touch_mapping
from kvstore.cli.bench.local_match import Matches
from kvstore.cli.bench.local_puts import FullTier, Puts
from kvstore.cli.bench.local_reads import Reads
from kvstore.cli.bench.local_redis import RedisReads, RedisWrites
from kvstore.cli.bench.local_redis_server import Redis, redis_server, why_not
from kvstore.cli.bench.local_sustained import Sustained
from kvstore.cli.bench.machine import machine_facts
from kvstore.cli.bench.report import Report, Row
from kvstore.cli.private_daemon import PrivateDaemon
from kvstore.errors import InvalidArgument
from kvstore.format.constants import PAGE_BYTES
from kvstore.protocol.namespace import Namespace
from kvstore_client import Client

__all__ = ["BASELINE", "DEFAULT_SIZES", "Extent", "local_daemon", "measure_local"]

BASELINE: Final = (
    "ctypes.memmove of the same bytes between the same slots of the client's mapping and the same buffers, in turns, "
    "unless the row names another"
)
DEFAULT_SIZES: Final = (64 << 10, 256 << 10, 1 << 20, 4 << 20)

_NAMESPACE: Final = Namespace(name="bench local")
_TIMEOUT_S: Final = 60.0
_SMALLEST_CAPACITY_BYTES: Final = 64 << 20
_SMALLEST_BLOCK_BYTES: Final = 1 << 10
_BUFFERS: Final = 64


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        sizes_bytes: payloads of a block.
        rounds: turns of all sides; sustained puts, which are long, get a quarter of them.
        set_bytes: blocks in the store; cold is what is larger than the caches.
        buffer_bytes: of the client's rotating buffers.
        round_bytes: what each side copies in a round.
        with_redis: whether Redis is measured where it is installed.
    """

    sizes_bytes: Sequence[int] = DEFAULT_SIZES
    rounds: int = 20
    set_bytes: int = 512 << 20
    buffer_bytes: int = 256 << 20
    round_bytes: int = 128 << 20
    with_redis: bool = True

    def __post_init__(self) -> None:
        if not self.sizes_bytes or min(self.sizes_bytes) < _SMALLEST_BLOCK_BYTES:
            raise InvalidArgument(f"give block sizes of at least {_SMALLEST_BLOCK_BYTES} bytes")
        if max(self.sizes_bytes) * 2 > self.set_bytes:
            raise InvalidArgument(f"a set of {self.set_bytes} bytes holds less than two blocks of the largest size")

    @property
    def steps(self) -> int:
        """How often ``measure_local`` says that a round is done."""
        return len(self.sizes_bytes) * (2 * self.rounds + self.sustained_rounds) + self.rounds

    @property
    def sustained_rounds(self) -> int:
        """Rounds of sustained puts."""
        return max(1, self.rounds // 4)

    @property
    def capacity_bytes(self) -> int:
        """Capacity of the daemon's tier: the set, what its slots take more, and as much again to be evicted."""
        return max(_SMALLEST_CAPACITY_BYTES, self.set_bytes * 3 // 2)


def local_daemon(extent: Extent) -> PrivateDaemon:
    """A daemon with room for all that is measured, everything else as by default."""
    return PrivateDaemon(capacity_bytes=extent.capacity_bytes)


def measure_local(daemon: PrivateDaemon, extent: Extent, on_round: Callable[[], None] = lambda: None) -> Report:
    """Measure a daemon of our own. What it stores afterwards is worthless.

    Args:
        daemon: started, made by ``local_daemon`` for the same extent.
        extent: how much.
        on_round: called ``extent.steps`` times.

    Raises:
        KVStoreError: the daemon or Redis cannot be reached or mapped, or an answer or a byte is wrong.
    """
    machine = machine_facts()
    rows: list[Row] = []
    missing = why_not() if extent.with_redis else "it was not asked for"
    with contextlib.ExitStack() as stack:
        redis = None if missing else stack.enter_context(redis_server())
        for size_bytes in extent.sizes_bytes:
            with _connected(daemon.endpoint, size_bytes) as client:
                rows += _measure_size(client, daemon.pid, size_bytes, extent, redis, on_round)
    with (
        _connected(daemon.endpoint, PAGE_BYTES) as client,
        Client(daemon.endpoint, namespace=_NAMESPACE, timeout=_TIMEOUT_S, mapped=False) as socket_client,
    ):
        matches = Matches(client, socket_client)
        for _ in range(extent.rounds):
            matches.round()
            on_round()
        rows += matches.rows()
    if missing:
        rows.append(Row(op="redis", batch=1, note=f"not measured: {missing}"))
    return Report(machine=machine, baseline=BASELINE, rows=rows)


@contextlib.contextmanager
def _connected(endpoint: str, size_bytes: int) -> Iterator[Client]:
    """A mapped client of an empty namespace, its mapping touched; the namespace is empty again afterwards."""
    options = {"namespace": _NAMESPACE, "timeout": _TIMEOUT_S, "payload_bytes": (size_bytes,), "mapped": True}
    with Client(endpoint, **options) as client:
        client.clear()
        touch_mapping(client)
        yield client
        client.clear()


def _measure_size(
    client: Client,
    daemon_pid: int,
    size_bytes: int,
    extent: Extent,
    redis: Redis | None,
    on_round: Callable[[], None],
) -> list[Row]:
    count = -(-extent.set_bytes // size_bytes)
    count = -(-count // CHAIN_BLOCKS) * CHAIN_BLOCKS if count > CHAIN_BLOCKS else count
    blocks = StoredBlocks(client, size_bytes, count)
    blocks.check_all()
    pool = Buffers(size_bytes, max(_BUFFERS, extent.buffer_bytes // size_bytes))
    reads = Reads(client, blocks, pool, extent.round_bytes)
    redis_reads = None if redis is None else RedisReads(redis, client, blocks, pool)
    for _ in range(extent.rounds):
        reads.round()
        if redis_reads is not None:
            redis_reads.round()
        on_round()
    reads.finish()
    client.clear()

    pool.derive()
    tier = FullTier(client, pool, extent.capacity_bytes, min(extent.set_bytes, extent.capacity_bytes // 2))
    puts = Puts(tier, pool, extent.round_bytes)
    redis_writes = None if redis is None else RedisWrites(redis, tier, blocks.keys, pool)
    for _ in range(extent.rounds):
        puts.round()
        if redis_writes is not None:
            redis_writes.round()
        on_round()
    sustained = Sustained(tier, pool, extent.set_bytes, daemon_pid)
    for _ in range(extent.sustained_rounds):
        sustained.round()
        on_round()
    rows = [*reads.rows(), *puts.rows(), *sustained.rows()]
    for side in (redis_reads, redis_writes):
        rows += [] if side is None else side.rows()
    return rows
