"""The asyncio client beyond what both clients share: cancellation at every await, concurrency, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from daemon_process import DaemonProcess

from kvstore.protocol.version import MAX_OUTSTANDING_REQUESTS
from kvstore_client import AsyncClient, ConnectionLost, DaemonUnavailable, DeadlineExceeded, KVStoreError, PutStatus

PRESENT = (PutStatus.STORED, PutStatus.EXISTS)
STEPS = [*range(24), *range(24, 120, 8)]
DELAYS_S = [0.0001, 0.0003, 0.001, 0.003]

Operation = Callable[[AsyncClient], Coroutine[Any, Any, object]]


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


@pytest.fixture
async def client(daemon: DaemonProcess, namespace: str, request: pytest.FixtureRequest) -> AsyncIterator[AsyncClient]:
    """A client; its parameter is its ``mapped``."""
    async with AsyncClient(daemon.endpoint, namespace=namespace, mapped=getattr(request, "param", None)) as client:
        await client.put(key(1), b"a" * 100_000)
        await client.put(key(2), b"b" * 100, parent=key(1))
        yield client
        await client.clear()


async def is_whole(client: AsyncClient) -> None:
    """Everything that was under way is forgotten, and every kind of operation is right."""
    async with asyncio.timeout(5):
        assert await client.get(key(1)) == b"a" * 100_000
        assert await client.put(key(2), b"else", parent=key(1)) is PutStatus.EXISTS
        assert len(await client.match([key(1), key(2)])) == 2
        await client.flush()
        while client._replies or client._slots._value != MAX_OUTSTANDING_REQUESTS:
            await asyncio.sleep(0.001)
    assert not client._puts
    assert client._unwaited_bytes == 0


async def nothing_is_lent(client: AsyncClient) -> None:
    """Slots lent ahead come back when the client idles; none was lost."""
    async with asyncio.timeout(5):
        while (await client.stats()).dram.granted_bytes:
            await asyncio.sleep(0.1)


# ------------------------------------------------------------------ cancellation


async def view(client: AsyncClient) -> None:
    async with client.view(key(1)) as payload:
        assert payload == b"a" * 100_000
        await asyncio.sleep(0)


async def leased(client: AsyncClient) -> None:
    async with await client.match([key(1), key(2)], lease=30):
        await asyncio.sleep(0)


OPERATIONS: dict[str, Operation] = {
    "get": lambda client: client.get(key(1)),
    "get_many_into": lambda client: client.get_many_into([key(1), key(2)], [bytearray(100_000), bytearray(100)]),
    "put": lambda client: client.put(key(3), b"c" * 200_000),
    "put_many": lambda client: client.put_many([key(4), key(5)], [b"d" * 70_000, b"e"]),
    "put without wait": lambda client: client.put(key(6), b"f" * 70_000, wait=False),
    "flush": lambda client: client.flush(),
    "match": lambda client: client.match([key(1), key(2)]),
    "exists": lambda client: client.exists([key(1)] * 70_000),
    "remove": lambda client: client.remove([key(9)]),
    "invalidate nothing": lambda client: client.stats(),
    "verify": lambda client: client.verify(),
    "view": view,
    "lease": leased,
}


AT_ONCE = ("get", "get_many_into", "match")
"""Operations that a mapped client ends without an await."""


async def cancelled(operation: Awaitable[object], pause: Callable[[], Awaitable[None]]) -> bool:
    """Start an operation, cancel it after a pause; whether it was still under way."""
    task = asyncio.ensure_future(operation)
    await pause()
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


def pauses() -> list[Callable[[], Awaitable[None]]]:
    """Pauses of so many turns of the loop, and of so many seconds."""

    async def turns(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    return [lambda count=count: turns(count) for count in STEPS] + [
        lambda seconds=seconds: asyncio.sleep(seconds) for seconds in DELAYS_S
    ]


@pytest.mark.parametrize("client", [None, False], indirect=True, ids=["mapped", "socket"])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_operation_cancelled_at_each_await_leaves_the_client_whole(client: AsyncClient, name: str):
    hits = 0
    for pause in pauses():
        hits += await cancelled(OPERATIONS[name](client), pause)
        await is_whole(client)
    assert hits > 0 or (client.mapped and name in AT_ONCE)
    if not client.mapped:
        stats = await client.stats()
        assert stats.dram.granted_bytes == 0
    elif name.startswith("put"):
        await nothing_is_lent(client)


@pytest.mark.parametrize("name", ["get", "put", "put without wait", "flush"])
async def test_first_operation_cancelled_while_it_connects_leaves_the_client_usable(
    client: AsyncClient, daemon: DaemonProcess, namespace: str, name: str
):
    hits = 0
    for pause in pauses():
        fresh = AsyncClient(daemon.endpoint, namespace=namespace)
        hits += await cancelled(OPERATIONS[name](fresh), pause)
        await is_whole(fresh)
        await fresh.close()
    assert hits > 10


async def test_connect_cancelled_and_closed_leaves_nothing(daemon: DaemonProcess):
    for pause in pauses():
        fresh = AsyncClient(daemon.endpoint)
        await cancelled(fresh.connect(), pause)
        await fresh.close()


async def test_close_cancelled_can_be_repeated(daemon: DaemonProcess, namespace: str):
    for pause in pauses():
        fresh = AsyncClient(daemon.endpoint, namespace=namespace)
        await fresh.put(key(1), b"x" * 100_000, wait=False)
        await cancelled(fresh.close(), pause)
        await fresh.close()


async def test_many_operations_cancelled_at_random_leave_the_client_whole(client: AsyncClient):
    operations = list(OPERATIONS.values())
    for round_ in range(10):
        tasks = [
            asyncio.ensure_future(operations[(number + round_) % len(operations)](client)) for number in range(200)
        ]
        for number, task in enumerate(tasks):
            if number % 7 == round_ % 7:
                await asyncio.sleep(0)
            if number % 3:
                task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            isinstance(outcome, asyncio.CancelledError) or not isinstance(outcome, BaseException)
            for outcome in outcomes
        ), [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        await is_whole(client)


# ------------------------------------------------------------------ concurrency


async def test_operations_begun_while_the_client_greets_are_served_like_any(
    client: AsyncClient, daemon: DaemonProcess, namespace: str
):
    """Between the daemon's welcome and the namespace's id no operation may slip through."""
    for _ in range(10):
        async with asyncio.timeout(10):
            fresh = AsyncClient(daemon.endpoint, namespace=namespace)
            tasks = []
            for number in range(150):
                tasks.append(asyncio.ensure_future(fresh.get(key(1))))
                tasks.append(asyncio.ensure_future(fresh.put(key(100 + number), b"x", parent=key(99))))
                await asyncio.sleep(0)
            outcomes = await asyncio.gather(*tasks)
            await fresh.close()
        assert set(outcomes[::2]) == {b"a" * 100_000}
        assert set(outcomes[1::2]) <= set(PRESENT)


async def test_thousands_of_concurrent_operations_are_all_right(client: AsyncClient):
    async def one(number: int) -> None:
        payload = number.to_bytes(4, "big") * (1 + number % 5000)
        assert await client.put(key(number), payload, wait=number % 5 != 0) in (*PRESENT, PutStatus.PENDING)
        assert await client.get(key(number)) == payload
        assert await client.exists([key(number), key(1 << 31)]) == [True, False]

    await asyncio.gather(*(one(number) for number in range(1000, 3500)))
    assert (await client.flush()).lost == 0
    await is_whole(client)


async def test_twice_the_outstanding_limit_of_large_gets_are_served(client: AsyncClient):
    outcomes = await asyncio.gather(*(client.get(key(1)) for _ in range(2 * MAX_OUTSTANDING_REQUESTS)))
    assert set(outcomes) == {b"a" * 100_000}


@pytest.mark.parametrize(
    ("client", "message"),
    [(False, "bytes of puts of this client were unanswered"), (True, "did not answer in time")],
    indirect=["client"],
    ids=["socket", "mapped"],
)
async def test_puts_without_wait_hold_back_when_too_many_bytes_are_unanswered(
    client: AsyncClient, daemon: DaemonProcess, message: str
):
    client.timeout = 1.0
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineExceeded, match=message):
            await asyncio.gather(*(client.put(key(number), bytes(1_000_000), wait=False) for number in range(10, 90)))
        assert client._unwaited_bytes <= 64 << 20
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    client.timeout = 5.0
    done = await client.flush()
    # Mapped, what has no slot is not put at all.
    assert done.lost + done.stored + done.throttled > (0 if client.mapped else 50) - 1
    await is_whole(client)


async def test_loop_goes_on_while_the_daemon_does_not_answer(client: AsyncClient, daemon: DaemonProcess):
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        fresh = [AsyncClient(daemon.endpoint, timeout=0.6) for _ in range(5)]
        client.timeout = 0.6
        operations = [asyncio.ensure_future(each.ping()) for each in [*fresh, client]]
        gaps = []
        before = time.monotonic()
        while not all(operation.done() for operation in operations):
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - before)
            before = time.monotonic()
        for operation in operations:
            assert isinstance(operation.exception(), DeadlineExceeded)
        for each in fresh:
            await each.close()
        assert max(gaps) < 0.3
        assert len(gaps) < 150
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    client.timeout = 5.0
    await is_whole(client)


async def test_many_operations_on_a_daemon_that_never_answers_end_together(daemon: DaemonProcess):
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        fresh = AsyncClient(daemon.endpoint, timeout=0.5)
        begin = time.monotonic()
        outcomes = await asyncio.gather(*(fresh.ping() for _ in range(100)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {DeadlineExceeded}
        assert time.monotonic() - begin < 2.0
        await fresh.close()
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


# ------------------------------------------------------------------ the end of a client or a daemon


async def test_close_ends_operations_under_way_and_those_that_wait_their_turn(daemon: DaemonProcess):
    for count in (1, 100, 2 * MAX_OUTSTANDING_REQUESTS):
        fresh = AsyncClient(daemon.endpoint)
        await fresh.connect()
        tasks = [asyncio.ensure_future(fresh.get(key(1))) for _ in range(count)]
        await asyncio.sleep(0)
        await fresh.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, ConnectionLost) or outcome is None for outcome in outcomes)
        with pytest.raises(ConnectionLost, match="this client is closed; make a new one"):
            await fresh.ping()


async def test_close_while_others_connect_leaves_nothing(daemon: DaemonProcess):
    for turns in range(30):
        fresh = AsyncClient(daemon.endpoint)
        tasks = [asyncio.ensure_future(fresh.ping()) for _ in range(20)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await fresh.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, (ConnectionLost, float)) for outcome in outcomes), outcomes


@pytest.mark.parametrize("replies", [1, 2])
async def test_close_between_a_reply_to_the_greeting_and_its_taking_leaves_nothing(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, replies: int
):
    """The task that greets has its reply and did not run yet: it goes on with a client that is closed."""
    fresh = AsyncClient(daemon.endpoint)
    taken = 0
    receive = fresh._on_readable

    def receive_and_close() -> None:
        nonlocal taken
        waiting = len(fresh._replies)
        receive()
        taken += waiting - len(fresh._replies)
        if taken == replies and not fresh._closed:
            with pytest.raises(StopIteration):
                # It has nothing to wait for, so one step is all of it.
                fresh.close().send(None)

    monkeypatch.setattr(fresh, "_on_readable", receive_and_close)
    with pytest.raises(ConnectionLost):
        await fresh.ping()
    assert taken == replies
    assert not fresh.mapped
    assert not fresh._greeted
    with pytest.raises(ConnectionLost, match="this client is closed; make a new one"):
        await fresh.ping()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_daemon_that_ends_under_many_operations_is_an_error_of_this_package_for_each(number: signal.Signals):
    with DaemonProcess() as daemon:
        client = AsyncClient(daemon.endpoint)
        await client.put(key(1), b"x" * 50_000)

        async def forever(wait: bool) -> Exception:
            try:
                while True:
                    await client.get(key(1))
                    await client.put(key(2), b"y" * 100, wait=wait)
            except Exception as error:
                return error

        tasks = [asyncio.ensure_future(forever(number % 2 == 0)) for number in range(100)]
        await asyncio.sleep(0.2)
        begin = time.monotonic()
        assert daemon.process is not None
        daemon.process.send_signal(number)
        errors = await asyncio.gather(*tasks)
        assert time.monotonic() - begin < 3.0
        daemon.process.wait()
        assert all(isinstance(error, (ConnectionLost, DaemonUnavailable)) for error in errors), set(map(repr, errors))
        with pytest.raises(DaemonUnavailable):
            await client.put(key(3), b"z", wait=False)
        daemon.start()
        assert await client.get(key(1)) is None
        assert await client.put(key(1), b"again") is PutStatus.STORED
        await client.close()


async def test_put_without_wait_right_after_the_daemon_died_raises_no_private_error():
    """The loop may not have seen yet that the connection is gone."""
    with DaemonProcess() as daemon:
        for _ in range(3):
            client = AsyncClient(daemon.endpoint)
            await client.connect()
            daemon.kill()
            time.sleep(0.05)  # noqa: ASYNC251 - the loop must not run meanwhile
            with pytest.raises(KVStoreError):  # noqa: PT012 - which of them sees it is libzmq's business
                for number in range(1, 50):
                    await client.put(key(number), b"x" * 1000, wait=False)
            await client.close()
            daemon.start()
