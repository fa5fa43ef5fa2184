"""Chains that outgrow the tier, by slots or by bytes, over every path: the beginning stays, and answers are true."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from client_adapter import AnyClient, Connect
from daemon_process import DaemonProcess
from tensor_blocks import kv_of

from kvstore.protocol.messages import PutStatus
from kvstore_client import Client, Namespace
from kvstore_client.tensors import AsyncTensorStore, SaveReport, TensorStore
from kvstore_kernels.layout import KVLayout

KIB = 1 << 10
PAYLOAD = bytes(36 * KIB)
SLAB = ("--slab", "64KiB")
"""Slots leave more of such slabs unused than is granted beside the capacity: they run out before it does."""
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=128, dtype="bfloat16", block_tokens=64)
"""32 KiB a block, and a header."""
BLOCKS = 140
HOW = ["together", "together, unwaited", "one by one", "one by one, unwaited", "one request", "one request, unwaited"]


@pytest.fixture(scope="module", params=["slots", "bytes"])
def daemon(request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    """A tier with room for about 110 blocks, which is short of slots, or of bytes."""
    flags = SLAB if request.param == "slots" else ("--slab", "1MiB")
    with DaemonProcess(*flags, capacity="4MiB", grant="64KiB" if request.param == "slots" else "1MiB") as process:
        yield process


def keys_of(seed: int, blocks: int = BLOCKS) -> list[bytes]:
    return [(seed * 1000 + index + 1).to_bytes(4, "big") * 8 for index in range(blocks)]


def put_all(client: AnyClient, keys: list[bytes], how: str, parent: bytes | None = None) -> tuple[int, int]:
    """Put a chain; how many were stored, and how many not, for want of room."""
    wait = "unwaited" not in how
    datas = [PAYLOAD] * len(keys)
    if how.startswith("together"):
        statuses = client.put_many(keys, datas, parent=parent, wait=wait)
    else:
        request = 1 << 40 if how.startswith("one request") else None
        parents = [parent, *keys]
        statuses = [
            client.put(key, PAYLOAD, parent=above, wait=wait, request=request)
            for key, above in zip(keys, parents, strict=False)
        ]
    done = client.flush()
    if wait:
        assert set(statuses) <= {PutStatus.STORED, PutStatus.REJECTED}
        return statuses.count(PutStatus.STORED), statuses.count(PutStatus.REJECTED)
    assert set(statuses) == {PutStatus.PENDING}
    assert (done.lost, done.exists, done.throttled) == (0, 0, 0)
    assert set(done.reasons) <= {"no_room"}
    return done.stored, done.rejected


@pytest.mark.parametrize("how", HOW)
def test_chain_longer_than_the_tier_keeps_what_was_stored(connect: Connect, how: str):
    client = connect()
    keys = keys_of(1)
    stored, refused = put_all(client, keys, how)
    assert (stored + refused, refused > 0) == (BLOCKS, True)
    assert len(client.match(keys)) == stored == sum(client.exists(keys))
    assert stored >= 90
    # Nothing leaves for what cannot be reached, nor for what goes on behind it.
    more = keys_of(2, 6)
    assert put_all(client, more, how, parent=keys[-1]) == (0, 6)
    assert put_all(client, more, how, parent=keys[stored - 1]) == (0, 6)
    assert len(client.match(keys)) == stored
    # What is of another request does leave, from its end.
    others = keys_of(3, 5)
    assert put_all(client, others, how)[0] == 5 if not how.startswith("one request") else True
    client.clear()


@pytest.mark.parametrize("how", HOW)
def test_chain_that_is_put_in_pieces_keeps_what_was_stored(connect: Connect, how: str):
    client = connect()
    client.clear()
    keys = keys_of(4)
    total = 0
    for begin in range(0, BLOCKS, 20):
        parent = keys[begin - 1] if begin else None
        total += put_all(client, keys[begin : begin + 20], how, parent)[0]
        assert len(client.match(keys)) == total
    assert 90 <= total < BLOCKS
    client.clear()


def test_puts_that_have_nothing_to_do_with_each_other_are_stored_though_they_push_each_other_out(connect: Connect):
    client = connect()
    keys = keys_of(5, 200)
    for key in keys:
        client.put(key, PAYLOAD, wait=False)
    done = client.flush()
    assert (done.stored, done.rejected, done.throttled) == (200, 0, 0)
    there = client.exists(keys)
    assert there == sorted(there), "not the last ones stayed"
    assert sum(there) >= 90
    client.clear()


# ---------------------------------------------------------------- tensors


def save(daemon: DaemonProcess, kind: str, pieces: int, name: str) -> tuple[int, list[SaveReport], int]:
    """Save a chain in so many pieces; hits, reports, and how many blocks are there."""
    mapped = None if kind.endswith("mapped") else False
    options = {"name": name, "endpoint": daemon.endpoint, "mapped": mapped}
    kv, each = kv_of(LAYOUT, BLOCKS), BLOCKS // pieces
    tokens = range(BLOCKS * LAYOUT.block_tokens)

    def arguments(keys: list[bytes], piece: int) -> tuple[list[bytes], torch.Tensor, bytes | None]:
        begin = piece * each
        part = kv[:, :, begin * LAYOUT.block_tokens : (begin + each) * LAYOUT.block_tokens]
        return keys[begin : begin + each], part, keys[begin - 1] if begin else None

    if kind.startswith("sync"):
        with TensorStore(LAYOUT, "raw", **options) as store:
            keys = store.chain_keys(tokens)
            reports = []
            for piece in range(pieces):
                some, part, parent = arguments(keys, piece)
                reports.append(store.save_blocks(some, part, parent=parent))
            result = len(store.match(keys)), reports, sum(store.client.exists(keys))
            store.client.clear()
            return result

    async def run() -> tuple[int, list[SaveReport], int]:
        async with AsyncTensorStore(LAYOUT, "raw", **options) as store:
            keys = store.chain_keys(tokens)
            reports = []
            for piece in range(pieces):
                some, part, parent = arguments(keys, piece)
                reports.append(await store.save_blocks(some, part, parent=parent))
            result = len(await store.match(keys)), reports, sum(await store.client.exists(keys))
            await store.client.clear()
            return result

    return asyncio.run(run())


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("kind", ["sync, mapped", "sync, socket", "asyncio, mapped", "asyncio, socket"])
def test_save_longer_than_the_tier_keeps_what_it_reports(daemon: DaemonProcess, namespace: str, kind: str, pieces: int):
    hits, reports, there = save(daemon, kind, pieces, namespace)
    statuses = [status for report in reports for status in report.statuses]
    assert statuses == [PutStatus.STORED] * hits + [PutStatus.REJECTED] * (BLOCKS - hits)
    assert {reason for report in reports for reason in report.reasons.values()} == {"no_room"}
    assert not reports[-1].complete
    assert 90 <= hits == there


def test_save_of_blocks_that_the_codec_cannot_hold_goes_on_behind_them(daemon: DaemonProcess, namespace: str):
    """In a full tier: what goes on behind a block that is not there yet would find no room."""
    kv = kv_of(LAYOUT, 6)
    for block in (1, 2, 4):
        kv[0, 0, block * LAYOUT.block_tokens, 0, 0] = float("nan")
    with TensorStore(LAYOUT, "int8", name=namespace, endpoint=daemon.endpoint) as store:
        for seed in range(3):
            filler = store.chain_keys(range(seed, seed + BLOCKS * LAYOUT.block_tokens))
            store.save_blocks(filler, kv_of(LAYOUT, BLOCKS))
        keys = store.chain_keys(range(7, 7 + 6 * LAYOUT.block_tokens))
        saved = store.save_blocks(keys, kv)
        assert saved.complete, saved
        assert (saved.void, len(store.match(keys))) == ((1, 2, 4), 6)
        store.client.clear()


# ---------------------------------------------------------------- several at a time


def put_until_answered(client: Client, keys: list[bytes], begin: int, end: int, request: int) -> list[PutStatus]:
    """Put blocks of a chain, throttled ones again: what is put behind a gap cannot be reached."""
    statuses: list[PutStatus] = []
    give_up = time.monotonic() + 20
    while (at := begin + len(statuses)) < end:
        assert time.monotonic() < give_up, "throttled for good"
        parent = keys[at - 1] if at else None
        answers = client.put_many(keys[at:end], [PAYLOAD] * (end - at), parent=parent, request=request)
        throttled = answers.index(PutStatus.THROTTLED) if PutStatus.THROTTLED in answers else len(answers)
        statuses += answers[:throttled]
    return statuses


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "socket"])
def test_two_engines_that_save_at_once_both_end_with_true_answers(daemon: DaemonProcess, namespace: str, mapped: bool):
    ends: dict[int, tuple[list[bytes], list[PutStatus]]] = {}
    begin = threading.Barrier(2)

    def engine(number: int) -> None:
        with Client(daemon.endpoint, namespace=Namespace(name=namespace), mapped=mapped or False) as client:
            keys = keys_of(10 + number)
            begin.wait(20)
            statuses: list[PutStatus] = []
            request = client.match(keys).request
            for at in range(0, BLOCKS, 4):
                statuses += put_until_answered(client, keys, at, at + 4, request)
            ends[number] = keys, statuses

    threads = [threading.Thread(target=engine, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(ends) == {0, 1}, "one of them hangs"
    with ExitStack() as stack:
        client = stack.enter_context(Client(daemon.endpoint, namespace=Namespace(name=namespace)))
        found = {number: len(client.match(keys)) for number, (keys, _) in ends.items()}
        there = {number: sum(client.exists(keys)) for number, (keys, _) in ends.items()}
        assert found == there, "what is there cannot be reached"
        assert max(found.values()) >= 40
        for number, (_, statuses) in ends.items():
            # Leading ones were stored; the other engine may have pushed some of them out since.
            stored = statuses.count(PutStatus.STORED)
            assert stored >= found[number] > -1
            assert statuses[:1] == [PutStatus.STORED]
        client.clear()
        assert client.verify().problems == []
