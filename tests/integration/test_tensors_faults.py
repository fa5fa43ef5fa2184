"""Tensor stores when something goes wrong in the middle: daemons that die, slots that change, interrupts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from daemon_process import DaemonProcess, child_environment, wait_until, wait_until_nothing_is_lent
from tensor_blocks import LAYOUT, block_of, decoded, filled, intercept, kv_of, pages_in, same

from kvstore.errors import ConnectionLost, DaemonUnavailable
from kvstore.protocol.messages import PutStatus
from kvstore_client.mapped_batches import HeldBatch
from kvstore_client.tensors import AsyncTensorStore, Failure, TensorStore
from kvstore_kernels.layout import KVLayout

BLOCKS = 12
LARGE = KVLayout(num_layers=8, num_kv_heads=4, head_dim=128, dtype="bfloat16", block_tokens=64)
"""Blocks of 1 MiB: each is a group of its own."""


def chain(store: TensorStore | AsyncTensorStore, blocks: int = BLOCKS, seed: int = 0) -> list[bytes]:
    return store.chain_keys(np.random.default_rng(seed).integers(0, 1 << 17, blocks * store.layout.block_tokens))


def nothing_is_held(store: TensorStore | AsyncTensorStore) -> bool:
    session = store.client._session.mapped
    return session is None or (
        len(session.free_hazards) == 64 and not session.hazard_bytes and not session.views and not session.batches
    )


# ---------------------------------------------------------------- daemons that go away


@pytest.mark.parametrize("mapped", [True, False])
def test_a_daemon_that_starts_again_is_saved_to_anew(mapped: bool) -> None:
    with DaemonProcess() as daemon, TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, mapped=mapped) as store:
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        assert store.save_blocks(keys, kv).stored == BLOCKS
        daemon.restart()
        loaded = store.load_blocks(keys, filled(kv))
        assert (loaded.loaded, loaded.failure) == (0, Failure.MISS)
        assert store.save_blocks(keys, kv).stored == BLOCKS
        target = filled(kv)
        assert store.load_blocks(keys, target).loaded == BLOCKS
        assert same(target, decoded(kv, LAYOUT, "kivi4"))
        assert nothing_is_held(store)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_daemon_that_is_killed_while_blocks_are_saved(mapped: bool) -> None:
    """What it had not answered for is stored in the next one."""
    with DaemonProcess() as daemon, TensorStore(LARGE, "int8", endpoint=daemon.endpoint, mapped=mapped) as store:
        kv, keys = kv_of(LARGE, 8), chain(store, 8)
        calls = 0

        def restart_once() -> None:
            nonlocal calls
            calls += 1
            if calls == (2 if mapped else 1):
                daemon.restart()

        intercept(store, encode=restart_once)
        saved = store.save_blocks(keys, kv)
        assert saved.complete
        assert calls >= (2 if mapped else 1)
        target = filled(kv)
        loaded = store.load_blocks(keys, target)
        # Answered for and then lost with the daemon, or stored in the new one: never half of a block.
        for index in range(loaded.loaded):
            assert same(block_of(target, LARGE, index), decoded(block_of(kv, LARGE, index), LARGE, "int8"))
        assert store.save_blocks(keys, kv).complete
        assert store.load_blocks(keys, target).loaded == 8
        assert nothing_is_held(store)


def test_a_daemon_that_is_killed_while_blocks_are_loaded() -> None:
    with DaemonProcess() as daemon, TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint) as store:
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        store.save_blocks(keys, kv)
        intercept(store, decode=daemon.restart)
        target = filled(kv)
        # The old memory is still mapped and right.
        assert store.load_blocks(keys, target).loaded == BLOCKS
        assert same(target, decoded(kv, LAYOUT, "kivi4"))
        wait_until(lambda: store.client.ping() >= 0)
        assert store.load_blocks(keys, target).failure is Failure.MISS


def test_without_a_daemon_there_is_an_error_and_nothing_held() -> None:
    with DaemonProcess() as daemon:
        store = TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, timeout=1.0)
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        daemon.terminate()
        for call in (lambda: store.save_blocks(keys, kv), lambda: store.load_blocks(keys, filled(kv))):
            with pytest.raises((DaemonUnavailable, ConnectionLost)):
                call()
        store.close()
        with pytest.raises(ConnectionLost):
            store.load_blocks(keys, filled(kv))


# ---------------------------------------------------------------- slots that change


@pytest.fixture
def verifying(stack: ExitStack) -> DaemonProcess:
    """A daemon all of whose reads verify checksums, and that expects clients to find damage."""
    return stack.enter_context(DaemonProcess("--verify", "always", expected_errors=("corrupt_record",)))


def slot_of(store: TensorStore, key: bytes) -> Any:
    """The bytes of the slot that a record lies in, writable: what a client does that must not."""
    session = store.client._session.mapped
    assert session is not None
    with HeldBatch(session, [key], store.part, sure=True) as held:
        assert held.count == 1
        begin = int(held.payloads()[0]) - session.arena_address - 256
    return np.frombuffer(session._arena_map, np.uint8)[begin:]


@pytest.mark.parametrize("where", ["header", "payload"])
def test_a_slot_that_is_overwritten_while_it_is_decoded_is_no_answer(verifying: DaemonProcess, where: str) -> None:
    with TensorStore(LAYOUT, "kivi4", endpoint=verifying.endpoint) as store:
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        store.save_blocks(keys, kv)
        bad, offset = 5, 60 if where == "header" else 1000
        slot = slot_of(store, keys[bad])

        def overwrite() -> None:
            slot[offset] ^= 1

        intercept(store, decode=overwrite)
        target = filled(kv)
        loaded = store.load_blocks(keys, target)
        assert (loaded.loaded, loaded.failure) == (bad, Failure.CORRUPT)
        expected = decoded(kv, LAYOUT, "kivi4")
        assert same(target[:, :, : 64 * bad], expected[:, :, : 64 * bad])
        assert store.client.corrupt_records == 1
        # The daemon hears of it, looks for itself, and drops the block.
        wait_until(lambda: store.client.exists(keys) == [index != bad for index in range(BLOCKS)])
        assert nothing_is_held(store)


def test_a_damaged_header_is_found_before_anything_is_decoded(verifying: DaemonProcess) -> None:
    with TensorStore(LAYOUT, "kivi4", endpoint=verifying.endpoint) as store:
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        store.save_blocks(keys, kv)
        slot_of(store, keys[3])[130] ^= 1
        kernels = intercept(store)
        loaded = store.load_blocks(keys, filled(kv))
        assert (loaded.loaded, loaded.failure) == (3, Failure.CORRUPT)
        assert kernels.decoded == 3
        wait_until(lambda: not store.client.exists([keys[3]])[0])


def test_blocks_that_are_evicted_while_they_are_decoded_are_still_right() -> None:
    """Their slots are held: the daemon does not lend them to anybody before."""
    with (
        DaemonProcess("--slab", "128KiB", capacity="1MiB", grant="512KiB") as daemon,
        TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint) as store,
        TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint) as other,
    ):
        kv, keys = kv_of(LAYOUT, 8), chain(store, 8)
        assert store.save_blocks(keys, kv).stored == 8
        flood = kv_of(LAYOUT, 40, seed=1)

        def evict() -> None:
            for seed in range(1, 4):
                other.save_blocks(chain(other, 40, seed), flood)

        # Of the first call; what other clients do meanwhile happens before the result is looked at.
        intercept(store, decode=evict)
        target = filled(kv)
        loaded = store.load_blocks(keys, target)
        assert loaded.loaded == 8
        assert same(target, decoded(kv, LAYOUT, "kivi4"))
        again = store.load_blocks(keys, target)
        assert again.loaded < 8
        assert again.failure is Failure.MISS


# ---------------------------------------------------------------- hazards, ring, reach


def test_where_all_hazards_are_taken_blocks_are_received(
    daemon: DaemonProcess, namespace: str, stack: ExitStack
) -> None:
    store = stack.enter_context(TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace))
    kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
    store.save_blocks(keys, kv)
    session = store.client._session.mapped
    assert session is not None
    taken, session.free_hazards[:] = list(session.free_hazards), []
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    assert same(target, decoded(kv, LAYOUT, "kivi4"))
    session.free_hazards[:] = taken[:5]
    assert store.load_blocks(keys, filled(kv)).loaded == BLOCKS
    session.free_hazards[:] = taken


def test_more_held_bytes_than_allowed_are_received(daemon: DaemonProcess, namespace: str, stack: ExitStack) -> None:
    store = stack.enter_context(TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace))
    kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
    store.save_blocks(keys, kv)
    session = store.client._session.mapped
    assert session is not None
    for limit in (20_000, 1000):
        session.most_hazard_bytes = limit
        target = filled(kv)
        assert store.load_blocks(keys, target).loaded == BLOCKS
        assert same(target, decoded(kv, LAYOUT, "kivi4"))
    assert nothing_is_held(store)


@pytest.mark.parametrize("codec", ["kivi4", "raw", "lossless"])
def test_kernels_that_do_not_reach_slots(
    daemon: DaemonProcess, namespace: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """As those of a device that cannot pin the arena: payloads go through memory of their own."""
    store = stack.enter_context(TensorStore(LAYOUT, codec, endpoint=daemon.endpoint, name=namespace))
    kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
    kv[0, 0, 200] = float("nan")
    intercepted = intercept(store)
    monkeypatch.setattr(intercepted._backend, "reaches", lambda *_: False)
    saved = store.save_blocks(keys, kv)
    assert saved.stored == BLOCKS
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    for index in range(BLOCKS):
        block = block_of(kv, LAYOUT, index)
        assert same(block_of(target, LAYOUT, index), block if index in saved.void else decoded(block, LAYOUT, codec))
    assert nothing_is_held(store)
    wait_until_nothing_is_lent(store.client.stats)


def test_a_store_without_slots_to_lend_is_sent_to(stack: ExitStack) -> None:
    """Another client holds all that may be granted to it."""
    daemon = stack.enter_context(DaemonProcess(capacity="16MiB", grant="2MiB"))
    store = stack.enter_context(TensorStore(LARGE, "raw", endpoint=daemon.endpoint))
    kv, keys = kv_of(LARGE, 4), chain(store, 4)
    saved = store.save_blocks(keys, kv)
    assert saved.complete, saved.reasons
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == 4
    assert same(target, kv)


# ---------------------------------------------------------------- threads


def test_threads_of_one_store(daemon: DaemonProcess, namespace: str, stack: ExitStack) -> None:
    store = stack.enter_context(TensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(6):
                keys = chain(store, BLOCKS, 100 * seed + turn)
                kv = kv_of(LAYOUT, BLOCKS, seed=100 * seed + turn)
                source = pages_in(kv, LAYOUT, "kv page token head dim", 16, spare=0, seed=seed)
                assert store.save_blocks(keys, source.kv, pages=source.pages).complete
                target = filled(kv)
                assert store.load_blocks(keys, target).loaded == BLOCKS
                assert same(target, decoded(kv, LAYOUT, "kivi4"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert nothing_is_held(store)
    wait_until_nothing_is_lent(store.client.stats)


# ---------------------------------------------------------------- interrupts

SCRIPT = """
import random, signal, sys, time
import numpy as np, torch
from kvstore_client.tensors import TensorStore
from kvstore_kernels.layout import KVLayout

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

