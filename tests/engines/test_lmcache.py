"""The L2 adapter under LMCache itself: its own tests, a real server, its objects; run by ``lmcache_env`` beside this.

The server is LMCache's, with an engine's worker played over its own client; the worker's KV is in host memory.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DaemonProcess, child_environment, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lmcache", reason="LMCache is not installed; run tests/engines/lmcache_env")
    import torch
    from engines.lmcache_server import (
        CHUNK_BYTES,
        CHUNK_TOKENS,
        HEAD_DIM,
        LMCacheServer,
        Worker,
        running,
    )
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.internal_api import L2AdapterListener
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.platform import consume_fd

    from kvstore_client.integrations.lmcache import KVStoreL2Adapter

from kvstore.errors import InvalidArgument
from kvstore_client import Client

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]

SUITE = [
    "test_mock_l2_adapter.py",
    "test_prefetch_controller.py",
    "test_store_controller.py",
    "test_runtime_adapters.py",
    "test_cache_salt_l2_eviction.py",
    "test_fault_inject_l2_adapter.py",
    "test_l1_l2_state_metrics.py",
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(capacity="256MiB") as running_daemon:
        yield running_daemon


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


# ---------------------------------------------------------------- LMCache's own tests


@pytest.mark.parametrize("file", SUITE)
def test_lmcaches_own_tests_pass_with_our_adapter_in_the_place_of_its_mock(daemon: DaemonProcess, file: str) -> None:
    where = os.environ.get("KVSTORE_LMCACHE_SUITE", "")
    if not where or not Path(where, "tests").is_dir():
        pytest.skip(
            "LMCache's tests are not here: KVSTORE_LMCACHE_SUITE names no folder; run tests/engines/lmcache_env"
        )
    environ = child_environment({"KVSTORE_SUITE_ENDPOINT": daemon.endpoint, "LMCACHE_TRACK_USAGE": "false"})
    environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), environ["PYTHONPATH"]))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-o", "log_cli=false", "-p", "no:cacheprovider"]
    command += ["-p", "lmcache_suite", f"tests/v1/distributed/{file}"]
    # In its own folder, so that `tests` is LMCache's.
    ran = subprocess.run(command, cwd=where, env=environ, capture_output=True, text=True, timeout=280, check=False)
    last = ran.stdout.strip().splitlines()[-1:] or [ran.stderr[-2000:]]
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert "passed" in last[0], last
    assert "skipped" not in last[0], last
    assert "failed" not in last[0], last


# ---------------------------------------------------------------- a real server


def tokens_of(seed: int, chunks: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=chunks * CHUNK_TOKENS)


def equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def stored(server: LMCacheServer, chunks: int) -> None:
    """Wait until so many chunks are in the store."""
    server.wait(lambda: server.adapter_status().get("stored", 0) >= chunks, f"{chunks} chunks are stored")


def store_more(server: LMCacheServer, worker: Worker, chunks: int) -> None:
    """Store other prompts until so many chunks are in the store: LMCache makes room in L1 once a second."""
    pages = range(21, 61)
    seeds = iter(range(1000, 2000))

    def enough() -> bool:
        worker.fill(pages, next(seeds))
        worker.store(tokens_of(next(seeds), len(pages)), pages)
        return bool(server.adapter_status().get("stored", 0) >= chunks)

    server.wait(enough, f"{chunks} chunks are stored")


def test_chunks_that_left_l1_and_the_server_come_back_bit_equal(
    daemon: DaemonProcess, name: str, tmp_path: Path
) -> None:
    prompt, pages = tokens_of(1, 20), list(range(1, 21))
    with running(tmp_path, {"endpoint": daemon.endpoint, "name": name}, l1_gb=0.02) as server:
        with Worker(server) as worker:
            assert worker.retrieve(prompt, pages) == 0
            before = worker.fill(pages, 1)
            assert worker.store(prompt, pages)
            store_more(server, worker, 600)
            loaded = server.adapter_status().get("loaded", 0)
            worker.clear(pages)
            assert worker.retrieve(prompt, pages) == 20
            assert equal(worker.read(pages), before)
            assert server.adapter_status()["loaded"] - loaded == 20, "they came from L1"
            assert server.adapter_status()["mapped"]
        server.stop()
        server.start()
        with Worker(server) as worker:
            others = list(range(40, 60))
            assert worker.retrieve(prompt, others) == 20
            assert equal(worker.read(others), before)
            status = server.adapter_status()
            assert status["loaded"] == 20
            assert "load_miss" not in status
            assert worker.retrieve(prompt[:-CHUNK_TOKENS] + tokens_of(99, 1), others) == 19
            assert worker.retrieve(prompt, others, salt="another-user") == 0
        server.wait(lambda: not server.adapter_status()["locked_key_count"], "all is unlocked")


def test_a_killed_daemon_costs_hits_and_is_used_again(name: str, tmp_path: Path) -> None:
    first, second, pages = tokens_of(1, 8), tokens_of(2, 8), list(range(1, 9))
    with (
        DaemonProcess(capacity="64MiB") as daemon,
        running(tmp_path, {"endpoint": daemon.endpoint, "name": name, "retry_s": 0.2}) as server,
        Worker(server) as worker,
    ):
        before = worker.fill(pages, 1)
        assert worker.store(first, pages)
        stored(server, 8)
        daemon.kill()
        begin = time.monotonic()
        worker.clear(pages)
        assert worker.retrieve(first, pages) == 8, "L1 has them"
        assert equal(worker.read(pages), before)
        worker.fill(pages, 2)
        assert worker.store(second, pages), "L1 takes them"
        assert worker.retrieve(tokens_of(3, 8), pages) == 0
        assert time.monotonic() - begin < 15.0
        server.wait(lambda: not server.adapter_status()["is_healthy"], "it is known to be away")
        daemon.start()
        third = tokens_of(4, 8)
        worker.fill(pages, 4)
        again = worker.read(pages)

        def stores() -> bool:
            count = server.adapter_status().get("stored", 0)
            fresh = tokens_of(random.randrange(1 << 30), 1)
            worker.store(fresh, pages[:1])
            time.sleep(0.2)
            return bool(server.adapter_status().get("stored", 0) > count)

        server.wait(stores, "it stores again")
        assert worker.store(third, pages)
        server.wait(lambda: server.adapter_status()["is_healthy"], "it is healthy")
        wait_until(lambda: server.adapter_status()["waiting_store_bytes"] == 0)
        log = server.log()
        assert log.count("LMCache goes on without it") == 1, log[-3000:]
        assert log.count("the store is there again") == 1, log[-3000:]
        server.stop()
        server.start()
        with Worker(server) as other:
            assert other.retrieve(third, pages) == 8
            assert equal(other.read(pages), again)
            assert other.retrieve(first, pages) == 0, "that was in the daemon's first life"


def test_a_server_without_a_daemon_serves(name: str, tmp_path: Path) -> None:
    prompt, pages = tokens_of(1, 4), list(range(1, 5))
    endpoint = f"ipc://{tmp_path}/nobody.sock"
    with running(tmp_path, {"endpoint": endpoint, "name": name}) as server, Worker(server) as worker:
        before = worker.fill(pages, 1)
        assert worker.retrieve(prompt, pages) == 0
        assert worker.store(prompt, pages)
        worker.clear(pages)
        assert worker.retrieve(prompt, pages) == 4
        assert equal(worker.read(pages), before)
        assert not server.adapter_status()["is_healthy"]


@pytest.mark.parametrize(("codec", "error"), [("kivi4", 0.2), ("int8", 0.02), ("lossless", 0.0)])
def test_codecs_store_less_and_come_back_after_a_restart(
    daemon: DaemonProcess, name: str, tmp_path: Path, codec: str, error: float
) -> None:
    prompt, pages = tokens_of(1, 10), list(range(1, 11))
    adapter = {"endpoint": daemon.endpoint, "name": name, "codec": codec, "head_dim": HEAD_DIM}
    with running(tmp_path, adapter) as server:
        with Worker(server) as worker:
            before = worker.fill(pages, 1)
            assert worker.store(prompt, pages)
            stored(server, 10)
            assert server.adapter_status()["stored_bytes"] < 0.9 * 10 * CHUNK_BYTES
        server.stop()
        server.start()
        with Worker(server) as worker:
            assert worker.retrieve(prompt, pages) == 10
            for one, other in zip(worker.read(pages), before, strict=True):
                one, other = one.float(), other.float()
                assert float((one - other).norm() / other.norm()) <= error
        (layout,) = (each for each in server.adapter_status()["layouts"] if each["layout"] != "flat bytes")
        assert layout["codec"] == codec


def test_what_lmcache_serialises_itself_comes_back_after_a_restart(
    daemon: DaemonProcess, name: str, tmp_path: Path
) -> None:
    prompt, pages = tokens_of(1, 6), list(range(1, 7))
    adapter = {"endpoint": daemon.endpoint, "name": name}
    with running(tmp_path, adapter, serde={"type": "fp8"}) as server:
        with Worker(server) as worker:
            before = worker.fill(pages, 1)
            assert worker.store(prompt, pages)
            server.wait(
                lambda: server.adapter_status().get("stored", 0) >= 6 or "Store task" in server.log(),
                "chunks are stored",
            )
        server.stop()
        server.start()
        with Worker(server) as worker:
            assert worker.retrieve(prompt, pages) == 6
            for one, other in zip(worker.read(pages), before, strict=True):
                one, other = one.float(), other.float()
                assert 0.0 < float((one - other).norm() / other.norm()) < 0.1


def test_kv_of_another_dtype_is_not_taken_for_right(daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    prompt, pages = tokens_of(1, 4), list(range(1, 5))
    adapter = {"endpoint": daemon.endpoint, "name": name}
    with running(tmp_path, adapter) as server, Worker(server, torch.bfloat16) as worker:
        worker.fill(pages, 1)
        worker.store(prompt, pages)
        stored(server, 4)
    with running(tmp_path, adapter) as server, Worker(server, torch.float16) as worker:
        assert worker.retrieve(prompt, pages) == 0
        before = worker.fill(pages, 2)
        worker.store(prompt, pages)
        stored(server, 4)
        assert worker.retrieve(prompt, pages) == 4
        assert equal(worker.read(pages), before)


def test_no_byte_is_wrong_where_the_store_evicts_all_the_time(name: str, tmp_path: Path) -> None:
    steps, hits = random.Random(5), 0
    contents: dict[int, list[torch.Tensor]] = {}
    pages = list(range(1, 21))
    with (
        DaemonProcess(capacity="16MiB", grant="8MiB") as daemon,
        running(tmp_path, {"endpoint": daemon.endpoint, "name": name}, l1_gb=0.01) as server,
        Worker(server) as worker,
    ):
        for _ in range(120):
            seed = steps.randrange(24)
            prompt = tokens_of(seed, 20)
            worker.clear(pages)
            found = worker.retrieve(prompt, pages)
            hits += found
            if found:
                assert equal(
                    [layer[:, :found] for layer in worker.read(pages)], [each[:, :found] for each in contents[seed]]
                )
            if found < 20:
                contents[seed] = worker.fill(pages, seed)
                worker.store(prompt, pages)
        status = server.adapter_status()
        with Client(daemon.endpoint) as client:
            assert client.stats().eviction.evicted_blocks > 0
        assert status["loaded"] > 50, status
        assert hits > 100


def test_a_setting_that_is_none_is_an_error_at_the_start(daemon: DaemonProcess, tmp_path: Path) -> None:
    server = LMCacheServer(tmp_path, {"endpoint": daemon.endpoint, "codek": "raw"})
    with pytest.raises(AssertionError, match=r"unknown setting 'codek' \(did you mean 'codec'\?\)"):
        server.start()
    server.stop()


# ---------------------------------------------------------------- its objects


def key_of(chunk: int, *, model: str = "m", rank: int = 0, group: int = 0, salt: str = "") -> ObjectKey:
    return ObjectKey(chunk.to_bytes(4, "big"), model, rank, group, salt)


def object_of(
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    fmt: MemoryFormat = MemoryFormat.KV_2LTD,
    seed: int | None = None,
) -> TensorMemoryObj:
    """An object of random KV, or of zeros."""
    values = torch.zeros(tuple(shape))
    if seed is not None:
        values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    raw = values.to(dtype).contiguous().view(torch.uint8).flatten()
    meta = MemoryObjMetadata(torch.Size(shape), dtype, 0, raw.numel(), 1, fmt=fmt)
    return TensorMemoryObj(raw, meta, parent_allocator=None)


class Driver:
    """An adapter, and what waits for its event descriptors."""

    def __init__(self, **settings: Any) -> None:
        self.adapter = KVStoreL2Adapter({"unknown_revision": "ignore"} | settings)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        self.adapter.close()

    def store(self, keys: Sequence[ObjectKey], objects: Sequence[TensorMemoryObj], timeout_s: float = 20.0) -> bool:
        task = self.adapter.submit_store_task(list(keys), list(objects))
        wait(self.adapter.get_store_event_fd(), timeout_s)
        done = self.adapter.pop_completed_store_tasks()
        return bool(done[task].is_successful())

    def lookup(
        self, keys: Sequence[ObjectKey], layout: TensorMemoryObj | None = None, timeout_s: float = 20.0
    ) -> list[int]:
        layouts = {}
        if layout is not None:
            layouts = {
                key.object_group_id: MemoryLayoutDesc([layout.get_shape()], [layout.get_dtype()]) for key in keys
            }
        task = self.adapter.submit_lookup_and_lock_task(list(keys), layouts)
        wait(self.adapter.get_lookup_and_lock_event_fd(), timeout_s)
        bitmap = self.adapter.query_lookup_and_lock_result(task)
        assert bitmap is not None
        assert self.adapter.query_lookup_and_lock_result(task) is None
        return list(bitmap.get_indices_list())

    def load(self, keys: Sequence[ObjectKey], objects: Sequence[TensorMemoryObj], timeout_s: float = 20.0) -> list[int]:
        task = self.adapter.submit_load_task(list(keys), list(objects))
        wait(self.adapter.get_load_event_fd(), timeout_s)
        bitmap = self.adapter.query_load_result(task)
        assert bitmap is not None
        assert self.adapter.query_load_result(task) is None
        return list(bitmap.get_indices_list())


def wait(descriptor: int, timeout_s: float) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(timeout_s * 1000), f"no event within {timeout_s:g} s"
    consume_fd(descriptor)


@pytest.fixture(params=["mapped", "socket"])
def mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "mapped")


SHAPES = [(2, 3, 64, 128), (2, 3, 40, 128), (3, 64, 576), (1, 3, 64, 576), (7, 11), (513,)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_objects_of_any_shape_come_back_as_they_were(
    daemon: DaemonProcess, name: str, mapped: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    keys = [key_of(chunk) for chunk in range(5)]
    objects = [object_of(shape, dtype, seed=seed) for seed in range(5)]
    with Driver(endpoint=daemon.endpoint, name=name, mapped=None if mapped else False) as driver:
        assert driver.store(keys, objects)
        assert driver.store(keys, objects), "what is there already is no failure"
        assert driver.lookup(keys, objects[0]) == [0, 1, 2, 3, 4]
    with Driver(endpoint=daemon.endpoint, name=name, mapped=None if mapped else False) as driver:
        wanted = [*keys[:2], key_of(77), *keys[2:]]
        assert driver.lookup(wanted, objects[0]) == [0, 1, 3, 4, 5]
        targets = [object_of(shape, dtype) for _ in wanted]
        assert driver.load(wanted, targets) == [0, 1, 3, 4, 5]
        found = [targets[at] for at in (0, 1, 3, 4, 5)]
        assert all(torch.equal(one.raw_data, other.raw_data) for one, other in zip(found, objects, strict=True))
        driver.adapter.submit_unlock(wanted)
        assert not driver.adapter.report_status()["locked_key_count"]


def test_a_chunk_of_several_megabytes_lies_in_parts(daemon: DaemonProcess, name: str, mapped: bool) -> None:
    shape = (2, 8, 256, 2050)  # 16.4 MiB: more than one slot of this daemon holds.
    keys, objects = [key_of(1), key_of(2)], [object_of(shape, seed=1), object_of(shape, seed=2)]
    with Driver(endpoint=daemon.endpoint, name=name, mapped=None if mapped else False) as driver:
        assert driver.store(keys, objects)
        targets = [object_of(shape), object_of(shape)]
        assert driver.lookup(keys, targets[0]) == [0, 1]
        assert driver.load(keys, targets) == [0, 1]
        assert torch.equal(targets[0].raw_data, objects[0].raw_data)
        assert torch.equal(targets[1].raw_data, objects[1].raw_data)


@pytest.mark.parametrize(
    ("codec", "shape", "settings"),
    [
        ("kivi4", (2, 3, 128, 256), {"head_dim": 128}),
        ("int8", (2, 3, 100, 256), {"head_dim": 64}),
        ("turbo4", (2, 3, 64, 256), {"head_dim": 128}),
        ("kivi4", (3, 64, 576), {"rotary_dim": 64}),
        ("kivi4", (1, 3, 64, 576), {"rotary_dim": 64}),
        ("lossless", (2, 3, 77, 256), {}),
    ],
)
def test_codecs_take_chunks_whose_layout_is_known(
    daemon: DaemonProcess, name: str, mapped: bool, codec: str, shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    keys, objects = [key_of(1), key_of(2)], [object_of(shape, seed=1), object_of(shape, seed=2)]
    options: dict[str, Any] = {"endpoint": daemon.endpoint, "name": name, "codec": codec, **settings}
    with Driver(**options, mapped=None if mapped else False) as driver:
        assert driver.store(keys, objects)
        assert driver.store(keys, objects)
        targets = [object_of(shape), object_of(shape)]
        assert driver.lookup([*keys, key_of(3)], targets[0]) == [0, 1]
        assert driver.load(keys, targets) == [0, 1]
        status = driver.adapter.report_status()
        assert codec in [layout["codec"] for layout in status["layouts"]], status
        assert status["stored_bytes"] < 0.9 * 2 * objects[0].get_size(), status
    for target, source in zip(targets, objects, strict=True):
        assert target.tensor is not None
        assert source.tensor is not None
        loss = float((target.tensor.float() - source.tensor.float()).norm() / source.tensor.float().norm())
        assert loss < (1e-9 if codec == "lossless" else 0.2)


@pytest.mark.parametrize(
    ("shape", "dtype", "fmt", "why"),
    [
        ((2, 3, 100, 256), torch.bfloat16, MemoryFormat.KV_2LTD, "tokens"),
        ((2, 3, 64, 200), torch.bfloat16, MemoryFormat.KV_2LTD, "head_dim 128"),
        ((3, 64, 576), torch.bfloat16, MemoryFormat.KV_2LTD, "rotary_dim"),
        ((2, 3, 64, 256), torch.uint8, MemoryFormat.KV_2LTD, "takes no uint8"),
        ((64, 2, 256), torch.bfloat16, MemoryFormat.KV_T2D, ""),
    ],
)
def test_chunks_that_a_codec_cannot_take_are_stored_as_they_are_and_that_is_said(
    daemon: DaemonProcess,
    name: str,
    caplog: pytest.LogCaptureFixture,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fmt: MemoryFormat,
    why: str,
) -> None:
    source, target = object_of(shape, dtype, fmt, seed=1), object_of(shape, dtype, fmt)
    with Driver(endpoint=daemon.endpoint, name=name, codec="kivi4", head_dim=128) as driver:
        assert driver.store([key_of(1)], [source])
        assert driver.lookup([key_of(1)], target) == [0]
        assert driver.load([key_of(1)], [target]) == [0]
        assert torch.equal(source.raw_data, target.raw_data)
        if why:
            assert why in caplog.text
            assert any(why in layout["not_encoded_because"] for layout in driver.adapter.report_status()["layouts"])


def test_what_makes_kv_differ_keeps_objects_apart(daemon: DaemonProcess, name: str) -> None:
    shape = (2, 2, 64, 64)
    with Driver(endpoint=daemon.endpoint, name=name) as driver:
        assert driver.store([key_of(1)], [object_of(shape, seed=1)])
        others = [key_of(2), key_of(1, model="n"), key_of(1, rank=1), key_of(1, group=1), key_of(1, salt="user")]
        assert driver.lookup([*others, key_of(1)], object_of(shape)) == [len(others)]
        assert driver.lookup([key_of(1)], object_of(shape, torch.float16)) == []
        assert driver.lookup([key_of(1)], object_of((2, 2, 128, 32))) == []
    for settings in ({"name": name + "-2"}, {"name": name, "revision": "r"}):
        with Driver(endpoint=daemon.endpoint, **settings) as driver:
            assert driver.lookup([key_of(1)], object_of(shape)) == []


def test_locked_objects_stay_whether_or_not_they_lead() -> None:
    shape = (2, 2, 64, 64)
    size = object_of(shape).get_size()
    with (
        DaemonProcess(capacity="4MiB", grant="4MiB") as daemon,
        Driver(endpoint=daemon.endpoint) as driver,
    ):
        keys = [key_of(chunk) for chunk in range(12)]
        there = [at for at in range(12) if at not in (0, 4, 5, 9)]
        assert driver.store([keys[at] for at in there], [object_of(shape, seed=at) for at in there])
        assert driver.lookup(keys, object_of(shape)) == there
        assert driver.adapter.report_status()["locked_key_count"] == len(there)
        # Three times the capacity.
        for begin in range(100, 100 + 3 * (4 << 20) // size, 8):
            some = range(begin, begin + 8)
            driver.store([key_of(chunk) for chunk in some], [object_of(shape, seed=chunk) for chunk in some])
        targets = [object_of(shape) for _ in there]
        assert len(driver.load([keys[at] for at in there], targets)) == len(there)
        assert all(
            torch.equal(target.raw_data, object_of(shape, seed=at).raw_data)
            for target, at in zip(targets, there, strict=True)
        )
        driver.adapter.submit_unlock(keys)
        driver.adapter.submit_unlock([key_of(12345)])

        def evicted() -> bool:
            begin = random.randrange(1000, 1 << 30)
            some = range(begin, begin + 8)
            driver.store([key_of(chunk) for chunk in some], [object_of(shape, seed=chunk) for chunk in some])
            return not driver.load([keys[at] for at in there], targets)

        wait_until(evicted, 30.0)


class Recorder(L2AdapterListener):
    def __init__(self) -> None:
        self.gone: list[ObjectKey] = []

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        pass

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        pass

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.gone += keys


def test_listeners_hear_of_what_the_daemon_evicted_when_it_is_looked_for(daemon: DaemonProcess, name: str) -> None:
    shape = (2, 2, 64, 64)
    keys, recorder = [key_of(chunk, salt="user") for chunk in range(3)], Recorder()
    with Driver(endpoint=daemon.endpoint, name=name) as driver:
        driver.adapter.register_listener(recorder)
        assert driver.store(keys, [object_of(shape, seed=chunk) for chunk in range(3)])
        assert driver.adapter.get_usage().bytes_by_cache_salt["user"] == 3 * object_of(shape).get_size()
        ((place, _),) = [(place, s) for place, s in _sessions(driver) if place.namespace.layout != "flat bytes"][:1]
        with Client(daemon.endpoint, namespace=place.namespace, unknown_revision="ignore") as another:
            another.clear()
        assert driver.lookup(keys, object_of(shape)) == []
        assert recorder.gone == keys
        assert driver.adapter.get_usage().total_bytes_used == 0


def _sessions(driver: Driver) -> list[Any]:
    driver.lookup([key_of(0)], object_of((2, 2, 64, 64)))
    return driver.adapter._sessions.connected()


def test_a_hung_daemon_costs_one_timeout(tmp_path: Path) -> None:
    shape = (2, 2, 64, 64)
    with (
        DaemonProcess(capacity="32MiB") as daemon,
        Driver(endpoint=daemon.endpoint, timeout_s=0.5, retry_s=60, mapped=False) as driver,
    ):
        keys = [key_of(chunk) for chunk in range(4)]
        objects = [object_of(shape, seed=chunk) for chunk in range(4)]
        assert driver.store(keys, objects)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            driver.adapter.submit_unlock(keys)
            for call in (
                lambda: driver.adapter.submit_store_task(keys, objects),
                lambda: driver.adapter.submit_lookup_and_lock_task(keys, {}),
                lambda: driver.adapter.submit_load_task(keys, objects),
            ):
                call()
            assert time.monotonic() - begin < 0.3, "a submission waited for the daemon"
            for descriptor in (
                driver.adapter.get_store_event_fd(),
                driver.adapter.get_lookup_and_lock_event_fd(),
                driver.adapter.get_load_event_fd(),
            ):
                wait(descriptor, 5.0)
            driver.adapter.pop_completed_store_tasks()
            begin = time.monotonic()
            for _ in range(20):
                assert driver.lookup(keys, objects[0]) == []
                assert driver.load(keys, objects) == []
                assert not driver.store(keys, objects)
            assert time.monotonic() - begin < 3.0, "each call waited for the daemon"
        finally:
            os.kill(daemon.pid, signal.SIGCONT)


def test_tasks_of_many_threads_each_get_their_own_answer(daemon: DaemonProcess, name: str) -> None:
    shape, failures = (2, 2, 64, 64), []
    with Driver(endpoint=daemon.endpoint, name=name, load_threads=4) as driver:
        adapter = driver.adapter

        def until(take: Any) -> Any:
            end = time.monotonic() + 30.0
            while (answer := take()) is None:
                assert time.monotonic() < end
                time.sleep(0.001)
            return answer

        done: dict[int, Any] = {}
        guard = threading.Lock()

        def pop(task: int) -> Any:
            with guard:
                done.update(adapter.pop_completed_store_tasks())
                return done.pop(task, None)

        def work(number: int) -> None:
            try:
                for step in range(10):
                    keys = [key_of(number * 1000 + step * 10 + at) for at in range(4)]
                    objects = [object_of(shape, seed=number * 1000 + step * 10 + at) for at in range(4)]
                    task = adapter.submit_store_task(keys, objects)
                    assert until(lambda task=task: pop(task)).is_successful()
                    desc = {0: MemoryLayoutDesc([objects[0].get_shape()], [torch.bfloat16])}
                    task = adapter.submit_lookup_and_lock_task(keys, desc)
                    assert until(lambda task=task: adapter.query_lookup_and_lock_result(task)).popcount() == 4
                    targets = [object_of(shape) for _ in keys]
                    task = adapter.submit_load_task(keys, targets)
                    assert until(lambda task=task: adapter.query_load_result(task)).popcount() == 4
                    adapter.submit_unlock(keys)
                    for one, other in zip(targets, objects, strict=True):
                        assert torch.equal(one.raw_data, other.raw_data)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures
        assert not adapter.report_status()["locked_key_count"]


def test_more_stores_than_may_wait_fail_at_once(daemon: DaemonProcess, name: str) -> None:
    objects = [object_of((2, 8, 64, 1024), seed=chunk) for chunk in range(4)]
    size = objects[0].get_size()
    with Driver(endpoint=daemon.endpoint, name=name, queued_bytes=2 * size) as driver:
        tasks = [driver.adapter.submit_store_task([key_of(chunk)], [objects[chunk % 4]]) for chunk in range(60)]
        done: dict[int, Any] = {}
        wait_until(lambda: done.update(driver.adapter.pop_completed_store_tasks()) or len(done) == len(tasks))
        good = sum(result.is_successful() for result in done.values())
        assert 1 <= good < 60
        assert driver.adapter.report_status()["store_refused"] == 60 - good
        assert driver.adapter.report_status()["waiting_store_bytes"] == 0


def test_a_closed_adapter_answers_and_leaves_nothing(daemon: DaemonProcess, name: str, no_leaks: None) -> None:
    driver = Driver(endpoint=daemon.endpoint, name=name)
    key, source = key_of(1), object_of((2, 2, 64, 64), seed=1)
    assert driver.store([key], [source])
    assert driver.lookup([key], source) == [0]
    for _ in range(20):
        driver.adapter.submit_load_task([key], [source])
    driver.adapter.close()
    driver.adapter.close()
    driver.adapter.submit_unlock([key])


def test_a_model_without_a_revision_is_refused_where_that_is_wanted(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    source = object_of((2, 2, 64, 64), seed=1)
    with Driver(endpoint=daemon.endpoint, unknown_revision="refuse", revision={"m": "abc"}) as driver:
        assert driver.store([key_of(1)], [source])
        assert not driver.store([key_of(1, model="n")], [source])
        assert "model 'n' has no revision" in caplog.text
        assert driver.adapter.report_status()["is_healthy"]


def test_params_that_are_wrong_are_named() -> None:
    with pytest.raises(InvalidArgument, match="unknown setting 'host'.* known are endpoint, "):
        KVStoreL2Adapter({"host": "localhost"})
