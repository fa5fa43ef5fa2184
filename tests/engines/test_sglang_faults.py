"""The kvstore HiCache backend under SGLang's storage controller and failure injector, and daemons that go."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daemon_process import DaemonProcess, wait_until

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; run tests/engines/sglang_env", allow_module_level=True)

from engines.sglang_backends import (  # noqa: F401
    Make,
    copies,
    daemon_of_the_module,
    extra,
    hashes,
    make_backends,
    same,
    stack_of_the_test,
    transfer,
)
from engines.sglang_pools import (
    PAGE,
    fill,
    indices_of,
    mamba_pool,
    mha_pool,
    wipe,
)
from sglang.srt.environ import envs
from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation, StorageOperation
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageFailureInjector,
    PoolName,
)
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.runtime_context import get_parallel

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

_ALONE = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_dcp_size": 1, "attn_dcp_rank": 0}
"""The topology of one rank, which an engine publishes when it makes its process groups."""

# ---------------------------------------------------------------- SGLang's controller


class Controller:
    """SGLang's ``HiCacheController`` with its storage threads, and no device: of it nothing is asked."""

    def __init__(self, pool: Any, extra_config: dict[str, Any]) -> None:
        device = SimpleNamespace(device="cpu", layer_num=1, register_layer_transfer_counter=lambda counter: None)
        self.own = HiCacheController(
            SimpleNamespace(get_kvcache=lambda: device),
            pool,
            pool.page_size,
            None,
            threading.Event(),
            storage_backend="dynamic",
            prefetch_threshold=pool.page_size,
            model_name="test/model",
            storage_backend_extra_config=extra_config,
            io_backend="direct",
            write_policy="write_through",
        )

    def backup(self, indices: torch.Tensor, tokens: list[int], names: list[str]) -> int:
        """Tokens that its backup thread stored."""
        self.own.write_storage(indices, tokens, names, prefix_keys=[])
        operation: StorageOperation = self.own.ack_backup_queue.get(timeout=20)
        return operation.completed_tokens

    def prefetch(self, tokens: list[int], indices: Callable[[int], torch.Tensor]) -> tuple[int, int]:
        """Tokens that its prefetch threads found, and that they loaded into these indices."""
        operation: PrefetchOperation = self.own.prefetch("request", tokens, None, [])
        found: PrefetchOperation = self.own.prefetch_hit_queue.get(timeout=20)
        assert found is operation
        hits = operation.storage_hit_count
        operation.host_indices = indices(hits)
        self.own.prefetch_buffer.put(operation)
        loaded = 0
        while True:
            ack = self.own.ack_prefetch_queue.get(timeout=20)
            loaded = max(loaded, ack.completed_tokens or 0)
            if ack.completed_req:
                return hits, loaded


@pytest.fixture
def control(daemon: DaemonProcess, stack: ExitStack, request: pytest.FixtureRequest) -> Make:
    stack.enter_context(get_parallel().override(**_ALONE))

    def one(pool: Any, endpoint: str | None = None, **own: Any) -> Controller:
        own = {"name": request.node.name[:100], "revision": "1", "interface_v1": 1} | own
        controller = Controller(pool, extra(endpoint or daemon.endpoint, **own))
        stack.callback(controller.own.detach_storage_backend)
        return controller

    return one


@pytest.mark.parametrize("interface_v1", [1, 0])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_the_controllers_threads_back_up_and_prefetch(control: Make, layout: str, interface_v1: int) -> None:
    pool = mha_pool(layout)
    controller = control(pool, interface_v1=interface_v1)
    fill(pool)
    tokens = list(range(5 * PAGE))
    names, before = get_hash_str(tokens, None, page_size=PAGE), copies(pool, [0, 1, 2, 3, 4])
    assert controller.backup(indices_of(pool, [0, 1, 2, 3, 4]), tokens, names) == 5 * PAGE
    wipe(pool)
    longer = [*tokens, *range(2 * PAGE)]
    hits, loaded = controller.prefetch(longer, lambda hits: indices_of(pool, [6, 5, 8, 7, 9]))
    assert (hits, loaded) == (5 * PAGE, 5 * PAGE)
    assert same(copies(pool, [6, 5, 8, 7, 9]), before)