what, chance = sys.argv[2], random.Random(7)
layout = KVLayout(4, 4, 128, "bfloat16", 64)
store = TensorStore(layout, "kivi4", name="interrupted " + what, endpoint=sys.argv[1], timeout=5.0, mapped=True)
kv = torch.randn(4, 2, 64 * 8, 4, 128).to(torch.bfloat16)
kv[0, 0, 70] = float("nan")
keys = store.chain_keys(range(64 * 8))
assert store.save_blocks(keys, kv).stored == 8
spans = []
for turn in range(5):
    begin = time.perf_counter()
    if what == "save":
        store.save_blocks(store.chain_keys([1000 + turn, *range(64 * 8 - 1)]), kv)
    else:
        store.load_blocks(keys, torch.empty_like(kv))
    spans.append(time.perf_counter() - begin)
span = min(spans)
signal.signal(signal.SIGALRM, interrupt)
hits = 0
for turn in range(150):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + chance.random() * 1.5 * span)
        if what == "save":
            store.save_blocks(store.chain_keys([turn, *range(64 * 8 - 1)]), kv)
        else:
            store.load_blocks(keys, torch.empty_like(kv))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
store.client.ping()
session = store.client._session.mapped
assert session.batches == {} and session.views == {}, "held by nobody"
assert sorted(session.free_hazards) == list(range(64)) and session.hazard_bytes == 0
end = time.monotonic() + 8
while store.client.stats().dram.granted_bytes and time.monotonic() < end:
    time.sleep(0.4)
