"""Tensors through a live daemon: what is loaded is what the codec's reference makes of what was saved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from daemon_process import DaemonProcess, wait_until_nothing_is_lent
from tensor_blocks import (
    LATENT,
    LAYOUT,
    Pages,
    block_of,
    decoded,
    filled,
    header_of,
    intercept,
    kv_of,
    pages_in,
    put_record,
    same,
)

from kvstore.errors import InvalidArgument
from kvstore.protocol.messages import PutStatus
from kvstore_client import Client
from kvstore_client.tensors import Failure, TensorStore, store_layout
from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.paged import PagedKV

Open = Callable[..., TensorStore]
BLOCKS = 7


@pytest.fixture(params=["mapped", "socket"])
def mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "mapped")


@pytest.fixture
def open_store(daemon: DaemonProcess, namespace: str, stack: ExitStack, mapped: bool) -> Open:
    """Makes tensor stores of the test's namespace; ``mapped`` as the test's unless given."""

    def make(layout: Any = LAYOUT, codec: str = "kivi4", **options: Any) -> TensorStore:
        options = {"name": namespace, "endpoint": daemon.endpoint, "mapped": mapped, **options}
        return stack.enter_context(TensorStore(layout, codec, **options))

    return make


def keys_of(store: TensorStore, blocks: int = BLOCKS, seed: int = 0) -> list[bytes]:
    tokens = np.random.default_rng(seed).integers(0, 1 << 17, blocks * store.layout.block_tokens + 3)
    return store.chain_keys(tokens)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("codec", list(CODECS))
def test_what_is_loaded_is_what_the_codec_makes_of_it(open_store: Open, codec: str) -> None:
    store = open_store(LAYOUT, codec)
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    saved = store.save_blocks(keys, kv)
    assert saved.statuses == (PutStatus.STORED,) * BLOCKS
    assert saved.complete
    assert saved.void == ()
    assert saved.raw_bytes == BLOCKS * LAYOUT.block_bytes
    reference = get_codec(codec)
    sizes = [sum(map(len, reference.encode(block_of(kv, LAYOUT, index), LAYOUT).sections)) for index in range(BLOCKS)]
    if reference.section_bytes(LAYOUT) is not None:
        assert saved.stored_bytes == sum(sizes)
    else:
        assert saved.stored_bytes == pytest.approx(sum(sizes), rel=0.01)
    target = filled(kv)
    loaded = store.load_blocks(keys, target)
    assert (len(loaded), loaded.failure, loaded.detail) == (BLOCKS, None, "")
    assert loaded.fidelities == (reference.fidelity,) * BLOCKS
    assert loaded.lineage == reference.fidelity
    assert (loaded.raw_bytes, loaded.stored_bytes) == (saved.raw_bytes, saved.stored_bytes)
    assert same(target, decoded(kv, LAYOUT, codec))
    assert len(store.match(keys)) == BLOCKS


@pytest.mark.parametrize("codec", ["raw", "lossless", "kivi4"])
def test_both_ways_store_the_same_records(open_store: Open, codec: str) -> None:
    kv = kv_of(LAYOUT, BLOCKS)
    records = []
    for way, name in ((True, "one way"), (False, "the other")):
        store = open_store(LAYOUT, codec, mapped=way, name=name, model=codec, unknown_revision="ignore")
        store.client.clear()
        keys = keys_of(store)
        store.save_blocks(keys, kv)
        found = store.client._run(store.client._operations.get_records(keys, 0, None))
        records.append([(header.section_bytes, header.payload_checksum, bytes(data)) for header, data in found])
        assert [header.parent_key for header, _ in found] == [bytes(32), *keys[:-1]]
        assert {header.token_count for header, _ in found} == {LAYOUT.block_tokens}
    assert records[0] == records[1]


def test_mapped_stores_send_no_blocks(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(mapped=True)
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    sent: list[str] = []
    asking = store.client._ask

    def ask(ask: Any, deadline: float) -> Any:
        sent.append(ask.type.__name__)
        return asking(ask, deadline)

    monkeypatch.setattr(store.client, "_ask", ask)
    assert store.save_blocks(keys, kv).stored == BLOCKS
    assert set(sent) <= {"Reserve", "Ping"}
    sent.clear()
    assert store.load_blocks(keys, filled(kv)).loaded == BLOCKS
    assert store.save_blocks(keys, kv).exists == BLOCKS
    assert sent == []


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(open_store: Open, dtype: str) -> None:
    layout = KVLayout(2, 2, 128, dtype, 64)
    store = open_store(layout, "kivi4")
    kv, keys = kv_of(layout, 3), keys_of(store, 3)
    assert store.save_blocks(keys, kv).complete
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == 3
    assert same(target, decoded(kv, layout, "kivi4"))


def test_numpy_arrays(open_store: Open) -> None:
    layout = KVLayout(2, 2, 64, "float32", 64)
    store = open_store(layout, "int8")
    kv, keys = kv_of(layout, 3), keys_of(store, 3)
    assert store.save_blocks(keys, kv.numpy()).complete
    target = np.full(kv.shape, 7, np.float32)
    assert store.load_blocks(keys, target).loaded == 3
    assert same(torch.from_numpy(target), decoded(kv, layout, "int8"))
    target.flags.writeable = False
    with pytest.raises(InvalidArgument, match="read-only"):
        store.load_blocks(keys, target)


def test_target_that_would_hold_something_else_is_refused(open_store: Open) -> None:
    """Read-only behind a paged cache, twice the same memory, another byte order, another order of pages."""
    layout = KVLayout(2, 2, 64, "float32", 64)
    store = open_store(layout, "raw")
    kv, keys = kv_of(layout, 2), keys_of(store, 2)
    assert store.save_blocks((key for key in keys), kv).complete  # type: ignore[arg-type]
    target = np.full(kv.shape, 7, np.float32)
    paged = PagedKV.from_layers(layout, list(target.reshape(2, 2, 8, 16, 2, 64)), axes="kv page token head dim")
    target.flags.writeable = False
    locked = PagedKV.from_tensor(layout, target)
    pages = np.arange(8)
    for wrong, ids, message in (
        (locked, [[0], [1]], "read-only"),
        (paged, pages.reshape(4, 2), r"pages must be integers \[2, 4\]"),
        (paged, [[0, 1, 2, 3], [4, 5, 6, 0]], "page 0 is there twice"),
        (torch.zeros(1, 1, 1, 1, 1).expand(kv.shape), None, "share memory"),
        (target.astype(">f4"), None, "byte order"),
        (torch.complex(kv, kv).conj().imag, None, "plain tensor"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            store.load_blocks(keys, wrong, pages=ids)
    assert (target == 7).all()
    assert store.load_blocks([], paged, pages=[]).loaded == 0
    assert store.load_blocks(keys, paged, pages=pages).loaded == 2


@pytest.mark.parametrize("threads", [0, -1, "2", True, 1.5, 10**6])
def test_numbers_of_threads_that_there_cannot_be(open_store: Open, threads: Any) -> None:
    with pytest.raises(InvalidArgument, match="threads must be a whole number from 1 to 256"):
        open_store(LAYOUT, threads=threads)


def test_block_larger_than_the_daemon_takes_is_rejected(open_store: Open, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(LAYOUT, "kivi4")
    store.client.ping()
    store.client._session.max_record_bytes = store._plan.records.max_record_bytes
    kv, keys = kv_of(LAYOUT, 3), keys_of(store, 3)
    kv[0, 0, LAYOUT.block_tokens, 0, 0] = torch.nan
    saved = store.save_blocks(keys, kv)
    assert saved.statuses == (PutStatus.STORED, PutStatus.REJECTED, PutStatus.STORED)
    assert saved.reasons == {1: "too_large"}
    assert "raise dram.slab_bytes" in caplog.text
    store.client._session.max_record_bytes = 4096
    assert set(store.save_blocks(keys_of(store, 3, seed=1), kv).reasons.values()) == {"too_large"}


@pytest.mark.parametrize("codec", ["raw", "lossless", "int8", "kivi4", "turbo3", "centred3"])
def test_latent_attention(open_store: Open, codec: str) -> None:
    store = open_store(LATENT, codec)
    kv, keys = kv_of(LATENT, BLOCKS), keys_of(store)
    assert store.save_blocks(keys, kv).complete
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    assert same(target, decoded(kv, LATENT, codec))


@pytest.mark.parametrize("codec", ["raw", "kivi4", "turbo4", "lossless"])
def test_from_pages_to_pages_of_another_cache(open_store: Open, codec: str) -> None:
    store = open_store(LAYOUT, codec)
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    source = pages_in(kv, LAYOUT, "kv page token head dim", 16, spare=5, seed=1)
    assert store.save_blocks(keys, source.kv, pages=source.pages).stored == BLOCKS
    order = np.random.default_rng(2).permutation(2 * BLOCKS + 9)[: 2 * BLOCKS].astype(np.int64)
    target = Pages(LAYOUT, "page kv head token dim", 32, 2 * BLOCKS + 9, order.reshape(BLOCKS, 2))
    assert store.load_blocks(keys, target.kv, pages=target.pages).loaded == BLOCKS
    assert same(target.read(), decoded(kv, LAYOUT, codec))
    assert target.untouched()
    assert same(source.read(), kv)


def test_pages_of_vllm_on_the_cpu(open_store: Open) -> None:
    """Keys of a page and head lie transposed there: ``[D, N]``, then the values ``[N, D]``."""
    layout, tokens, blocks = KVLayout(2, 2, 64, "float32", 64), 32, 3
    kv = kv_of(layout, blocks)
    layers = [torch.zeros(2 * blocks, 2, tokens, 128) for _ in range(2)]
    for layer, page, head in np.ndindex(2, 2 * blocks, 2):
        rows = kv[layer, :, page * tokens : (page + 1) * tokens, head]
        flat = layers[layer][page, head].view(-1)
        flat[: tokens * 64] = rows[0].T.reshape(-1)
        flat[tokens * 64 :] = rows[1].reshape(-1)
    store = open_store(layout, "kivi4")
    keys, pages = keys_of(store, blocks), np.arange(2 * blocks).reshape(blocks, 2)
    assert store.save_blocks(keys, PagedKV.from_vllm_cpu(layout, layers), pages=pages).stored == blocks
    plain = filled(kv)
    assert store.load_blocks(keys, plain).loaded == blocks
    expected = decoded(kv, layout, "kivi4")
    assert same(plain, expected)
    others = [torch.zeros_like(layer) for layer in layers]
    assert store.load_blocks(keys, PagedKV.from_vllm_cpu(layout, others), pages=pages[::-1]).loaded == blocks
    keys_of_page = others[1][0, 1].view(-1)[: tokens * 64].view(64, tokens).T
    values_of_page = others[1][0, 1].view(-1)[tokens * 64 :].view(tokens, 64)
    assert same(keys_of_page, expected[1, 0, 2 * 64 : 2 * 64 + tokens, 1])
    assert same(values_of_page, expected[1, 1, 2 * 64 : 2 * 64 + tokens, 1])


@pytest.mark.parametrize("codec", ["raw", "lossless", "lossless-zstd"])
@pytest.mark.parametrize(("latent", "rotary"), [(100, 20), (72, 33), (1000, 64)])
def test_latents_of_any_width_are_stored_by_exact_codecs(open_store: Open, codec: str, latent: int, rotary: int):
    layout = MLALayout(num_layers=2, latent_dim=latent, rotary_dim=rotary, dtype="bfloat16", block_tokens=64)
    store = open_store(store_layout(layout, codec), codec)
    kv, keys = kv_of(layout, 3), keys_of(store, 3)
    assert store.save_blocks(keys, kv).complete
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == 3
    assert same(target, kv)
    # In an engine's pages, in another order than that of the keys.
    layers = [torch.zeros(12, 16, latent + rotary, dtype=torch.bfloat16) for _ in range(2)]
    pages = [[11, 3, 4, 5], [0, 1, 2, 6], [7, 8, 10, 9]]
    assert store.load_blocks(keys, PagedKV.from_layers(layout, layers, "page token dim"), pages=pages).loaded == 3
    for block, rows in enumerate(pages):
        for layer in range(2):
            found = torch.cat([layers[layer][page] for page in rows])
            assert same(found, block_of(kv, layout, block)[layer])


def test_latents_that_lossy_codecs_cannot_cut_are_refused_with_what_to_do(open_store: Open):
    layout = MLALayout(num_layers=2, latent_dim=100, rotary_dim=20, dtype="bfloat16", block_tokens=64)
    for codec in ("int8", "kivi4", "turbo3", "centred4"):
        with pytest.raises(InvalidArgument, match=r"latent of 100 .* exact codec \(raw, lossless\)"):
            open_store(layout, codec)


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_store_layout_takes_what_the_engine_quantised_with_any_codec(open_store: Open, codec: str, dtype: str):
    layout = store_layout(KVLayout(2, 2, 64, dtype, 16), codec)
    assert layout.block_tokens == 64
    store = open_store(layout, codec, engine_block_tokens=16)
    assert store.namespace.codec == (codec if get_codec(codec).exact else "raw")


@pytest.mark.parametrize("layout", [None, 3, "gqa", [], [None], object()])
def test_layout_that_is_none_is_refused(open_store: Open, layout: object):
    with pytest.raises(InvalidArgument, match="layout must be a KVLayout, an MLALayout or one for each KV group"):
        open_store(layout)
    with pytest.raises(InvalidArgument, match="engine must be a KVLayout or an MLALayout"):
        store_layout(layout)  # type: ignore[arg-type]


def test_what_an_engine_quantised_is_stored_as_it_is(open_store: Open) -> None:
    layout = KVLayout(2, 2, 64, "float8_e4m3fn", 64)
    store = open_store(layout, "kivi4")
    assert store.codec == store.namespace.codec == "raw"
    kv, keys = kv_of(layout, 3), keys_of(store, 3)
    assert store.save_blocks(keys, kv).stored_bytes == 3 * layout.block_bytes
    target = torch.zeros_like(kv)
    assert store.load_blocks(keys, target).lineage == 255
    assert same(target, kv)


def test_more_blocks_than_slots_and_hazards(open_store: Open, daemon: DaemonProcess) -> None:
    """They come in several groups: more than a lane begins with, more than are held at a time."""
    layout = KVLayout(4, 4, 128, "bfloat16", 64)
    store = open_store(layout, "kivi4")
    kv, keys = kv_of(layout, 80), keys_of(store, 80)
    saved = store.save_blocks(keys, kv)
    assert saved.stored == 80
    assert saved.raw_bytes / saved.stored_bytes == pytest.approx(16 / 4.5)
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == 80
    for index in (0, 31, 32, 63, 64, 79):
        assert same(block_of(target, layout, index), decoded(block_of(kv, layout, index), layout, "kivi4"))
    store.client.clear()


def test_threads_of_the_kernels(open_store: Open) -> None:
    store = open_store(LAYOUT, "kivi4", threads=3)
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    assert store.save_blocks(keys, kv).stored == BLOCKS
    target = filled(kv)
    assert store.load_blocks(keys, target).loaded == BLOCKS
    assert same(target, decoded(kv, LAYOUT, "kivi4"))


# ---------------------------------------------------------------- names


def test_shards_and_groups_are_parts_of_a_block(open_store: Open) -> None:
    layouts = (LAYOUT, KVLayout(1, 1, 128, "bfloat16", 64))
    stores = [open_store(layouts, "int8", shard=shard, shards=2, group=group) for shard in (0, 1) for group in (0, 1)]
    assert [store.part for store in stores] == [0, 1, 2, 3]
    assert {store.namespace for store in stores} == {stores[0].namespace}
    assert stores[0].namespace.parts == 4
    keys = keys_of(stores[0], 3)
    data = [kv_of(store.layout, 3, seed=store.part) for store in stores]
    for store, kv in zip(stores, data, strict=True):
        assert len(stores[0].match(keys)) == 0, "blocks are complete before their last part is there"
        assert store.save_blocks(keys, kv).stored == 3
        assert store.save_blocks(keys, kv).exists == 3
    assert len(stores[3].match(keys)) == 3
    for store, kv in zip(stores, data, strict=True):
        target = filled(kv)
        assert store.load_blocks(keys, target).loaded == 3
        assert same(target, decoded(kv, store.layout, "int8"))


def test_stores_share_blocks_only_where_everything_is_equal(open_store: Open) -> None:
    first = open_store(LAYOUT, "int8", model="m", revision="1", tenant_salt=b"a")
    kv, keys = kv_of(LAYOUT, 2), keys_of(first, 2)
    first.save_blocks(keys, kv)
    same_again = open_store(LAYOUT, "int8", model="m", revision="1", tenant_salt=b"a")
    assert same_again.load_blocks(keys, filled(kv)).loaded == 2
    for layout, codec, options in (
        (KVLayout(2, 1, 128, "bfloat16", 64), "int8", {}),
        (KVLayout(2, 2, 64, "float16", 64), "int8", {}),
        (LAYOUT, "kivi4", {}),
        (LAYOUT, "int8", {"revision": "2"}),
        (LAYOUT, "int8", {"tenant_salt": b"b"}),
        (LAYOUT, "int8", {"shards": 2}),
        ((LAYOUT, LAYOUT), "int8", {}),
    ):
        other = open_store(layout, codec, **{"model": "m", "revision": "1", "tenant_salt": b"a", **options})
        loaded = other.load_blocks(keys, filled(kv_of(other.layout, 2)))
        assert (loaded.loaded, loaded.failure) == (0, Failure.MISS)


def test_unknown_revision_warns_or_refuses(daemon: DaemonProcess) -> None:
    with pytest.warns(UserWarning, match="revision"):
        TensorStore(LAYOUT, model="m", endpoint=daemon.endpoint).close()
    with pytest.raises(InvalidArgument, match="revision"):
        TensorStore(LAYOUT, model="m", endpoint=daemon.endpoint, unknown_revision="refuse")


def test_engine_blocks_are_grouped(open_store: Open) -> None:
    layout = store_layout(KVLayout(2, 2, 64, "bfloat16", 16), "kivi4")
    assert layout == LAYOUT
    assert store_layout(KVLayout(2, 2, 64, "bfloat16", 48), "kivi4").block_tokens == 192
    assert store_layout(KVLayout(2, 2, 64, "bfloat16", 128), "kivi4").block_tokens == 128
    with pytest.raises(InvalidArgument, match="multiple of 16"):
        store_layout(KVLayout(2, 2, 40, "bfloat16", 16), "kivi4")
    store = open_store(layout, "kivi4", engine_block_tokens=16)
    hashes = [os.urandom(32) for _ in range(4 * 3 + 2)]
    keys = store.keys_of(hashes)
    assert keys == [hashes[3], hashes[7], hashes[11]]
    kv = kv_of(layout, 3)
    source = pages_in(kv, layout, "kv page token head dim", 16, spare=0, seed=3)
    assert store.save_blocks(keys, source.kv, pages=source.pages.reshape(-1)).stored == 3
    assert store.load_blocks(store.keys_of(hashes), filled(kv)).loaded == 3
    with pytest.raises(InvalidArgument, match="hash 7"):
        store.keys_of([*hashes[:7], b"short"])


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (KVLayout(2, 2, 64, "bfloat16", 32), {}, "at least 64 tokens"),
        (LAYOUT, {"engine_block_tokens": 24}, "whole engine blocks"),
        (LAYOUT, {"codec": "kivi5"}, "kivi5"),
        (LAYOUT, {"shard": 2, "shards": 2}, "shard"),
        (LAYOUT, {"group": 1}, "group"),
        (LAYOUT, {"exact_codec": "int8"}, "exact"),
        (LAYOUT, {"fidelity": "exact"}, "lossy"),
        ((LAYOUT, KVLayout(2, 2, 64, "float16", 64)), {}, "one dtype"),
        (KVLayout(2, 2, 40, "bfloat16", 64), {}, "multiple of 16"),
        ("gqa", {}, "KVLayout"),
    ],
)
def test_arguments_that_do_not_fit(daemon: DaemonProcess, layout: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        TensorStore(layout, **{"codec": "kivi4", "endpoint": daemon.endpoint, **options})


def test_calls_with_wrong_arguments_do_nothing(open_store: Open) -> None:
    store = open_store()
    kv, keys = kv_of(LAYOUT, 3), keys_of(store, 3)
    cache = pages_in(kv, LAYOUT, "kv page token head dim", 32, spare=0, seed=1)
    other = pages_in(kv_of(KVLayout(2, 2, 64, "float16", 64), 3), KVLayout(2, 2, 64, "float16", 64),
                     "kv page token head dim", 32, spare=0, seed=1)  # fmt: skip
    for arguments, options, message in (
        ((keys, kv[:, :, :128]), {}, "3 keys but 2 blocks"),
        ((keys, kv[:, :, :100]), {}, "multiple of 64"),
        ((keys, kv[:1]), {}, "expected shape"),
        ((keys, kv.float()), {}, "bfloat16"),
        ((keys, kv), {"pages": [[0]] * 3}, "pages"),
        ((keys, cache.kv), {}, "pages"),
        ((keys, cache.kv), {"pages": cache.pages[:2]}, "pages"),
        ((keys, cache.kv), {"pages": cache.pages + 1}, "0 to 5"),
        ((keys, cache.kv), {"pages": cache.pages - 1}, "0 to 5"),
        ((keys, cache.kv), {"pages": cache.pages.astype(float)}, "integers"),
        ((keys, other.kv), {"pages": other.pages}, "layout"),
        (([keys[0], b"short"], kv), {}, "32 bytes"),
        (([keys[0], keys[0]], kv), {}, "own parent"),
        ((keys, kv), {"parent": keys[0]}, "own parent"),
        ((keys, kv), {"lineage": 256}, "lineage"),
        ((keys, kv), {"request": -1}, "request"),
        ((keys[0], kv), {}, "keys"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            store.save_blocks(*arguments, **options)
    assert store.client.exists(keys) == [False] * 3
    assert store.save_blocks([], kv).statuses == ()
    assert store.load_blocks([], kv).loaded == 0


# ---------------------------------------------------------------- what is there already, and how good it is


def test_what_is_there_already_is_not_encoded(open_store: Open) -> None:
    store = open_store()
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    kernels = intercept(store)
    assert store.save_blocks(keys[:4], kv).stored == 4
    assert kernels.encoded == 4
    saved = store.save_blocks(keys, kv)
    assert saved.statuses == (PutStatus.EXISTS,) * 4 + (PutStatus.STORED,) * 3
    assert kernels.encoded == BLOCKS
    assert saved.raw_bytes == 3 * LAYOUT.block_bytes


def test_void_blocks_are_stored_exactly(open_store: Open) -> None:
    store = open_store()
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    block_of(kv, LAYOUT, 2)[1, 0, 5, 1, 3] = float("nan")
    block_of(kv, LAYOUT, 3)[0, 1, 63, 0, 0] = float("-inf")
    block_of(kv, LAYOUT, 6)[0, 0, 0, 0, 0] = 61_441.0 * 2
    saved = store.save_blocks(keys, kv)
    assert saved.stored == BLOCKS
    assert saved.void == (2, 3, 6)
    target = filled(kv)
    loaded = store.load_blocks(keys, target)
    assert loaded.loaded == BLOCKS
    assert loaded.fidelities == (85,) * BLOCKS, "an exact block after lossy ones is not exact as a whole"
    for index in range(BLOCKS):
        block = block_of(kv, LAYOUT, index)
        expected = block if index in saved.void else decoded(block, LAYOUT, "kivi4")
        assert same(block_of(target, LAYOUT, index), expected)
    again = store.save_blocks(keys, kv)
    assert again.exists == BLOCKS


def test_void_blocks_without_loss_and_alone(open_store: Open) -> None:
    store = open_store(LAYOUT, "turbo2", exact_codec="lossless")
    kv, keys = kv_of(LAYOUT, 3), keys_of(store, 3)
    kv[:] = float("inf")
    saved = store.save_blocks(keys, kv)
    assert (saved.stored, saved.void) == (3, (0, 1, 2))
    assert saved.stored_bytes < saved.raw_bytes / 10
    target = filled(kv)
    assert store.load_blocks(keys, target).fidelities == (255,) * 3
    assert same(target, kv)


def test_lineage_goes_from_what_was_loaded_to_what_is_saved(open_store: Open) -> None:
    store = open_store(LAYOUT, "int8")
    kv, keys = kv_of(LAYOUT, 6), keys_of(store, 6)
    assert store.save_blocks(keys[:2], kv).complete
    loaded = store.load_blocks(keys[:2], filled(kv))
    assert loaded.lineage == 178
    assert store.save_blocks(keys[2:4], kv[:, :, 128:], parent=keys[1], lineage=loaded).stored == 2
    worse = store.save_blocks(keys[4:], kv[:, :, 256:], parent=keys[3], lineage=40)
    assert worse.stored == 2
    everything = store.load_blocks(keys, filled(kv))
    assert everything.fidelities == (178, 178, 178, 178, 40, 40)
    assert everything.lineage == 40
    headers = [header for header, _ in store.client._run(store.client._operations.get_records(keys, 0, None))]
    assert [header.lineage for header in headers] == [255, 255, 178, 178, 40, 40]
    part = store.load_blocks(keys[2:4], filled(kv), lineage=90)
    assert part.fidelities == (90, 90)


def test_better_blocks_take_the_place_of_worse_ones(open_store: Open) -> None:
    store = open_store(LAYOUT, "kivi4")
    kv, keys = kv_of(LAYOUT, 2), keys_of(store, 2)
    assert store.save_blocks(keys, kv, lineage=30).stored == 2
    assert store.save_blocks(keys, kv, lineage=20).exists == 2
    assert store.save_blocks(keys, kv, lineage=30).exists == 2
    better = kv_of(LAYOUT, 2, seed=5)
    assert store.save_blocks(keys, better).stored == 2
    target = filled(kv)
    assert store.load_blocks(keys, target).fidelities == (85, 85)
    assert same(target, decoded(better, LAYOUT, "kivi4"))


def test_exact_namespaces_take_nothing_lossy(open_store: Open) -> None:
    store = open_store(LAYOUT, "lossless", fidelity="exact")
    kv, keys = kv_of(LAYOUT, 3), keys_of(store, 3)
    refused = store.save_blocks(keys, kv, lineage=200)
    assert refused.statuses == (PutStatus.REJECTED,) * 3
    assert set(refused.reasons.values()) == {"not_exact"}
    assert store.load_blocks(keys, filled(kv)).failure is Failure.MISS
    assert store.save_blocks(keys, kv).stored == 3
    target = filled(kv)
    assert store.load_blocks(keys, target).lineage == 255
    assert same(target, kv)


# ---------------------------------------------------------------- what cannot be loaded


def test_a_miss_ends_the_prefix(open_store: Open) -> None:
    store = open_store()
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    store.save_blocks(keys, kv)
    store.client.remove([keys[3]])
    target = filled(kv)
    loaded = store.load_blocks(keys, target)
    assert (loaded.loaded, loaded.failure) == (3, Failure.MISS)
    assert loaded.detail.startswith("block 3")
    assert same(target[:, :, : 3 * 64], decoded(kv[:, :, : 3 * 64], LAYOUT, "kivi4"))
    assert store.load_blocks(keys[4:], target).loaded == 3


def test_records_of_other_layouts_codecs_and_parameters(open_store: Open) -> None:
    store = open_store()
    kv, keys = kv_of(LAYOUT, 4), keys_of(store, 4)
    sizes = get_codec("kivi4").section_bytes(LAYOUT)
    assert sizes is not None
    payload = bytes(sum(sizes))
    for index, (failure, changes) in enumerate(
        (
            (Failure.LAYOUT, {"shape": (2, 2, 64, 1, 128)}),
            (Failure.LAYOUT, {"dtype": "float16"}),
            (Failure.CODEC, {"codec_parameters": b"another's digest"}),
            (Failure.CORRUPT, {"section_bytes": (sizes[0] - 16, sizes[1] + 16)}),
        )
    ):
        header = header_of(store, keys[index], payload, sizes, **changes)
        assert put_record(store.client, keys[index], payload, header) is PutStatus.STORED
        good = [bytes([index + 1]) * 32, keys[index]]
        assert store.save_blocks(good[:1], kv).stored == 1
        loaded = store.load_blocks(good, filled(kv))
        assert (loaded.loaded, loaded.failure) == (1, failure), loaded.detail
        assert loaded.fidelities == (85,)


def test_a_record_of_opaque_bytes_is_of_another_layout(open_store: Open, mapped: bool, daemon: DaemonProcess) -> None:
    store = open_store(LAYOUT, "raw")
    with Client(daemon.endpoint, namespace=store.namespace, mapped=mapped) as client:
        client.put(b"k" * 32, bytes(LAYOUT.block_bytes))
    loaded = store.load_blocks([b"k" * 32], filled(kv_of(LAYOUT, 1)))
    assert (loaded.loaded, loaded.failure) == (0, Failure.LAYOUT)


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_compressed_bytes_that_are_none_are_found(open_store: Open, bad: int) -> None:
    """Their checksum is right: whoever wrote them wrote nonsense."""
    store = open_store(LAYOUT, "lossless")
    kv, keys = kv_of(LAYOUT, 6), keys_of(store, 6)
    encoded = b"".join(get_codec("lossless").encode(block_of(kv, LAYOUT, bad), LAYOUT).sections)
    nonsense = encoded[:64] + bytes(byte ^ 0x5A for byte in encoded[64:])
    header = header_of(store, keys[bad], nonsense, (len(nonsense),), keys[bad - 1] if bad else bytes(32))
    assert put_record(store.client, keys[bad], nonsense, header) is PutStatus.STORED
    assert store.save_blocks(keys, kv).stored == 5
    target = filled(kv)
    loaded = store.load_blocks(keys, target)
    assert (loaded.loaded, loaded.failure) == (bad, Failure.CORRUPT)
    assert same(target[:, :, : bad * 64], kv[:, :, : bad * 64])


def test_an_invalidated_namespace(open_store: Open, mapped: bool) -> None:
    store, other = open_store(), open_store()
    kv, keys = kv_of(LAYOUT, 2), keys_of(store, 2)
    store.save_blocks(keys, kv)
    other.client.invalidate()
    assert store.load_blocks(keys, filled(kv)).failure is Failure.MISS
    saved = store.save_blocks(keys, kv)
    assert saved.statuses == (PutStatus.REJECTED,) * 2
    assert set(saved.reasons.values()) == {"stale_namespace"}
    assert store.client.stale
    assert other.save_blocks(keys, kv).stored == 2
    store.client.invalidate()
    assert store.load_blocks(keys, filled(kv)).loaded == 2


def test_nothing_stays_lent_or_held(open_store: Open, daemon: DaemonProcess) -> None:
    store = open_store()
    kv, keys = kv_of(LAYOUT, BLOCKS), keys_of(store)
    kv[0, 0, 200] = float("nan")
    store.save_blocks(keys, kv)
    store.load_blocks([*keys, b"x" * 32], filled(kv_of(LAYOUT, BLOCKS + 1)))
    session = store.client._session.mapped
    if session is not None:
        assert (len(session.free_hazards), session.hazard_bytes, session.views) == (64, 0, {})
        assert session.batches == {}
    wait_until_nothing_is_lent(store.client.stats)


def test_latent_layouts_have_the_shape_of_their_tensor() -> None:
    assert isinstance(LATENT, MLALayout)
    assert kv_of(LATENT, 3).shape == (2, 192, 192)


def test_the_example_of_the_page_runs(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_ENDPOINT", daemon.endpoint)
    page = (Path(__file__).parents[2] / "docs" / "tensors.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", page, re.DOTALL)
    first: dict[str, Any] = {}
    exec(compile(example, "tensors.md", "exec"), first)
    assert (len(first["loaded"]), first["saved"].stored) == (0, 8)
    again: dict[str, Any] = {}
    exec(compile(example, "tensors.md", "exec"), again)
    assert (len(again["loaded"]), again["saved"].statuses) == (8, ())
    for then, now in zip(first["layers"], again["layers"], strict=True):
        assert torch.allclose(then[:, :32].float(), now[:, :32].float(), atol=0.3)
        assert not torch.equal(then[:, :32], now[:, :32])
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target


@pytest.mark.parametrize("codec", ["raw", "lossless", "kivi4"])
def test_prepare_writes_to_nothing_but_its_spare_pages(daemon: DaemonProcess, codec: str) -> None:
    layout = KVLayout(2, 2, 64, "float32", 64)
    layers = [np.random.default_rng(layer).standard_normal((2, 3, 64, 2, 64), np.float32) for layer in range(2)]
    before = [layer.copy() for layer in layers]
    cache = PagedKV.from_layers(layout, layers, "kv page token head dim")
    with TensorStore(layout, codec, name="prepare", endpoint=daemon.endpoint) as store:
        there = store.client.stats().dram.blocks
        store.prepare(cache)
        assert store.client.stats().dram.blocks == there
    for layer, old in zip(layers, before, strict=True):
        np.testing.assert_array_equal(layer[:, 1:], old[:, 1:])
        if codec != "kivi4":
            np.testing.assert_array_equal(layer, old)
