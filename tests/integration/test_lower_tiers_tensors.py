"""Tensor stores of a daemon that has a tier below DRAM: a real daemon behind a relay that keeps blocks for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from daemon_process import DaemonProcess
from fakes.lower_tier import LowerTier, other_process
from tensor_blocks import decoded, filled, kv_of, same

from kvstore.protocol.messages import PutStatus, Reason
from kvstore_client import ProtocolMismatch
from kvstore_client.tensors import AsyncTensorStore, Failure, TensorStore
from kvstore_kernels.layout import KVLayout

BLOCKS = 40
"""More than are held at a time."""
SMALL = KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="bfloat16", block_tokens=64)
Open = Callable[..., TensorStore]


@pytest.fixture(autouse=True)
def _relay_is_no_daemon_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_client.link.probe", other_process)


@pytest.fixture
def tier(daemon: DaemonProcess, tmp_path: Path, stack: ExitStack) -> LowerTier:
    return stack.enter_context(LowerTier(daemon.endpoint, tmp_path / "relay.sock"))


@pytest.fixture
def open_store(tier: LowerTier, namespace: str, stack: ExitStack) -> Open:
    """Makes tensor stores of the relay, in the test's namespace."""

    def make(codec: str = "kivi4", **options: Any) -> TensorStore:
        options = {"name": namespace, "endpoint": tier.endpoint, "timeout": 10.0, **options}
        store = stack.enter_context(TensorStore(SMALL, codec, **options))
        tier.namespace = store.namespace
        return store

    return make


def keys_of(store: Any) -> list[bytes]:
    return list(store.chain_keys(np.arange(BLOCKS * SMALL.block_tokens)))


@pytest.mark.parametrize("codec", ["kivi4", "lossless"])
def test_blocks_come_up_by_one_request_and_are_decoded_in_place(tier: LowerTier, open_store: Open, codec: str) -> None:
    store = open_store(codec, mapped=True)
    kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
    assert store.save_blocks(keys, kv).stored == BLOCKS
    # Of some blocks in the middle, and of all from one on.
    tier.sink([*keys[3:5], *keys[20:]])
    tier.asked.clear()
    target = filled(kv)
    assert store.load_blocks(keys[:3], target).loaded == 3
    assert not tier.asked
    before = store.client.stats().lookups
    loaded = store.load_blocks(keys, target)
    assert (loaded.loaded, loaded.failure) == (BLOCKS, None)
    assert same(target, decoded(kv, SMALL, codec))
    assert tier.brought_up == [[*keys[3:5], *keys[20:]]]
    assert tier.asked.keys() == {"Prefetch", "Stats"}
    after = store.client.stats().lookups
    assert (after.get_keys - before.get_keys, after.get_hits - before.get_hits) == (BLOCKS, BLOCKS)


def test_blocks_that_are_nowhere_or_do_not_come_up_in_time_end_a_load(tier: LowerTier, open_store: Open) -> None:
    store = open_store(mapped=True, timeout=0.5)
    kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
    store.save_blocks(keys[:10], kv)
    loaded = store.load_blocks(keys, filled(kv))
    assert (loaded.loaded, loaded.failure) == (10, Failure.MISS)
    assert tier.asked["Prefetch"] == 1
    tier.sink(keys[5:10])
    tier.silent = True
    begin = time.monotonic()
    loaded = store.load_blocks(keys, filled(kv))
    assert (loaded.loaded, loaded.failure) == (5, Failure.MISS)
    assert time.monotonic() - begin < 5.0


def test_match_has_blocks_begin_to_come_up(tier: LowerTier, open_store: Open) -> None:
    store = open_store(mapped=True)
    kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
    store.save_blocks(keys, kv)
    tier.sink(keys[30:])
    found = store.match(keys, prefetch=True)
    assert found.tiers == ["dram"] * 30 + ["ssd"] * 10
    assert store.load_blocks(keys, filled(kv)).loaded == BLOCKS
    assert not tier.brought_up


