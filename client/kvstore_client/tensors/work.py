"""How saving and loading wait: as generators of requests and computations, driven by a blocking and an asyncio store.

What ``kvstore_client.operations`` does for requests is done here for whole calls, which also compute: a generator
yields the steps of an operation, or a function that computes without the interpreter lock, and is sent the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from kvstore_client.aio import AsyncClient
from kvstore_client.client import Client
from kvstore_client.session import Steps

__all__ = ["Work", "do", "do_async"]

R = TypeVar("R")

Work = Generator[Steps[Any] | Callable[[], Any], Any, R]


def do(work: Work[R], client: Client) -> R:
    """Drive work to its result, in the calling thread."""
    try:
        wanted = next(work)
        while True:
            try:
                result = wanted() if callable(wanted) else client._run(wanted)
            except BaseException as error:
                wanted = work.throw(error)
            else:
                wanted = work.send(result)
    except StopIteration as stop:
        done: R = stop.value
        return done
    finally:
        # Also where an interrupt struck in between: what the work holds goes back now.
        work.close()


async def do_async(work: Work[R], client: AsyncClient) -> R:
    """Drive work to its result; what computes does so in a thread of the loop's executor."""
    try:
        wanted = next(work)
        while True:
            try:
                result = await (_in_thread(wanted) if callable(wanted) else client._run(wanted))
            except BaseException as error:
                wanted = work.throw(error)
            else:
                wanted = work.send(result)
    except StopIteration as stop:
        done: R = stop.value
        return done
    finally:
        work.close()


async def _in_thread(compute: Callable[[], R]) -> R:
    """Compute in a thread. A cancelled caller waits for its end all the same: it writes to memory that is lent."""
    running = asyncio.get_running_loop().run_in_executor(None, compute)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()
        raise cancelled
    return running.result()
