"""Two daemons of equal settings, one driven through mapped memory and one over the socket: they stay equal.

The same steps go to both, and every answer is compared; reports are drained by a flush before the next step. At the end
both hold the same blocks, so the eviction policy learned the same order from access reports as from requests. A replay
is compared alike, with a plain model beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from daemon_process import DaemonProcess
from synthetic_trace import lru_hits, synthetic_requests

from kvstore.cli.replay import private_daemon_for
from kvstore.cli.replay_loop import ReplayReport, replay_namespace, replay_trace
from kvstore.protocol.statistics import DaemonStats
from kvstore.simulator.trace import TraceRequest
from kvstore_client import Client, InvalidArgument, Namespace

CHAINS = 12
CHAIN = 10
LARGEST = 65_281


def key(chain: int, block: int) -> bytes:
    return (1 + chain * 1000 + block).to_bytes(4, "big") * 8


def chain_of(chain: int) -> list[bytes]:
    return [key(chain, block) for block in range(CHAIN)]


def answer(operation: Callable[[Client], Any], client: Client) -> Any:
    try:
        return operation(client)
    except InvalidArgument as error:
        return str(error)


def read_many(
    client: Client, keys: list[bytes], part: int, length: int, request: int | None
) -> tuple[Any, list[bytes]]:
    outs = [bytearray(length) for _ in keys]
    lengths = client.get_many_into(keys, outs, part=part, request=request)
    return lengths, [bytes(out) for out in outs]


def read_one(client: Client, wanted: bytes, part: int, length: int) -> tuple[int | None, bytes]:
    out = bytearray(length)
    return client.get_into(wanted, out, part=part), bytes(out)


def look(client: Client, wanted: bytes, part: int) -> bytes | None:
    with client.view(wanted, part=part) as found:
        return None if found is None else bytes(found)


class Steps:
    """Random steps; each gives an operation for any client.

    Those of an engine put what a match said is missing, as one chain. The others put single parts anywhere, under an
    engine request of any age. (A chain that is partly there may lose its own end to its beginning on one path and not
    on the other: how many records are carried out together is a matter of timing.)
    """

    def __init__(self, seed: int, lengths: list[int], *, engine: bool) -> None:
        self.draw = random.Random(seed)
        self.lengths = lengths
        self.engine = engine
        self.parts = 1 if engine else 2
        self.requests: list[int] = []

    def next(self) -> Callable[[Client], Any]:
        draw = self.draw
        keys = chain_of(min(int(draw.expovariate(0.35)), CHAINS - 1))
        first = draw.randrange(CHAIN)
        part = draw.randrange(self.parts)
        wanted = keys[first]
        parent = keys[first - 1] if first else None
        datas = [draw.randbytes(draw.choice(self.lengths)) for _ in keys]
        request = draw.choice([None, *self.requests[-3:]])
        some = draw.sample([key(other, block) for other in range(CHAINS) for block in range(CHAIN)], 5)
        length = draw.choice([LARGEST, LARGEST, 100])
        wait = draw.random() < 0.5
        put: Callable[[Client], Any]
        remove: Callable[[Client], Any]
        if self.engine:
            put = lambda client: self.put_missing(client, keys, datas, wait)  # noqa: E731
            remove = lambda client: client.remove(keys[first:])  # noqa: E731
        else:
            put = lambda client: client.put(  # noqa: E731
                wanted, datas[first], parent=parent, part=part, request=request, wait=wait
            )
            remove = lambda client: client.remove(some)  # noqa: E731
        weighted: list[tuple[int, Callable[[Client], Any]]] = [
            (24, put),
            (3, remove),
            (8, lambda client: client.get(wanted, part=part, request=request)),
            (8, lambda client: read_one(client, wanted, part, length)),
            (8, lambda client: look(client, wanted, part)),
            (6, lambda client: read_many(client, keys, part, LARGEST, request)),
            (4, lambda client: read_many(client, some, part, length, None)),
            (12, lambda client: self.match(client, keys)),
            (3, lambda client: client.exists(some)),
            (2, lambda client: client.prefetch(some)),
        ]
        return draw.choices([step for _, step in weighted], [weight for weight, _ in weighted])[0]

    def put_missing(self, client: Client, keys: list[bytes], datas: list[bytes], wait: bool) -> Any:
        found = client.match(keys)
        hits = len(found)
        parent = keys[hits - 1] if hits else None
        return hits, client.put_many(keys[hits:], datas[hits:], parent=parent, request=found.request, wait=wait)

    def match(self, client: Client, keys: list[bytes]) -> tuple[Any, ...]:
        found = client.match(keys)
        if found.request not in self.requests:
            self.requests.append(found.request)
        return len(found), found.tiers, found.request


def comparable(stats: DaemonStats) -> dict[str, Any]:
    """What must be equal at the end."""
    lookups, puts, dram = stats.lookups, stats.puts, stats.dram
    return {
        "lookups": (lookups.match_keys, lookups.match_hits, lookups.get_keys, lookups.get_hits, lookups.bytes_out),
        "puts": (puts.stored, puts.exists, puts.throttled, puts.rejected, puts.bytes_in, puts.reasons),
        "evicted": (stats.eviction.evicted_blocks, stats.eviction.evicted_bytes, stats.eviction.removed_blocks),
        "resident": (dram.resident_bytes, dram.record_bytes, dram.blocks, dram.records, dram.limbo_bytes),
    }


SIZES = {"one slot size": [57_100, 60_000, 61_184], "small": [10, 3840], "several": [61_184, 4, 30_000, 12_000, 8_000]}


@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize("engine", [True, False], ids=["engine", "single"])
def test_twin_daemons_driven_mapped_and_over_the_socket_stay_equal(sizes: str, engine: bool, stack: ExitStack):
    capacity, slab = {"small": ("128KiB", "16KiB"), "several": ("512KiB", "120KiB")}.get(sizes, ("1MiB", "120KiB"))
    # Grants for all sizes at once: slots lent ahead must not be what evicts.
    twins = [stack.enter_context(DaemonProcess("--slab", slab, capacity=capacity, grant="16MiB")) for _ in range(2)]
    steps = Steps(len(sizes), SIZES[sizes], engine=engine)
    namespace = Namespace(name="twins", parts=steps.parts)
    clients = [
        stack.enter_context(Client(twin.endpoint, namespace=namespace, mapped=flag, timeout=20.0))
        for twin, flag in zip(twins, (True, False), strict=True)
    ]
    for number in range(300):
        step = steps.next()
        told, expected = (answer(step, client) for client in clients)
        assert told == expected, f"step {number}"
        told, expected = (client.flush() for client in clients)
        assert told == expected, f"flush after step {number}"
    for chain in range(CHAINS):
        for part in range(steps.parts):
            told, expected = (read_many(client, chain_of(chain), part, LARGEST, None) for client in clients)
            assert told == expected, f"chain {chain}"
    stats = [client.stats() for client in clients]
    assert comparable(stats[0]) == comparable(stats[1])
    assert stats[0].eviction.evicted_blocks > 10
    assert stats[0].lookups.mapped_reads > 90
    assert stats[1].lookups.mapped_reads == stats[0].lookups.dropped_reports == 0
    assert [client.verify().problems for client in clients] == [[], []]


def replayed(requests: list[TraceRequest], capacity_blocks: int, block_bytes: int, mapped: bool) -> ReplayReport:
    with (
        private_daemon_for(block_bytes, capacity_blocks) as daemon,
        Client(
            daemon.endpoint,
            namespace=replay_namespace("replay", block_bytes),
            mapped=mapped,
            timeout=30.0,
            payload_bytes=(block_bytes,),
        ) as client,
    ):
        report = replay_trace(client, requests, trace="synthetic", block_bytes=block_bytes)
        assert client.verify().problems == []
        assert bool(client.stats().lookups.mapped_reads) is mapped
        return report


@pytest.mark.parametrize(("capacity_blocks", "block_bytes"), [(30, 4096), (101, 1000), (64, 70_000)])
def test_replay_through_mapped_memory_hits_as_over_the_socket_and_as_the_model(capacity_blocks: int, block_bytes: int):
    requests = synthetic_requests(250, seed=capacity_blocks)
    expected = sum(lru_hits(requests, capacity_blocks))
    mapped, sent = (replayed(requests, capacity_blocks, block_bytes, flag) for flag in (True, False))
    assert mapped.blocks_hit == sent.blocks_hit == expected
    assert (mapped.wrong_bytes, mapped.corrupt_records, mapped.blocks_lost) == (0, 0, 0)
    assert (mapped.puts, mapped.bytes_read, mapped.bytes_written) == (sent.puts, sent.bytes_read, sent.bytes_written)
    assert mapped.daemon == sent.daemon
    assert mapped.daemon.evicted_blocks > 0
