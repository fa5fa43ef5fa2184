"""Backends as SGLang makes them, on a real daemon: fixtures and arguments of the tests of HiCache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from daemon_process import DaemonProcess
from engines.sglang_pools import PAGE, config, page_of
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_hash_str

Make = Callable[..., Any]


@pytest.fixture(scope="module", name="daemon")
def daemon_of_the_module() -> Iterator[DaemonProcess]:
    with DaemonProcess("--verify", "always", capacity="256MiB", expected_errors=("corrupt_record",)) as running:
        yield running


@pytest.fixture(name="stack")
def stack_of_the_test() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(name="make")
def make_backends(daemon: DaemonProcess, stack: ExitStack, request: pytest.FixtureRequest) -> Make:
    """Backends as SGLang makes them: by its factory, from an extra config, and told of their host pool."""

    def one(
        pool: Any, codec: str = "raw", endpoint: str | None = None, rank: dict[str, Any] | None = None, **own: Any
    ) -> Any:
        own = {"name": request.node.name[:100], "revision": "1", "interface_v1": 1} | own
        backend = StorageBackendFactory.create_backend(
            "dynamic",
            config(extra(endpoint or daemon.endpoint, codec=codec, **own), **(rank or {})),
            pool,
        )
        stack.callback(backend.close)
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    return one


def extra(endpoint: str, **own: Any) -> dict[str, Any]:
    return {
        "backend_name": "kvstore",
        "module_path": "kvstore_client.integrations.sglang",
        "class_name": "KVStoreHiCache",
        "endpoint": endpoint,
    } | own


def hashes(pages: int, seed: int = 0, page: int = PAGE) -> list[str]:
    """Of a prompt's pages, by SGLang's own function."""
    tokens = [seed * 100_000 + at for at in range(pages * page)]
    names = get_hash_str(tokens, None, page_size=page)
    assert isinstance(names, list)
    return names


def copies(pool: Any, pages: list[int]) -> list[torch.Tensor]:
    return [page_of(pool, page) for page in pages]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


def transfer(name: PoolName, keys: list[str], indices: Any = None, **options: Any) -> PoolTransfer:
    return PoolTransfer(name=name, keys=keys, host_indices=indices, **options)
