"""Worker threads of the SSD tier: what is told of each call, and an end that does not wait for a dead device."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from kvstore.server.ssd_transfers import Transfers


async def test_a_call_that_never_ends_does_not_keep_the_daemon(no_leaked_tasks: None) -> None:
    transfers = Transfers(2, asyncio.get_running_loop())
    release = threading.Event()
    told: list[BaseException | None] = []
    try:
        transfers.read(lambda: release.wait(30) and None, told.append)
        transfers.read(lambda: release.wait(30) and None, told.append)
        transfers.write(lambda: None, told.append)
        begin = time.monotonic()
        assert transfers.stop(0.2) is False
        assert time.monotonic() - begin < 2.0
        transfers.deliver()
        # What was not begun is told to be over.
        assert [str(error) for error in told] == ["the SSD tier is stopping"]
    finally:
        release.set()
    assert transfers.stop(5.0) is True


async def test_a_callback_that_raises_takes_none_of_the_others(no_leaked_tasks: None) -> None:
    problems: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: problems.append(context["exception"]))
    transfers = Transfers(2, loop)
    ended: list[int] = []

    def broken(error: BaseException | None) -> None:
        raise ZeroDivisionError("a defect")

    for number in range(6):
        transfers.read(lambda: None, broken if number % 2 else lambda error, number=number: ended.append(number))  # type: ignore[misc]
    async with asyncio.timeout(5):
        while transfers.in_flight:
            await asyncio.sleep(0.001)
    assert sorted(ended) == [0, 2, 4]
    assert len(problems) == 3
    with pytest.raises(OSError, match="a fault"):
        await transfers.call(lambda: (_ for _ in ()).throw(OSError("a fault")))
    assert transfers.stop()


async def test_what_is_computed_with_a_read_follows_it_and_keeps_no_transfer_waiting(no_leaked_tasks: None) -> None:
    transfers = Transfers(1, asyncio.get_running_loop())
    steps: list[str] = []
    release = threading.Event()
    told: list[BaseException | None] = []

    def slow() -> None:
        release.wait(30)
        steps.append("computed")

    def broken() -> None:
        raise ZeroDivisionError("a defect")

    transfers.read(lambda: steps.append("first"), told.append, slow)
    transfers.read(lambda: steps.append("second"), told.append, broken)
    transfers.read(broken, told.append, lambda: steps.append("never"))
    async with asyncio.timeout(5):
        while len(told) < 2:
            await asyncio.sleep(0.001)
    assert steps == ["first", "second"]
    assert all(isinstance(error, ZeroDivisionError) for error in told)
    release.set()
    assert transfers.stop()
    transfers.deliver()
    assert steps == ["first", "second", "computed"]
    assert told[2:] == [None]


async def test_reads_that_somebody_waits_for_overtake_those_ahead_and_writes(no_leaked_tasks: None) -> None:
    transfers = Transfers(1, asyncio.get_running_loop())
    began, release = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        began.set()
        release.wait(30)

    transfers.write(first, lambda error: None)
    assert began.wait(5)
    transfers.write(lambda: order.append("write"), lambda error: None)
    for number in range(2):
        transfers.read(lambda number=number: order.append(f"ahead {number}"), lambda error: None, ahead=True)  # type: ignore[misc]
    transfers.read(lambda: order.append("waited for"), lambda error: None)
    release.set()
    async with asyncio.timeout(5):
        while transfers.in_flight:
            await asyncio.sleep(0.001)
    assert order == ["waited for", "ahead 0", "ahead 1", "write"]
    assert transfers.stop()
