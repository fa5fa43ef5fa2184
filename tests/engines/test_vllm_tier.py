"""The kvstore tier under vLLM's own tiering manager: real manager, CPU tier, factory and daemon; a played scheduler."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from daemon_process import DaemonProcess, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed; run with the Python of an environment that has it")
    from engines.vllm_tiering import BLOCK_BYTES, config_of, content_of, engine, keys_of
    from vllm.v1.kv_offload.base import LookupResult
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    from kvstore_client.integrations.vllm_tier import KVStoreTier

from kvstore.errors import InvalidArgument
from kvstore_client import Client

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(capacity="64MiB") as running:
        yield running


@pytest.fixture(params=["mapped", "socket"])
def mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "mapped")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("codec", ["raw", "lossless", "lossless-zstd"])
def test_another_engine_loads_what_one_stored(daemon: DaemonProcess, name: str, mapped: bool, codec: str) -> None:
    keys = keys_of(name, 12)
    options = {"name": name, "codec": codec, "mapped": mapped}
    with engine(config_of(daemon.endpoint, **options)) as first:
        assert first.serve(keys) == 0
        first.settle()
        assert first.counts()["chunks store stored"] == 12
    with engine(config_of(daemon.endpoint, **options)) as second:
        assert second.serve(keys) == 12
        second.settle()
        counts = second.counts()
        assert counts["chunks load loaded"] == 12
        assert counts["up"] == 1
        # And now from its own CPU tier.
        assert second.serve(keys) == 12
        assert "chunks load loaded" not in second.counts()


def test_another_namespace_finds_nothing(daemon: DaemonProcess, name: str) -> None:
    keys = keys_of(name, 4)
    with engine(config_of(daemon.endpoint, name=name)) as first:
        first.serve(keys)
        first.settle()
    for other in (
        {"name": name + "2"},
        {"name": name, "revision": "other"},
        {"name": name, "identity": "flash-attention"},
        {"name": name, "tenant_salt": "tenant"},
        {"name": name, "codec": "lossless"},
        {"name": name, "model": "tiny-2"},
        {"name": name, "world": 2},
        {"name": name, "groups": 2},
    ):
        with engine(config_of(daemon.endpoint, **other)) as second:
            assert second.serve(keys) == 0, other
            second.settle()
    with engine(config_of(daemon.endpoint, name=name)) as again:
        assert again.serve(keys) == 4


def test_an_empty_store_has_no_hit_and_the_bytes_come_from_it(daemon: DaemonProcess, name: str) -> None:
    """The control: with the store cleared in between, nothing is found."""
    keys = keys_of(name, 4)
    config = config_of(daemon.endpoint, name=name)
    with engine(config) as first:
        first.serve(keys)
        first.settle()
        namespace = first.tier._link.store.namespace
    with Client(daemon.endpoint, namespace=namespace, unknown_revision="ignore") as client:
        assert client.exists([key[:32] for key in keys]) == [True] * 4
        assert client.remove([keys[2][:32]]) == 1
    with engine(config_of(daemon.endpoint, name=name)) as second:
        assert second.serve(keys) == 2
        second.settle()
    with Client(daemon.endpoint, namespace=namespace, unknown_revision="ignore") as client:
        assert client.clear() == 4
    with engine(config_of(daemon.endpoint, name=name)) as third:
        assert third.serve(keys) == 0


def test_groups_have_blocks_of_their_own(daemon: DaemonProcess, name: str) -> None:
    both = keys_of(name, 3, 0) + keys_of(name, 3, 1)[1:]
    with engine(config_of(daemon.endpoint, name=name, groups=2)) as first:
        context = first.request(both)
        first.compute(both, context)
        first.step()
        first.finish(context)
        first.settle()
    with engine(config_of(daemon.endpoint, name=name, groups=2)) as second:
        context = second.request(both)
        # The window's group lacks its first block.
        assert second.hits(keys_of(name, 3, 1)[:1], context) == 0
        assert second.hits(both, context) == 5
        for key, row in zip(both, second.read(both, context), strict=True):
            assert (row == content_of(key, row.size)).all()
        second.finish(context)


def test_a_row_has_the_bytes_of_every_rank(daemon: DaemonProcess, name: str) -> None:
    """Two tensor-parallel ranks, each with vLLM's own view of its cells: each gets back what it wrote."""

    def ranks(running: Any) -> list[Any]:
        spec = running.spec
        regions = [
            SharedOffloadRegion(
                engine_id=spec.config.engine_id,
                num_chunks=spec.num_chunks,
                rank=rank,
                kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
                cpu_page_size=spec.cpu_page_size_per_worker,
            )
            for rank in range(2)
        ]
        return [(region, region.create_next_worker_view(BLOCK_BYTES)) for region in regions]

    keys = keys_of(name, 5)
    with engine(config_of(daemon.endpoint, name=name, world=2)) as first:
        cells = ranks(first)
        context = first.request(keys)
        output = first.manager.prepare_store(keys, context)
        for index, row in enumerate(output.store_spec.chunk_ids):
            for rank, (_, view) in enumerate(cells):
                view[row] = 10 * index + rank + 1
        first.manager.complete_store(set(keys), context, True)
        first.finish(context)
        first.settle()
        for region, _ in cells:
            region.cleanup()
    with engine(config_of(daemon.endpoint, name=name, world=2)) as second:
        cells = ranks(second)
        context = second.request(keys)
        assert second.hits(keys, context) == 5
        for index, row in enumerate(second.manager.prepare_load(keys, context).chunk_ids):
            assert [view[row].unique().tolist() for _, view in cells] == [[10 * index + 1], [10 * index + 2]]
        second.manager.complete_load(keys, context)
        second.finish(context)
        for region, _ in cells:
            region.cleanup()