def test_the_controller_says_what_is_wrong_when_it_attaches(control: Make) -> None:
    with pytest.raises(ValueError, match="kivi4.*--page-size"):
        control(mha_pool("page_first", page=16), codec="kivi4")


def test_sglangs_failure_injector_costs_pages_and_never_bytes(make: Make, stack: ExitStack) -> None:
    stack.enter_context(envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3))
    stack.enter_context(envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.002))
    pool = mha_pool("page_first")
    backend = make(pool, "lossless")
    assert isinstance(backend, HiCacheStorageFailureInjector)
    fill(pool)
    before, good = copies(pool, [0, 1, 2]), 0
    for turn in range(60):
        names = hashes(3, seed=turn)
        backend.batch_set_v1(names, indices_of(pool, [0, 1, 2]))
        wiped = indices_of(pool, [5, 6, 7])
        pool.kv_buffer[:, wiped] = 7
        hits = backend.batch_exists(names)
        results = backend.batch_get_v1(names[:hits], wiped[: hits * PAGE])
        assert results == sorted(results, reverse=True)
        got = copies(pool, [5, 6, 7])[: sum(results)]
        assert same(got, before[: len(got)])
        good += len(got)
    assert 0 < good < 180


# ---------------------------------------------------------------- a daemon that goes