@pytest.mark.parametrize("way", ["mapped", "socket"])
@pytest.mark.parametrize("codec", ["kivi4", "lossless"])
def test_save_waits_until_blocks_were_written_below(tier: LowerTier, open_store: Open, way: str, codec: str) -> None:
    store = open_store(codec, mapped=way == "mapped")
    kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
    tier.refuse_puts = tier.refuse_slots = 4
    saved = store.save_blocks(keys, kv)
    assert (saved.stored, saved.reasons) == (BLOCKS, {})
    assert (tier.refuse_puts, tier.refuse_slots) == ((4, 0) if way == "mapped" else (0, 4))
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    assert same(target, decoded(kv, SMALL, codec))


@pytest.mark.parametrize("way", ["mapped", "socket"])
def test_save_that_finds_no_room_in_time_is_throttled(
    tier: LowerTier, open_store: Open, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(mapped=way == "mapped", timeout=0.4)
    kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
    tier.refuse_puts = tier.refuse_slots = 1_000_000
    begin = time.monotonic()
    saved = store.save_blocks(keys, kv)
    assert 0.2 < time.monotonic() - begin < 5.0
    assert saved.statuses == (PutStatus.THROTTLED,) * BLOCKS
    assert set(saved.reasons.values()) == {"demoting"}
    assert f"{BLOCKS} records were not stored: demoting" in caplog.text


@pytest.mark.parametrize("way", ["mapped", "socket"])
def test_durable_saves_say_whether_blocks_are_durable(tier: LowerTier, open_store: Open, way: str) -> None:
    store = open_store(mapped=way == "mapped")
    kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
    saved = store.save_blocks(keys[:20], kv, durable=True)
    assert saved.statuses == (PutStatus.STORED,) * 20
    assert saved.raw_bytes == 20 * SMALL.block_bytes
    tier.persists.extend([(PutStatus.THROTTLED, Reason.DEMOTING), (PutStatus.REJECTED, Reason.NOT_DURABLE)])
    saved = store.save_blocks(keys, kv, durable=True)
    assert saved.statuses == (PutStatus.REJECTED,) * BLOCKS
    assert set(saved.reasons.values()) == {"not_durable"}
    assert saved.raw_bytes == 20 * SMALL.block_bytes
    assert store.match(keys).hits == BLOCKS


def test_durable_saves_of_a_daemon_that_is_too_old_store_nothing(
    daemon: DaemonProcess, namespace: str, tmp_path: Path
) -> None:
    with (
        LowerTier(daemon.endpoint, tmp_path / "s", protocol=3, lower_tiers=0) as tier,
        TensorStore(SMALL, "kivi4", name=namespace, endpoint=tier.endpoint) as store,
    ):
        kv, keys = kv_of(SMALL, BLOCKS), keys_of(store)
        with pytest.raises(ProtocolMismatch, match="upgrade the daemon"):
            store.save_blocks(keys, kv, durable=True)
        assert store.match(keys).hits == 0
        assert store.save_blocks(keys, kv).stored == BLOCKS


def test_asyncio_stores_do_the_same(tier: LowerTier, namespace: str) -> None:
    kv = kv_of(SMALL, BLOCKS)

    async def work() -> None:
        async with AsyncTensorStore(SMALL, "kivi4", name=namespace, endpoint=tier.endpoint) as store:
            assert store.client.mapped
            tier.namespace = store.namespace
            keys = keys_of(store)
            tier.refuse_slots = 2
            saved = await store.save_blocks(keys, kv, durable=True)
            assert saved.stored == BLOCKS
            await asyncio.to_thread(tier.sink, keys[30:])
            assert (await store.match(keys, prefetch=False)).tiers[-1] == "ssd"
            target = torch.full_like(kv, 7)
            assert (await store.load_blocks(keys, target)).loaded == BLOCKS
            assert same(target, decoded(kv, SMALL, "kivi4"))
            assert tier.brought_up == [keys[30:]]

    asyncio.run(work())