def test_blocks_know_which_comes_before_them(daemon: DaemonProcess, name: str) -> None:
    """A chain that grows over two requests, of which the second finds the first one's blocks in the CPU tier."""
    keys = keys_of(name, 8)
    with engine(config_of(daemon.endpoint, name=name)) as first:
        first.serve(keys[:4])
        first.settle()
        first.serve(keys)
        first.settle()
        store = first.tier._link.store
        operations = store.client._operations
        records = store.client._run(operations.get_records([key[:32] for key in keys], 0, None))
        parents = [record[0].parent_key for record in records]
    assert parents == [bytes(32), *(key[:32] for key in keys[:-1])]


# ---------------------------------------------------------------- partial loads, limits


def test_a_block_that_goes_before_its_load_fails_alone(daemon: DaemonProcess, name: str) -> None:
    keys = keys_of(name, 6)
    with engine(config_of(daemon.endpoint, name=name)) as first:
        first.serve(keys)
        first.settle()
    with engine(config_of(daemon.endpoint, name=name, lease_s=0)) as second:
        context = second.request(keys)
        for key in keys:
            assert second.manager.lookup(key, context) is LookupResult.HIT_PENDING
        second.tier._link.store.client.remove([keys[3][:32]])
        second.step()
        assert second.hits(keys, context) == 3
        assert second.counts()["chunks load miss"] == 1
        # What came behind the gap was loaded all the same.
        assert second.manager.primary_tier.lookup(keys[5], context) is LookupResult.HIT
        second.finish(context)


def test_a_block_that_cannot_be_loaded_is_tried_once_a_request(daemon: DaemonProcess, name: str, mapped: bool) -> None:
    """There, but not a row: a promotion that is tried again and again would hold the request for ever."""
    keys = keys_of(name, 3)
    with engine(config_of(daemon.endpoint, name=name, mapped=mapped)) as first:
        first.serve(keys[:1])
        first.settle()
        client = first.tier._link.store.client
        client.put_many([key[:32] for key in keys[1:]], [bytes(100), bytes(100)], parent=keys[0][:32])
        first.reset()
        context = first.request(keys)
        assert first.hits(keys, context) == 1
        counts = first.counts()
        assert counts["chunks load layout"] == 2
        assert counts["lookups failed"] >= 1
        first.finish(context)
        assert first.serve(keys) == 1


def test_what_was_promised_is_not_evicted_before_it_is_loaded(name: str) -> None:
    keys, others = keys_of(name, 8), keys_of(name + "others", 400)
    with DaemonProcess(capacity="1MiB", grant="256KiB") as small:
        with engine(config_of(small.endpoint, name=name)) as first:
            first.serve(keys)
            first.settle()
        with (
            engine(config_of(small.endpoint, name=name, lease_s=30)) as second,
            engine(config_of(small.endpoint, name=name, rows=512, queued_stores=512)) as flood,
        ):
            context = second.request(keys)
            tier = second.tier
            for key in keys:
                assert tier.lookup(key, context) is LookupResult.HIT
            tier.on_schedule_end(None)
            wait_until(lambda: second.tier._leases._held)
            flood.serve(others)
            flood.settle()
            assert [tier.lookup(key, context) for key in keys] == [LookupResult.HIT] * 8
            assert second.counts()["leases taken"] >= 1
            tier.on_request_finished(context)
            wait_until(lambda: not second.tier._leases._held)
            flood.serve(keys_of(name + "more", 400))
            flood.settle()
            again = second.request(keys)
            assert LookupResult.HIT not in [tier.lookup(key, again) for key in keys]


