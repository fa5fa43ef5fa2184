"""The ROUTER on its own descriptor: nothing stalls, whoever replies and whenever."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
import zmq

from kvstore.server.transport import DRAIN_MESSAGES, WAITING_MESSAGES, RouterTransport

CLIENTS = 4
DEPTH = 4
SECONDS = 3.0
Reply = Callable[[RouterTransport, bytes, bytes], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = request.param()
    yield loop
    loop.close()


def transport_on(path: Path, on_message: Callable[[bytes, bytes, list[zmq.Frame]], None]) -> RouterTransport:
    return RouterTransport(f"ipc://{path}", max_frame_bytes=1 << 20, mode=0o600, gid=-1, on_message=on_message)


def drive(path: Path, seconds: float) -> tuple[int, float]:
    """Windowed requests from several clients; replies received and the longest silence of any client, in seconds."""
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(CLIENTS)]
    poller = zmq.Poller()
    heard = {}
    for socket in sockets:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{path}")
        poller.register(socket, zmq.POLLIN)
        heard[socket] = time.monotonic()
        for _ in range(DEPTH):
            socket.send(b"ask")
    replies, silence = 0, 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for socket, _ in poller.poll(100):
            socket.recv()
            now = time.monotonic()
            silence = max(silence, now - heard[socket])
            heard[socket] = now
            replies += 1
            socket.send(b"ask")
    silence = max(silence, *(time.monotonic() - then for then in heard.values()))
    for socket in sockets:
        socket.close()
    context.term()
    return replies, silence


def test_replies_sent_outside_the_drain_never_stall(loop: asyncio.AbstractEventLoop, tmp_path: Path):
    path = tmp_path / "s"
    waiting: set[asyncio.Task[None]] = set()

    def on_message(identity: bytes, header: bytes, payloads: list[zmq.Frame]) -> None:
        async def answer() -> None:
            await asyncio.sleep(0.0005)
            transport.send(identity, header)

        task = loop.create_task(answer())
        waiting.add(task)
        task.add_done_callback(waiting.discard)

    transport = transport_on(path, on_message)

    async def run() -> tuple[int, float]:
        transport.start(asyncio.get_running_loop())
        result = await asyncio.to_thread(drive, path, SECONDS)
        while waiting:
            await asyncio.sleep(0.01)
        return result

    replies, silence = loop.run_until_complete(run())
    transport.close()
    assert replies > 100 * CLIENTS
    assert silence < 1.0


def test_drain_lets_other_callbacks_run_under_a_flood(loop: asyncio.AbstractEventLoop, tmp_path: Path):
    path = tmp_path / "s"
    served = 0
    longest = 0

    def on_message(identity: bytes, header: bytes, payloads: list[zmq.Frame]) -> None:
        nonlocal served
        served += 1

    transport = transport_on(path, on_message)

    async def run() -> None:
        nonlocal longest
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(f"ipc://{path}")
        for _ in range(5000):
            socket.send(b"x")
        transport.start(asyncio.get_running_loop())
        deadline = time.monotonic() + 10
        while served < 5000 and time.monotonic() < deadline:
            before = served
            await asyncio.sleep(0)
            longest = max(longest, served - before)
        socket.close(0)
        context.term()

    loop.run_until_complete(run())
    transport.close()
    assert served == 5000
    # A turn of the loop may run the reader's and the scheduled drain.
    assert longest <= 2 * DRAIN_MESSAGES


def test_requests_that_are_not_drained_wait_with_their_client(loop: asyncio.AbstractEventLoop, tmp_path: Path):
    """However long the loop is held up, a client has few records in the daemon's memory."""
    path = tmp_path / "s"
    heard: list[int] = []
    transport = transport_on(path, lambda identity, header, payloads: heard.append(int.from_bytes(header, "big")))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 1)
    socket.setsockopt(zmq.SNDTIMEO, 500)
    socket.connect(f"ipc://{path}")
    payload = bytes(900_000)
    sent = 0
    with contextlib.suppress(zmq.Again):
        while sent < 10 * WAITING_MESSAGES:
            socket.send_multipart([sent.to_bytes(4, "big"), payload])
            sent += 1
    # What the kernel's buffers and the two pipes' own hold is not much beside it.
    assert sent <= WAITING_MESSAGES + 8
    transport.start(loop)

    async def until_heard() -> None:
        while len(heard) < sent + 500:
            await asyncio.sleep(0.001)

    def send_more() -> None:
        for number in range(sent, sent + 500):
            socket.send_multipart([number.to_bytes(4, "big"), payload])

    thread = threading.Thread(target=send_more)
    thread.start()
    loop.run_until_complete(asyncio.wait_for(until_heard(), 20.0))
    thread.join()
    assert heard == list(range(sent + 500))
    transport.close()
    socket.close()
    context.term()


def test_handler_that_raises_does_not_stop_the_drain(loop: asyncio.AbstractEventLoop, tmp_path: Path):
    path = tmp_path / "s"
    seen: list[bytes] = []

    def on_message(identity: bytes, header: bytes, payloads: list[zmq.Frame]) -> None:
        seen.append(header)
        if header == b"1":
            raise RuntimeError("a defect")

    transport = transport_on(path, on_message)
    loop.set_exception_handler(lambda _, context: None)

    async def run() -> None:
        transport.start(asyncio.get_running_loop())
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(f"ipc://{path}")
        for number in range(4):
            socket.send(str(number).encode())
        deadline = time.monotonic() + 5
        while len(seen) < 4 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        socket.close(0)
        context.term()

    loop.run_until_complete(run())
    transport.close()
    assert seen == [b"0", b"1", b"2", b"3"]


def test_payload_frames_come_apart_and_the_socket_file_goes_at_close(loop: asyncio.AbstractEventLoop, tmp_path: Path):
    path = tmp_path / "s"
    seen: list[tuple[bytes, list[bytes]]] = []
    transport = transport_on(
        path, lambda identity, header, payloads: seen.append((header, [frame.bytes for frame in payloads]))
    )

    async def run() -> None:
        transport.start(asyncio.get_running_loop())
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(f"ipc://{path}")
        socket.send_multipart([b"header", b"one", b"two"])
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        socket.close(0)
        context.term()

    loop.run_until_complete(run())
    assert path.stat().st_mode & 0o777 == 0o600
    transport.close()
    assert seen == [(b"header", [b"one", b"two"])]
    assert not path.exists()