def test_a_daemon_that_dies_costs_hits_and_no_time(
    make: Make, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = stack.enter_context(DaemonProcess(capacity="64MiB"))
    pool = mha_pool("page_first")
    backend = make(pool, endpoint=daemon.endpoint, retry_s=0.2)
    names = hashes(3)
    assert backend.batch_set_v1(names, indices_of(pool, [0, 1, 2])) == [True] * 3
    daemon.kill()
    end = time.monotonic() + 10
    while backend.batch_set_v1(hashes(3, seed=5), indices_of(pool, [0, 1, 2])) != [False] * 3:
        assert time.monotonic() < end
    caplog.clear()
    begin = time.monotonic()
    for _ in range(50):
        assert backend.batch_exists(names) == 0
        assert backend.batch_get_v1(names, indices_of(pool, [0, 1, 2])) == [False] * 3
        assert backend.batch_set_v1(names, indices_of(pool, [0, 1, 2])) == [False] * 3
        assert not backend.exists("x")
        assert backend.get("x") is None
        assert not backend.set("x", torch.ones(3))
    assert time.monotonic() - begin < 2.0
    assert caplog.text.count("no store, the engine goes on") <= 1
    daemon.start()
    wait_until(lambda: backend.batch_set_v1(names, indices_of(pool, [0, 1, 2])) == [True] * 3)
    assert backend.batch_exists(names) == 3
    assert backend.counts()["state_changes.down"] >= 1


def test_no_daemon_at_the_start_is_no_error(make: Make, stack: ExitStack, tmp_path: Any) -> None:
    pool = mha_pool("page_first")
    begin = time.monotonic()
    backend = make(pool, endpoint=f"ipc://{tmp_path}/none.sock", timeout_s=0.3)
    assert backend.batch_exists(hashes(1)) == 0
    assert backend.batch_set_v1(hashes(1), indices_of(pool, [0])) == [False]
    assert time.monotonic() - begin < 10


def test_a_daemon_that_hangs_is_waited_for_once(make: Make, stack: ExitStack) -> None:
    daemon = stack.enter_context(DaemonProcess(capacity="64MiB"))
    pool = mha_pool("page_first")
    backend = make(pool, endpoint=daemon.endpoint, timeout_s=0.5, mapped=False)
    names = hashes(2)
    assert backend.batch_set_v1(names, indices_of(pool, [0, 1])) == [True] * 2
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for _ in range(20):
            assert backend.batch_exists(names) == 0
            assert backend.batch_get_v1(names, indices_of(pool, [4, 5])) == [False] * 2
        assert time.monotonic() - begin < 6.0
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    wait_until(lambda: backend.batch_exists(names) == 2)


def test_a_daemon_that_hangs_holds_no_store_up(make: Make, stack: ExitStack) -> None:
    daemon = stack.enter_context(DaemonProcess(capacity="64MiB"))
    pool = mha_pool("page_first")
    backend = make(pool, endpoint=daemon.endpoint, timeout_s=0.5, mapped=True)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for turn in range(20):
            assert backend.batch_set_v1(hashes(2, seed=turn), indices_of(pool, [0, 1])) == [False] * 2
        assert time.monotonic() - begin < 6.0
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    wait_until(lambda: backend.batch_set_v1(hashes(2), indices_of(pool, [0, 1])) == [True] * 2)


def test_a_full_store_evicts_and_what_is_found_is_right(make: Make, stack: ExitStack) -> None:
    daemon = stack.enter_context(DaemonProcess(capacity="16MiB"))
    pool = mha_pool("page_first")
    backend = make(pool, endpoint=daemon.endpoint)
    for turn in range(60):
        fill(pool, seed=turn)
        before, names = copies(pool, [0, 1, 2, 3]), hashes(4, seed=turn)
        backend.batch_set_v1(names, indices_of(pool, [0, 1, 2, 3]))
        results = backend.batch_get_v1(names, indices_of(pool, [5, 6, 7, 8]))
        good = sum(results)
        assert same(copies(pool, [5, 6, 7, 8])[:good], before[:good])
    found = [backend.batch_exists(hashes(4, seed=turn)) for turn in range(60)]
    assert found[-1] == 4
    assert 0 in found


def test_threads_store_and_load_at_once(make: Make) -> None:
    pool = mha_pool("page_first")
    backend = make(pool, "lossless", threads=2)
    fill(pool)
    before = copies(pool, [0, 1])
    wrong: list[str] = []

    def work(at: int) -> None:
        for turn in range(25):
            names = hashes(2, seed=100 * at + turn)
            if backend.batch_set_v1(names, indices_of(pool, [0, 1])) != [True] * 2:
                wrong.append(f"{at}.{turn}: not stored")
            pages = [2 + 2 * at, 3 + 2 * at]
            if backend.batch_get_v1(names, indices_of(pool, pages)) != [True] * 2:
                wrong.append(f"{at}.{turn}: not loaded")
            elif not same(copies(pool, pages), before):
                wrong.append(f"{at}.{turn}: other bytes")

    workers = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


# ---------------------------------------------------------------- clear, stats, the end


def test_clear_removes_the_pages_of_all_pools(make: Make) -> None:
    pool, states = mha_pool("page_first"), mamba_pool()
    backend = make(pool)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    names = hashes(2)
    backend.batch_set_v1(names, indices_of(pool, [0, 1]))
    backend.batch_set_v2([transfer(PoolName.MAMBA, names, torch.tensor([0, 1]))])
    backend.set("x", torch.ones(3))
    assert backend.clear()
    assert backend.batch_exists(names) == 0
    assert backend.batch_get_v2([transfer(PoolName.MAMBA, names, torch.tensor([0, 1]))]) == {"mamba": [False] * 2}
    assert not backend.exists("x")


def test_stats_are_those_that_sglang_collects(make: Make) -> None:
    pool = mha_pool("page_first")
    assert make(pool).get_stats() is None
    backend = make(pool, rank={"enable_storage_metrics": True})
    names = hashes(3)
    backend.batch_set_v1(names, indices_of(pool, [0, 1, 2]))
    backend.batch_get_v1(names[:2], indices_of(pool, [0, 1]))
    stats = backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [2])
    assert stats.backup_bandwidth[0] > 0 < stats.prefetch_bandwidth[0]
    assert backend.get_stats().backup_pgs == []


def test_a_closed_backend_finds_nothing_and_leaves_no_thread(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    pool = mha_pool("page_first")
    backend = make(pool)
    backend.batch_set_v1(hashes(1), indices_of(pool, [0]))
    backend.close()
    backend.close()
    assert backend.batch_exists(hashes(1)) == 0
    assert backend.batch_set_v1(hashes(1), indices_of(pool, [0])) == [False]
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore")] == []
    assert caplog.text == ""