def test_a_store_too_small_refuses_and_the_engine_goes_on(name: str) -> None:
    keys = keys_of(name, 200)
    with (
        DaemonProcess(capacity="1MiB", grant="256KiB") as small,
        engine(config_of(small.endpoint, name=name, rows=256, queued_stores=256)) as first,
    ):
        assert first.serve(keys) == 0
        first.settle()
        refused = {what: n for what, n in first.counts().items() if what.startswith("chunks store")}
        assert sum(refused.values()) == 200
        assert 0 < refused["chunks store stored"] < 200


def test_stores_beyond_the_queue_fail_at_once(daemon: DaemonProcess, name: str) -> None:
    with engine(config_of(daemon.endpoint, name=name, rows=64, queued_stores=4, threads=1)) as first:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            for prompt in range(12):
                first.serve(keys_of(f"{name}{prompt}", 4))
            assert time.monotonic() - begin < 5.0
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        first.settle()
        assert first.counts()["chunks store queue_full"] >= 4


# ---------------------------------------------------------------- daemons that go


def test_a_daemon_killed_in_mid_run_costs_hits_and_nothing_else(
    name: str, mapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of(name, 8)
    with DaemonProcess() as dying, caplog.at_level(logging.WARNING, "kvstore_client"):
        with engine(config_of(dying.endpoint, name=name, mapped=mapped, timeout_s=0.5, retry_s=0.2)) as first:
            first.serve(keys)
            first.settle()
            context = first.request(keys_of(name + "b", 6))
            dying.kill()
            begin = time.monotonic()
            for prompt in range(5):
                assert first.serve(keys_of(f"{name}{prompt}", 2)) == 0
            first.settle()
            assert time.monotonic() - begin < 6.0
            wait_until(lambda: first.tier._link.state == "down")
            first.finish(context)
            lost = [record for record in caplog.records if "no store" in record.message]
            assert len(lost) == 1
            begin = time.monotonic()
            assert first.serve(keys_of(name + "c", 2)) == 0
            first.settle()
            assert time.monotonic() - begin < 0.5
            counts = first.counts()
            assert counts["lookups down"] >= 1
            assert counts["chunks store unavailable"] >= 2
            assert counts["up"] == 0
            dying.start()
            wait_until(lambda: first.tier._link.state == "up", 30.0)
            first.serve(keys_of(name + "d", 4))
            first.settle()
            assert first.counts()["chunks store stored"] == 4
            assert len([record for record in caplog.records if "connected to" in record.message]) == 2
        with engine(config_of(dying.endpoint, name=name, mapped=mapped)) as second:
            assert second.serve(keys_of(name + "d", 4)) == 4


def test_a_daemon_killed_between_promise_and_load_fails_the_load(name: str, mapped: bool) -> None:
    keys = keys_of(name, 8)
    with DaemonProcess() as dying:
        with engine(config_of(dying.endpoint, name=name)) as first:
            first.serve(keys)
            first.settle()
        options = {"name": name, "mapped": mapped, "timeout_s": 0.5}
        with engine(config_of(dying.endpoint, **options)) as second:
            context = second.request(keys)
            end = time.monotonic() + 10.0
            while any(second.tier.lookup(key, context) is LookupResult.RETRY for key in keys):
                assert time.monotonic() < end
                second.tier.on_schedule_end(None)
            for key in keys:
                assert second.manager.lookup(key, context) is LookupResult.HIT_PENDING
            dying.kill()
            time.sleep(0.3)
            second.step()
            assert second.hits(keys, context) == 0
            second.settle()
            second.compute(keys, context)
            assert second.hits(keys, context) == 8
            second.finish(context)


def test_a_hung_daemon_never_holds_the_scheduler(name: str, mapped: bool) -> None:
    keys = keys_of(name, 4)
    with DaemonProcess() as hung:
        options = {"name": name, "mapped": mapped, "timeout_s": 0.5, "lookup_timeout_s": 0.2, "job_timeout_s": 1.0}
        with engine(config_of(hung.endpoint, **options)) as first:
            first.serve(keys)
            first.settle()
            os.kill(hung.pid, signal.SIGSTOP)
            slowest = 0.0
            try:
                for prompt in range(6):
                    context = first.request(keys_of(f"{name}{prompt}", 3))
                    for _ in range(40):
                        begin = time.monotonic()
                        for key in keys_of(f"{name}{prompt}", 3):
                            first.manager.lookup(key, context)
                        first.step()
                        slowest = max(slowest, time.monotonic() - begin)
                        time.sleep(0.01)
                    assert first.hits(keys_of(f"{name}{prompt}", 3), context) == 0
                    first.compute(keys_of(f"{name}{prompt}", 3), context)
                    first.finish(context)
                first.settle()
            finally:
                os.kill(hung.pid, signal.SIGCONT)
            assert slowest < 0.3
            wait_until(lambda: first.tier._link.state == "up", 20.0)


def test_a_lookup_without_an_answer_is_a_miss_in_time(name: str) -> None:
    keys = keys_of(name, 4)
    options = {"name": name, "mapped": False, "timeout_s": 4.0, "lookup_timeout_s": 0.2}
    with DaemonProcess() as hung, engine(config_of(hung.endpoint, **options)) as first:
        first.serve(keys)
        first.settle()
        first.reset()
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            context = first.request(keys)
            begin = time.monotonic()
            assert first.hits(keys, context) == 0
            assert 0.15 < time.monotonic() - begin < 1.5
            assert first.counts()["lookups timeout"] >= 1
            first.finish(context)
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        assert first.serve(keys) == 4


def test_an_engine_starts_without_a_daemon_and_finds_it_later(name: str) -> None:
    daemon = DaemonProcess()
    config = config_of(daemon.endpoint, name=name, retry_s=0.2)
    with engine(config, connected=False) as first:
        assert first.serve(keys_of(name, 3)) == 0
        wait_until(lambda: first.tier._link.state == "down", 60.0)
        with daemon:
            wait_until(lambda: first.tier._link.state == "up", 20.0)
            assert first.serve(keys_of(name + "b", 3)) == 0
            first.settle()
            assert first.counts()["chunks store stored"] == 3
            first.manager.shutdown()


# ---------------------------------------------------------------- draining, settings, metrics


def test_a_reset_waits_for_transfers_and_keeps_the_store(daemon: DaemonProcess, name: str) -> None:
    keys = keys_of(name, 12)
    with engine(config_of(daemon.endpoint, name=name, threads=1)) as first:
        for prompt in range(4):
            first.serve(keys_of(f"{name}{prompt}", 3))
        first.reset()
        assert not first.tier._jobs.pending()
        first.serve(keys)
        first.settle()
        first.reset()
        assert first.serve(keys) == 12


def test_a_reset_for_new_weights_leaves_nothing_of_the_old_ones(daemon: DaemonProcess, name: str, mapped: bool) -> None:
    """``on_reset``: who reset joins the next generation, who did not finds and stores nothing any more."""
    keys, options = keys_of(name, 6), {"name": name, "on_reset": "invalidate", "mapped": mapped}
    with engine(config_of(daemon.endpoint, **options)) as one, engine(config_of(daemon.endpoint, **options)) as other:
        one.serve(keys)
        one.settle()
        one.reset()
        assert one.serve(keys) == 0
        one.settle()
        counts = one.counts()
        assert counts["chunks store stored"] == 12
        assert other.serve(keys) == 0
        other.settle()
        assert other.counts()["chunks store stale_namespace"] == 6
        other.reset()
        assert other.serve(keys) == 6
        other.settle()


def test_settings_that_are_wrong_are_named(daemon: DaemonProcess) -> None:
    with (
        pytest.raises(InvalidArgument, match="unknown setting 'endpont' .did you mean 'endpoint'.*known are endpoint"),
        engine(config_of(daemon.endpoint, endpont="x")),
    ):
        pass
    with pytest.raises(InvalidArgument, match="codec 'kivi4' is lossy"):
        KVStoreTier.build_metric_definitions({"type": "KVStoreTier", "module_path": "m", "codec": "kivi4"})


def test_an_unknown_revision_is_said_once_or_refused(
    daemon: DaemonProcess, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvstore_client"):
        with engine(config_of(daemon.endpoint, name=name, unknown_revision="warn")) as first:
            first.serve(keys_of(name, 2))
        assert len([record for record in caplog.records if "no revision of the weights" in record.message]) == 1
    with (
        pytest.raises(InvalidArgument, match="no revision of the weights of 'tiny'"),
        engine(config_of(daemon.endpoint, name=name, unknown_revision="refuse")),
    ):
        pass
    with engine(config_of(daemon.endpoint, name=name, unknown_revision="refuse", revision="r1")) as known:
        assert known.tier._link.store.namespace.revision == "r1"


def test_metrics_are_declared(daemon: DaemonProcess, name: str) -> None:
    config = config_of(daemon.endpoint, name=name)
    tier: Any = config.extra_config["secondary_tiers"][0]
    definitions = SecondaryTierFactory.get_tier_class(tier).build_metric_definitions(tier)
    with engine(config) as first:
        first.serve(keys_of(name, 3))
        first.settle()
        first.serve(keys_of(name + "b", 3))
        stats = first.tier.get_stats()
        for metric, values in stats._values.items():
            for labels in values:
                assert len(labels) == len(definitions[metric].labelnames), metric
        assert set(first.tier.config_info()) == set(KVStoreTier.config_info_keys(tier))


# ---------------------------------------------------------------- random operations

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["serve", "serve", "serve", "other", "remove", "reset", "restart"]),
        st.integers(0, 4),
        st.integers(1, 10),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS, codec=st.sampled_from(["raw", "lossless"]), through=st.booleans(), salt=st.integers(0))
