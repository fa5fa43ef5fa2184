"""A live daemon hits, request by request, what the simulator says that its policy hits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop
from synthetic_trace import synthetic_requests

from kvstore.cli.replay import private_daemon_for
from kvstore.policy.registry import POLICIES
from kvstore.protocol.messages import PutStatus
from kvstore.server.app import Daemon
from kvstore.settings import Settings
from kvstore.simulator.arrivals import Arrival, full_block_arrivals
from kvstore.simulator.prefix import simulate
from kvstore.simulator.trace import block_key
from kvstore_client import Client

CAPACITY_BLOCKS = 100
PAYLOAD_BYTES = 4096 - 256
ARRIVALS = full_block_arrivals(synthetic_requests(500, seed=7))
TIMELESS = [name for name in POLICIES if name != "adaptive"]
"""Policies that do not look at the clock."""


class TraceClock:
    """The time of the trace, which only the test moves."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def request(client: Client, ids: tuple[int, ...]) -> int:
    """What an engine does: match, read what is there, put what is not; the blocks that were there."""
    keys = [block_key(one) for one in ids]
    match = client.match(keys)
    hits = len(match)
    outs = [bytearray(PAYLOAD_BYTES) for _ in range(hits)]
    assert client.get_many_into(keys[:hits], outs, request=match.request) == [PAYLOAD_BYTES] * hits
    assert outs == [key * (PAYLOAD_BYTES // 32) for key in keys[:hits]]
    if hits < len(keys):
        parent = keys[hits - 1] if hits else None
        datas = [key * (PAYLOAD_BYTES // 32) for key in keys[hits:]]
        statuses = client.put_many(keys[hits:], datas, parent=parent, request=match.request)
        assert set(statuses) <= {PutStatus.STORED, PutStatus.REJECTED}
    client.flush()
    return hits


def renewed(client: Client, policy: str) -> None:
    """An empty daemon with a policy that remembers nothing."""
    client.clear()
    other = next(name for name in POLICIES if name != policy)
    client.configure(policy=other)
    assert client.configure(policy=policy).policy == policy


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "socket"])
def test_live_hits_are_those_of_the_simulator(mapped: bool):
    with (
        private_daemon_for(PAYLOAD_BYTES, CAPACITY_BLOCKS) as daemon,
        Client(daemon.endpoint, timeout=30.0, mapped=mapped, payload_bytes=(PAYLOAD_BYTES,)) as client,
    ):
        for policy in TIMELESS:
            renewed(client, policy)
            hits = [request(client, ids) if ids else 0 for _, ids in ARRIVALS]
            assert hits == list(simulate(ARRIVALS, policy, CAPACITY_BLOCKS).hits), policy
            assert client.verify().problems == []


@contextmanager
def daemon_in_trace_time(directory: Path, clock: TraceClock) -> Iterator[str]:
    """A daemon in this process, on a thread; its endpoint."""
    settings = Settings.model_validate(
        {
            "endpoint": f"ipc://{directory}/kv.sock",
            "http": "off",
            "dram": {
                "directory": directory / "arena",
                "capacity_bytes": CAPACITY_BLOCKS * 4096,
                "grant_bytes": 1 << 20,
                "slab_bytes": 4096 * 20,
            },
        }
    )
    started, loops, failures = threading.Event(), [], []

    async def serve() -> None:
        stopping = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stopping))
        daemon = Daemon(settings, clock)
        try:
            await daemon.start()
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            started.set()
        await stopping.wait()
        await daemon.stop()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(30)
        assert not failures, failures
        yield settings.endpoint
    finally:
        loop, stopping = loops[0]
        loop.call_soon_threadsafe(stopping.set)
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("policy", POLICIES)
def test_live_hits_in_the_time_of_the_trace_are_those_of_the_simulator(policy: str, tmp_path: Path):
    clock = TraceClock()
    with (
        daemon_in_trace_time(tmp_path, clock) as endpoint,
        Client(endpoint, timeout=30.0, payload_bytes=(PAYLOAD_BYTES,)) as client,
    ):
        renewed(client, policy)
        hits = []
        for arrival in ARRIVALS:
            assert isinstance(arrival, Arrival)
            clock.now_ns = arrival.time_ns
            hits.append(request(client, arrival.ids) if arrival.ids else 0)
        assert hits == list(simulate(ARRIVALS, policy, CAPACITY_BLOCKS).hits)
        assert sum(hits)
