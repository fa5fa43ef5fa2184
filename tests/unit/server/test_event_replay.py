"""Peers that ask for replays: those that read get everything, those that do not hold nobody up and are given up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvstore.observability.logs import RepeatedLog
from kvstore.protocol.kv_events import END_OF_REPLAY, encode_number, replay_request, snapshot_request
from kvstore.server import event_replay
from kvstore.server.event_replay import MAX_PEERS, MAX_REQUESTS_PER_PEER, ReplaySocket

PAYLOAD = bytes(20_000)


class Said:
    """A log that remembers the names of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **facts: self.events.append(event)


class Served:
    """A replay socket on this loop, that answers with as many messages as the number that is asked for."""

    def __init__(self, path: Path) -> None:
        self.endpoint = f"ipc://{path}/r"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        ReplaySocket.prepare(self.router)
        self.router.bind(self.endpoint)
        self.said = Said()
        self.replay = ReplaySocket(self.router, self.answer, RepeatedLog(self.said))  # type: ignore[arg-type]
        self.replay.start(asyncio.get_running_loop())
        self.peers: list[zmq.Socket[bytes]] = []

    def answer(self, snapshot: bool, number: int) -> Iterator[list[bytes]]:
        if snapshot:
            raise RuntimeError("a defect")
        for each in range(number):
            yield [b"", b"", encode_number(each), PAYLOAD]
        yield [b"", b"", END_OF_REPLAY, b""]

    def peer(self) -> zmq.Socket[bytes]:
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVHWM, 1)
        dealer.connect(self.endpoint)
        self.peers.append(dealer)
        return dealer

    def close(self) -> None:
        self.replay.stop()
        for socket in (*self.peers, self.router):
            socket.close(0)
        self.context.term()


@pytest.fixture
async def served(tmp_path: Path) -> Any:
    made = Served(tmp_path)
    yield made
    made.close()


async def received(peer: zmq.Socket[bytes], timeout_s: float = 20.0) -> list[int]:
    """Numbers of all replies to one request, or of those that come within the time."""
    numbers: list[int] = []
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    while loop.time() < end_s:
        if not peer.poll(0):
            await asyncio.sleep(0.001)
            continue
        _, _, number, _ = peer.recv_multipart()
        if number == END_OF_REPLAY:
            return [*numbers, -1]
        numbers.append(int.from_bytes(number, "big"))
    return numbers


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    end_s = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end_s
        await asyncio.sleep(0.005)


async def test_replies_come_in_order_and_requests_one_after_the_other(served: Served) -> None:
    peer = served.peer()
    for count in (700, 0, 5):
        peer.send_multipart(replay_request(count))
    for count in (700, 0, 5):
        assert await received(peer) == [*range(count), -1]


async def test_peer_that_does_not_read_is_given_up_and_others_are_served(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_replay, "PATIENCE_S", 0.5)
    stuck, vanished = served.peer(), served.peer()
    stuck.send_multipart(replay_request(5000))
    vanished.send_multipart(replay_request(5000))
    await asyncio.sleep(0.1)
    vanished.close(0)
    for _ in range(3):
        peer = served.peer()
        peer.send_multipart(replay_request(300))
        assert await received(peer) == [*range(300), -1]
    await until(lambda: not served.replay._peers)
    assert "slow_event_consumer" in served.said.events
    assert served.replay.dropped >= 1
    numbers = await received(stuck, 2.0)
    assert numbers == list(range(len(numbers))), "it lost some in between"
    assert len(numbers) < 5000
    # It is as welcome as before.
    stuck.send_multipart(replay_request(3))
    assert await received(stuck) == [0, 1, 2, -1]


async def test_too_many_requests_of_a_peer_and_too_many_peers_are_dropped(served: Served) -> None:
    peer = served.peer()
    for _ in range(MAX_REQUESTS_PER_PEER + 3):
        peer.send_multipart(replay_request(5000))
    others = [served.peer() for _ in range(MAX_PEERS + 3)]
    for other in others:
        other.send_multipart(replay_request(5000))
    await until(lambda: served.replay.dropped >= 7, 10.0)
    assert len(served.replay._peers) <= MAX_PEERS
    assert "event_request_dropped" in served.said.events


async def test_defect_of_an_answer_is_loud_and_the_socket_goes_on(served: Served) -> None:
    peer = served.peer()
    peer.send_multipart(snapshot_request(0))
    await until(lambda: "event_replay_failed" in served.said.events)
    peer.send_multipart(replay_request(2))
    assert await received(peer) == [0, 1, -1]


async def test_loop_is_free_between_replies(served: Served) -> None:
    """Each turn of the loop sends a bounded part of a long replay."""
    peer = served.peer()
    peer.setsockopt(zmq.RCVHWM, 10_000)
    turns = 0
    done = False

    async def count() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    peer.send_multipart(replay_request(2000))
    assert await received(peer) == [*range(2000), -1]
    done = True
    await counting
    assert turns >= 2000 // 32