def test_every_byte_that_is_loaded_is_what_was_stored(
    daemon: DaemonProcess, operations: list[tuple[str, int, int]], codec: str, through: bool, salt: int
) -> None:
    """Engines with twelve rows each, that come and go, on a store from which blocks vanish; ``serve`` compares."""
    options = {"name": f"random-{salt}", "codec": codec, "mapped": through, "rows": 12, "queued_stores": 64}
    with (
        engine(config_of(daemon.endpoint, **options)) as one,
        engine(config_of(daemon.endpoint, **options)) as other,
    ):
        for what, prompt, blocks in operations:
            keys = keys_of(f"{salt}-{prompt}", blocks)
            if what == "serve":
                one.serve(keys)
            elif what == "other":
                other.serve(keys)
            elif what == "remove":
                one.tier._link.store.client.remove([keys[-1][:32]])
            elif what == "reset":
                one.reset()
            else:
                with engine(config_of(daemon.endpoint, **options)) as third:
                    third.serve(keys)
        one.settle()
        other.settle()
    with engine(config_of(daemon.endpoint, **options | {"rows": 64})) as fresh:
        served = [prompt for what, prompt, _ in operations if what in ("serve", "other", "restart")]
        for prompt in set(served):
            keys = keys_of(f"{salt}-{prompt}", 10)
            there = [*fresh.tier._link.store.client.exists([key[:32] for key in keys]), False]
            assert fresh.serve(keys) == there.index(False)
        counts = fresh.counts()
        assert not [what for what in counts if what.startswith("chunks load") and what != "chunks load loaded"]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_engines_at_once_on_a_small_store_whose_daemon_dies_load_no_wrong_byte(name: str, codec: str) -> None:
    """Blocks are evicted all the time, and the daemon is killed again and again; ``serve`` compares every byte."""
    options = {"name": name, "codec": codec, "rows": 24, "queued_stores": 64, "timeout_s": 0.5, "retry_s": 0.1}
    stop = threading.Event()
    loaded, wrong = Counter[str](), list[BaseException]()

    def run(number: int, endpoint: str) -> None:
        rng = random.Random(number)
        try:
            with engine(config_of(endpoint, **options, mapped=number % 2 == 0)) as running:
                while not stop.is_set():
                    running.serve(keys_of(f"{name}{rng.randrange(40)}", rng.randrange(1, 12)))
                    loaded["blocks"] += int(running.counts().get("chunks load loaded", 0))
                running.settle()
        except BaseException as error:
            wrong.append(error)

    with DaemonProcess(capacity="2MiB", grant="512KiB") as dying:
        threads = [threading.Thread(target=run, args=(number, dying.endpoint)) for number in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            time.sleep(3.0)
            dying.restart()
        time.sleep(3.0)
        stop.set()
        for thread in threads:
            thread.join(60.0)
        assert not wrong, wrong
        assert loaded["blocks"] > 100
