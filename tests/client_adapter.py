"""``AsyncClient`` with the face of ``Client``, so that one suite can run against both, mapped and over the socket."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

from kvstore_client import AsyncClient, AsyncMatch, Client

R = TypeVar("R")
CALL_S = 60.0


class MatchAdapter:
    """An ``AsyncMatch`` whose ``release`` blocks."""

    def __init__(self, found: AsyncMatch, call: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._found = found
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)

    def __len__(self) -> int:
        return len(self._found)

    def release(self) -> None:
        self._call(self._found.release())

    def __enter__(self) -> Self:
        self._call(self._found.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._call(self._found.__aexit__(*error))


class AsyncAdapter:
    """An ``AsyncClient`` on a loop of its own in a thread; every operation blocks until it is done."""

    def __init__(
        self,
        endpoint: str,
        *,
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        **options: Any,
    ) -> None:
        self._loop = factory()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client-loop", daemon=True)
        self._thread.start()
        try:
            self.client = self.run(self._make(endpoint, options))
        except BaseException:
            self._stop()
            raise

    async def _make(self, endpoint: str, options: dict[str, Any]) -> AsyncClient:
        client = AsyncClient(endpoint, **options)
        await client.connect()
        return client

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine on the client's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_S)

    def _stop(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        if not self._loop.is_closed():
            self.run(self.client.close())
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not callable(found) or name == "chain_keys":
            return found
        return lambda *arguments, **options: self.run(found(*arguments, **options))

    def match(self, *arguments: Any, **options: Any) -> MatchAdapter:
        return MatchAdapter(self.run(self.client.match(*arguments, **options)), self.run)

    @contextlib.contextmanager
    def view(self, *arguments: Any, **options: Any) -> Iterator[memoryview | None]:
        context = self.client.view(*arguments, **options)
        value = self.run(context.__aenter__())
        try:
            yield value
        finally:
            self.run(context.__aexit__(None, None, None))


AnyClient = Client | AsyncAdapter
Connect = Callable[..., AnyClient]
"""Makes clients of one kind for a test."""

CLIENTS: dict[str, Callable[..., AnyClient]] = {
    "sync": Client,
    "asyncio": AsyncAdapter,
    "uvloop": partial(AsyncAdapter, factory=uvloop.new_event_loop),
    "sync-socket": partial(Client, mapped=False),
    "uvloop-socket": partial(AsyncAdapter, factory=uvloop.new_event_loop, mapped=False),
}
"""Every kind of client: those that map where they can, and those that send and receive every block."""

MAPPING = [name for name in CLIENTS if not name.endswith("-socket")]