print(hits, store.client.stats().dram.granted_bytes)
store.close()
"""


@pytest.mark.parametrize("what", ["save", "load"])
def test_an_interrupt_leaves_nothing_lent_or_held(daemon: DaemonProcess, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, daemon.endpoint, what],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    hits, granted_bytes = map(int, done.stdout.split())
    assert hits > 20
    assert granted_bytes == 0


# ---------------------------------------------------------------- asyncio


@pytest.mark.parametrize("mapped", [True, False])
async def test_the_asyncio_store_does_the_same(daemon: DaemonProcess, namespace: str, mapped: bool) -> None:
    async with AsyncTensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace, mapped=mapped) as store:
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        kv[1, 1, 130] = float("nan")
        saved = await store.save_blocks(keys, kv)
        assert (saved.stored, saved.void) == (BLOCKS, (2,))
        targets = [filled(kv) for _ in range(4)]
        reports = await asyncio.gather(*(store.load_blocks(keys, target) for target in targets))
        assert [report.loaded for report in reports] == [BLOCKS] * 4
        expected = decoded(kv, LAYOUT, "kivi4")
        expected[:, :, 128:192] = kv[:, :, 128:192]
        assert all(same(target, expected) for target in targets)
        assert len(await store.match(keys)) == BLOCKS
        assert nothing_is_held(store)


async def test_a_cancelled_save_gives_its_slots_back(daemon: DaemonProcess, namespace: str) -> None:
    async with AsyncTensorStore(LARGE, "kivi4", endpoint=daemon.endpoint, name=namespace, mapped=True) as store:
        kv, keys = kv_of(LARGE, 10), chain(store, 10)
        writing, cancelled = threading.Event(), threading.Event()
        calls = 0

        def wait_in_second_call() -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                writing.set()
                assert cancelled.wait(20)

        kernels = intercept(store, encode=wait_in_second_call)
        save = asyncio.create_task(store.save_blocks(keys, kv))
        assert await asyncio.to_thread(writing.wait, 20)
        save.cancel()
        await asyncio.sleep(0.2)
        assert not save.done(), "it ended while a thread still writes into its slots"
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await save
        assert kernels.encoded < 10
        assert nothing_is_held(store)
        assert 0 < sum(await store.client.exists(keys)) < 10
        saved = await store.save_blocks(keys, kv)
        assert PutStatus.EXISTS in saved.statuses
        assert saved.complete


async def test_a_cancelled_load_lets_go(daemon: DaemonProcess, namespace: str) -> None:
    async with AsyncTensorStore(LAYOUT, "kivi4", endpoint=daemon.endpoint, name=namespace, mapped=True) as store:
        kv, keys = kv_of(LAYOUT, BLOCKS), chain(store)
        await store.save_blocks(keys, kv)
        reading, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            reading.set()
            assert go_on.wait(20)

        intercept(store, decode=wait)
        load = asyncio.create_task(store.load_blocks(keys, filled(kv)))
        assert await asyncio.to_thread(reading.wait, 20)
        load.cancel()
        await asyncio.sleep(0.1)
        assert not nothing_is_held(store)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert nothing_is_held(store)
