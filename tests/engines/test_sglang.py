"""The kvstore HiCache backend under SGLang's own factory, abstract classes and host pools: bytes, ranks, pools."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
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
    MHA_LAYOUTS,
    MLA_LAYOUTS,
    PAGE,
    buffers_of,
    config,
    fill,
    indices_of,
    mamba_pool,
    mha_pool,
    mla_pool,
    wipe,
)
from sglang.srt import runtime_context
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.server_args import ServerArgs

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.host_pools import paged_of
from kvstore_client.integrations.sglang import KVStoreHiCache
from kvstore_client.mapped_batches import HeldBatch
from kvstore_kernels.codecs import get_codec

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

EXACT = ("raw", "lossless", "lossless-zstd")


# ---------------------------------------------------------------- pages of KV


@pytest.mark.parametrize("mapped", [None, False], ids=["mapped", "socket"])
@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.parametrize("layout", MHA_LAYOUTS)
def test_pages_of_multi_head_attention_come_back_bit_equal(make: Make, layout: str, codec: str, mapped: Any) -> None:
    _round_trip(make, mha_pool(layout), codec, mapped=mapped)


@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.parametrize("layout", MLA_LAYOUTS)
def test_pages_of_latent_attention_come_back_bit_equal(make: Make, layout: str, codec: str) -> None:
    _round_trip(make, mla_pool(layout), codec, rank={"is_mla_model": True})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8])
def test_pages_of_every_dtype_come_back_bit_equal(make: Make, dtype: torch.dtype) -> None:
    _round_trip(make, mha_pool("page_first", dtype=dtype), "lossless")


@pytest.mark.parametrize("page", [1, 16])
def test_small_pages_come_back_bit_equal(make: Make, page: int) -> None:
    _round_trip(make, mha_pool("page_first", page=page), "raw")


def _round_trip(make: Make, pool: Any, codec: str, **options: Any) -> None:
    backend = make(pool, codec, **options)
    fill(pool)
    stored, taken = [2, 0, 5, 7], [4, 6, 1, 3]
    before, names = copies(pool, stored), hashes(4, page=pool.page_size)
    assert backend.batch_exists(names) == 0
    assert backend.batch_set_v1(names, indices_of(pool, stored)) == [True] * 4
    assert backend.batch_exists(names) == 4
    assert backend.batch_exists([*names, "f" * 64]) == 4
    assert backend.batch_exists(["e" * 64, *names]) == 0
    wipe(pool)
    untouched = copies(pool, [0, 2, 5])
    assert backend.batch_get_v1(names, indices_of(pool, taken)) == [True] * 4
    assert same(copies(pool, taken), before)
    assert same(copies(pool, [0, 2, 5]), untouched)


@pytest.mark.parametrize("layout", MHA_LAYOUTS)
def test_lossy_pages_come_back_as_the_codec_makes_them(make: Make, layout: str) -> None:
    pool = mha_pool(layout)
    backend = make(pool, "kivi4")
    fill(pool)
    before, names = copies(pool, [1, 2, 3]), hashes(3)
    assert backend.batch_set_v1(names, indices_of(pool, [1, 2, 3])) == [True] * 3
    wipe(pool)
    assert backend.batch_get_v1(names, indices_of(pool, [5, 0, 2])) == [True] * 3
    codec, block = get_codec("kivi4"), paged_of(pool).layout
    for got, page in zip(copies(pool, [5, 0, 2]), before, strict=True):
        # The codec's block is [layer, kv, token, head, dim].
        encoded = codec.encode(page.transpose(0, 1).contiguous(), block)
        reference = codec.decode(encoded.sections, block).transpose(0, 1)
        assert torch.equal(got, reference.to(got.dtype))
        error = (got.float() - page.float()).norm() / page.float().norm()
        assert 0.001 < error < 0.15
    assert backend.counts()["save.kv.stored_bytes"] < 0.35 * sum(page.nbytes for page in before)


def test_lossy_pages_of_latent_attention_are_near(make: Make) -> None:
    pool = mla_pool("page_first")
    backend = make(pool, "kivi4", rank={"is_mla_model": True})
    fill(pool)
    before, names = copies(pool, [1, 2]), hashes(2)
    assert backend.batch_set_v1(names, indices_of(pool, [1, 2])) == [True] * 2
    wipe(pool)
    assert backend.batch_get_v1(names, indices_of(pool, [3, 4])) == [True] * 2
    for got, page in zip(copies(pool, [3, 4]), before, strict=True):
        error = (got.float() - page.float()).norm() / page.float().norm()
        assert 0.001 < error < 0.15
        # The rotary keys are kept as they are.
        assert torch.equal(got[..., 128:], page[..., 128:])


def test_engines_of_other_memory_layouts_share_pages(make: Make) -> None:
    one, other = mha_pool("page_first"), mha_pool("page_head")
    first, second = make(one, "lossless"), make(other, "lossless")
    fill(one)
    names = hashes(3)
    assert first.batch_set_v1(names, indices_of(one, [0, 1, 2])) == [True] * 3
    assert second.batch_get_v1(names, indices_of(other, [2, 4, 6])) == [True] * 3
    assert same(copies(other, [2, 4, 6]), copies(one, [0, 1, 2]))


def test_a_missing_page_ends_a_get(make: Make) -> None:
    pool = mha_pool("page_first")
    backend = make(pool)
    fill(pool)
    names = hashes(4)
    backend.batch_set_v1(names[:2], indices_of(pool, [0, 1]))
    backend.batch_set_v1(names[3:], indices_of(pool, [3]))
    assert backend.batch_exists(names) == 2
    assert backend.batch_get_v1(names, indices_of(pool, [4, 5, 6, 7])) == [True, True, False, False]


def test_blocks_name_the_page_before_them(make: Make, daemon: DaemonProcess) -> None:
    pool = mha_pool("page_first")
    backend = make(pool)
    names = hashes(5)
    backend.batch_set_v1(names[:3], indices_of(pool, [0, 1, 2]), HiCacheStorageExtraInfo(prefix_keys=[]))
    backend.batch_set_v1(names[3:], indices_of(pool, [3, 4]), HiCacheStorageExtraInfo(prefix_keys=names[:3]))
    client = backend._link.store.client
    records = [client._receive_one(bytes.fromhex(name), 0, None) for name in names]
    parents = [record[0].parent_key.hex() for record in records]
    assert parents == ["0" * 64, *names[:4]]


def test_indices_that_are_no_pages_are_refused(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool = mha_pool("page_first")
    backend = make(pool)
    names = hashes(2)
    for wrong in (indices_of(pool, [0]), indices_of(pool, [0, 1]) + 1, indices_of(pool, [0, 100])):
        assert backend.batch_set_v1(names, wrong) == [False, False]
        assert backend.batch_get_v1(names, wrong) == [False, False]
    assert backend.batch_exists(names) == 0
    assert "host indices" in caplog.text


# ---------------------------------------------------------------- ranks


def test_a_page_counts_when_all_ranks_stored_their_part(make: Make) -> None:
    pools = [mha_pool("page_first"), mha_pool("page_first_direct")]
    ranks = [make(pool, "lossless", rank={"tp_rank": at, "tp_size": 2}) for at, pool in enumerate(pools)]
    for at, pool in enumerate(pools):
        fill(pool, seed=at)
    names = hashes(3)
    before = [copies(pool, [0, 1, 2]) for pool in pools]
    assert ranks[0].batch_set_v1(names, indices_of(pools[0], [0, 1, 2])) == [True] * 3
    assert [rank.batch_exists(names) for rank in ranks] == [0, 0]
    assert ranks[1].batch_set_v1(names[:2], indices_of(pools[1], [0, 1])) == [True] * 2
    assert [rank.batch_exists(names) for rank in ranks] == [2, 2]
    for at, (rank, pool) in enumerate(zip(ranks, pools, strict=True)):
        wipe(pool)
        assert rank.batch_get_v1(names[:2], indices_of(pool, [5, 6])) == [True] * 2
        assert same(copies(pool, [5, 6]), before[at][:2])


def test_pipeline_stages_do_not_take_each_other_for_themselves(make: Make) -> None:
    pool = mha_pool("page_first")
    stages = [make(pool, rank={"pp_rank": at, "pp_size": 2}) for at in range(2)]
    assert stages[0].batch_set_v1(hashes(1), indices_of(pool, [0])) == [True]
    assert [stage.batch_exists(hashes(1)) for stage in stages] == [1, 0]


def test_latent_pages_have_one_writer_for_all_ranks(make: Make) -> None:
    pools = [mla_pool("page_first") for _ in range(2)]
    ranks = [make(pool, rank={"tp_rank": at, "tp_size": 2, "is_mla_model": True}) for at, pool in enumerate(pools)]
    fill(pools[0])
    names = hashes(2)
    assert ranks[1].batch_set_v1(names, indices_of(pools[1], [0, 1])) == [True] * 2
    assert ranks[0].batch_exists(names) == 0
    assert ranks[0].batch_set_v1(names, indices_of(pools[0], [0, 1])) == [True] * 2
    assert ranks[1].batch_exists(names) == 2
    assert ranks[1].batch_get_v1(names, indices_of(pools[1], [4, 5])) == [True] * 2
    assert same(copies(pools[1], [4, 5]), copies(pools[0], [0, 1]))


# ---------------------------------------------------------------- what must not be found


@pytest.mark.parametrize(
    "changed",
    [
        {"revision": "2"},
        {"name": "another"},
        {"tenant_salt": "another"},
        {"identity": "--kv-cache-dtype fp8_e5m2"},
        {"rank": {"model_name": "test/other"}},
        {"rank": {"attn_cp_size": 2}},
        {"codec": "lossless"},
    ],
    ids=str,
)
def test_engines_with_something_different_do_not_see_each_other(make: Make, changed: dict[str, Any]) -> None:
    pool = mha_pool("page_first")
    one, same_one = make(pool), make(pool)
    other = make(pool, **changed)
    names = hashes(2)
    assert one.batch_set_v1(names, indices_of(pool, [0, 1])) == [True] * 2
    assert same_one.batch_exists(names) == 2
    assert other.batch_exists(names) == 0
    wipe(pool)
    before = copies(pool, [3, 4])
    assert other.batch_get_v1(names, indices_of(pool, [3, 4])) == [False] * 2
    assert same(copies(pool, [3, 4]), before)


def test_arguments_of_the_engine_are_part_of_the_namespace(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, names = mha_pool("page_first"), hashes(1)

    def backend(**arguments: Any) -> Any:
        given = ServerArgs(model_path="dummy", page_size=PAGE, **arguments)
        monkeypatch.setattr(runtime_context, "get_server_args", lambda: given)
        return make(pool, revision="")

    one = backend(revision="r1")
    assert one.batch_set_v1(names, indices_of(pool, [0])) == [True]
    assert backend(revision="r1").batch_exists(names) == 1
    assert backend(revision="r2").batch_exists(names) == 0
    assert backend(revision="r1", kv_cache_dtype="fp8_e5m2").batch_exists(names) == 0


@pytest.mark.parametrize("codec", ["raw", "lossless", "kivi4"])
def test_a_flipped_byte_in_the_store_is_a_miss(make: Make, daemon: DaemonProcess, codec: str) -> None:
    pool = mha_pool("page_first")
    backend = make(pool, codec)
    fill(pool)
    names = hashes(3, seed=7)
    assert backend.batch_set_v1(names, indices_of(pool, [0, 1, 2])) == [True] * 3
    key = bytes.fromhex(names[1])
    _flip(backend, key)
    assert backend.batch_get_v1(names, indices_of(pool, [4, 5, 6])) == [True, False, False]
    assert same(copies(pool, [4]), copies(pool, [0])) or codec == "kivi4"
    # The daemon hears of it, looks for itself, and drops the page.
    wait_until(lambda: backend.batch_exists(names) == 1)
    assert backend.batch_set_v1(names, indices_of(pool, [0, 1, 2])) == [True] * 3
    assert backend.batch_get_v1(names, indices_of(pool, [4, 5, 6])) == [True] * 3


def _flip(backend: Any, key: bytes) -> None:
    """Change a byte of a record where it lies in the daemon's memory."""
    store = backend._link.store.of("kv")
    session = store.client._session.mapped
    with HeldBatch(session, [key], store.part, sure=True) as held:
        assert held.count == 1
        begin = int(held.payloads()[0]) - session.arena_address
    np.frombuffer(session._arena_map, np.uint8)[begin + 1000] ^= 0x40


# ---------------------------------------------------------------- settings


def test_unknown_settings_are_named(daemon: DaemonProcess) -> None:
    with pytest.raises(InvalidArgument, match=r"'codecc' \(did you mean 'codec'\?\)"):
        StorageBackendFactory.create_backend("dynamic", config(extra(daemon.endpoint, codecc="raw")), None)


def test_a_page_size_that_the_codec_does_not_take_is_refused_with_one_that_it_does(make: Make) -> None:
    with pytest.raises(InvalidArgument, match=r"kivi4.*--page-size (32|64), or use codec raw or lossless"):
        make(mha_pool("page_first", page=16), "kivi4")


def test_pages_of_unknown_order_are_stored_raw_or_refused(make: Make) -> None:
    pool = mha_pool("page_first", v_dim=32)
    with pytest.raises(
        InvalidArgument, match=r"needs to know what is where in a page.*AsymmetricMHATokenToKVPoolHost are not known"
    ):
        make(pool, "kivi4")
    backend = make(pool)
    fill(pool)
    k, v = (buffer.clone() for buffer in buffers_of(pool))
    names = hashes(2)
    assert backend.batch_set_v1(names, indices_of(pool, [1, 2])) == [True] * 2
    wipe(pool)
    assert backend.batch_exists(names) == 2
    assert backend.batch_get_v1(names, indices_of(pool, [1, 2])) == [True] * 2
    for buffer, old in zip(buffers_of(pool), (k, v), strict=True):
        assert torch.equal(buffer[PAGE : 3 * PAGE], old[PAGE : 3 * PAGE])
        assert (buffer[:PAGE] == 7).all()


def test_ranks_of_unknown_kinds_are_refused(daemon: DaemonProcess) -> None:
    for changes, message in (({"should_split_heads": True}, "tp_lcm_size"),):
        with pytest.raises(InvalidArgument, match=message):
            KVStoreHiCache(config(extra(daemon.endpoint), **changes), {})


# ---------------------------------------------------------------- the generic interface


def test_tensors_of_the_generic_interface_come_back(make: Make) -> None:
    pool = mha_pool("page_first")
    backend = make(pool, interface_v1=0)
    fill(pool)
    names = hashes(3)
    values = [pool.get_data_page(page * PAGE) for page in range(3)]
    assert backend.batch_set(names, values)
    assert backend.batch_exists([*names, "f" * 64]) == 3
    assert [backend.exists(name) for name in (*names, "f" * 64)] == [True] * 3 + [False]
    targets = [pool.get_dummy_flat_data_page() for _ in range(4)]
    got = backend.batch_get([*names, "f" * 64], targets)
    assert got[3] is None
    assert all(one is target for one, target in zip(got[:3], targets, strict=False))
    assert same(got[:3], values)
    assert torch.equal(backend.get(names[0]), values[0].view(torch.uint8))
    assert backend.set("any name", torch.arange(5))
    assert torch.equal(backend.get("any name", torch.zeros(5, dtype=torch.int64)), torch.arange(5))
    assert backend.get("any name", torch.zeros(6, dtype=torch.int64)) is None
    assert backend.get("any name", torch.zeros(4, dtype=torch.int64)) is None
    assert backend.batch_get(["no", "any name"], None) == [None, None]


def test_the_generic_interface_does_not_see_pages_of_the_other(make: Make) -> None:
    pool = mha_pool("page_first")
    backend = make(pool)
    names = hashes(1)
    assert backend.batch_set_v1(names, indices_of(pool, [0])) == [True]
    assert not backend.exists(names[0])
    assert backend.get(names[0], pool.get_dummy_flat_data_page()) is None


# ---------------------------------------------------------------- pools of hybrid models


def test_states_of_hybrid_models_go_beside_the_pages(make: Make) -> None:
    pool, states = mha_pool("page_first"), mamba_pool()
    backend = make(pool, "lossless")
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    fill(pool)
    names = hashes(4)
    backend.batch_set_v1(names, indices_of(pool, [0, 1, 2, 3]))
    trailing = [transfer(PoolName.MAMBA, names[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)]
    found = backend.batch_exists_v2(names, trailing)
    assert (found.kv_hit_pages, found.extra_pool_hit_pages, found.restorable_prefix_pages) == (0, {"kv": 4}, [])
    before = [buffer.clone() for buffer in states.kv_buffer]
    stored = backend.batch_set_v2(
        [transfer(PoolName.MAMBA, names[1:2], torch.tensor([3]))], HiCacheStorageExtraInfo(prefix_keys=names[:1])
    )
    assert stored == {PoolName.MAMBA: [True]}
    found = backend.batch_exists_v2(names, trailing)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (2, [2])
    assert found.extra_pool_hit_pages == {"kv": 4, "mamba": 2}
    for buffer in states.kv_buffer:
        buffer.zero_()
    loaded = backend.batch_get_v2([transfer(PoolName.MAMBA, names[1:2], torch.tensor([5]))])
    assert loaded == {PoolName.MAMBA: [True]}
    for buffer, old in zip(states.kv_buffer, before, strict=True):
        assert torch.equal(buffer[5], old[3])
        assert not buffer[:5].any()
    assert backend.batch_get_v2([transfer(PoolName.MAMBA, names[:1], torch.tensor([0]))]) == {"mamba": [False]}


def test_pools_without_addresses_are_copied(make: Make) -> None:
    pool, states = mha_pool("page_first"), mamba_pool()
    # With side states SGLang's pool gives no addresses, but whole pages.
    states.slot_state_device_tensors, states.slot_state_buffers = [torch.zeros(6, 3)], [torch.randn(6, 3)]
    states.size_per_token = len(states.get_data_page(0))
    backend = make(pool)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    old = [states.get_data_page(at).clone() for at in (1, 4)]
    names = hashes(2)
    assert backend.batch_set_v2([transfer(PoolName.MAMBA, names, torch.tensor([1, 4]))]) == {"mamba": [True, True]}
    assert backend.batch_get_v2([transfer(PoolName.MAMBA, names, torch.tensor([5, 0]))]) == {"mamba": [True, True]}
    assert same([states.get_data_page(5), states.get_data_page(0)], old)


def test_a_draft_pool_is_needed_for_all_pages(make: Make) -> None:
    pool, draft = mha_pool("page_first"), mha_pool("layer_first")
    backend = make(pool, "kivi4")
    backend.register_mem_host_pool_v2(draft, PoolName.DRAFT)
    fill(pool)
    fill(draft, seed=1)
    names, before = hashes(4), copies(draft, [0, 1])
    both = indices_of(pool, [0, 1, 2, 3])
    backend.batch_set_v1(names, both)
    stored = backend.batch_set_v2([transfer(PoolName.DRAFT, names[:2], both[: 2 * PAGE])])
    assert stored == {PoolName.DRAFT: [True, True]}
    found = backend.batch_exists_v2(names, [transfer(PoolName.DRAFT, names)])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (2, [1, 2])
    wipe(draft)
    got = backend.batch_get_v2([transfer(PoolName.DRAFT, names[:3], both[: 3 * PAGE])])
    assert got == {PoolName.DRAFT: [True, True, False]}
    assert same(copies(draft, [0, 1]), before)


def test_an_mla_model_stores_states_by_rank_and_leaves_drafts_by_head_alone(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = []
    for at in range(2):
        backend = make(mla_pool("page_first"), rank={"is_mla_model": True, "tp_rank": at, "tp_size": 2})
        backend.register_mem_host_pool_v2(mamba_pool(), PoolName.MAMBA)
        backend.register_mem_host_pool_v2(mha_pool("page_first"), PoolName.DRAFT)
        ranks.append(backend)
    assert "pool draft are not stored" in caplog.text
    names = hashes(1)
    state = [transfer(PoolName.MAMBA, names, torch.tensor([0]))]
    assert ranks[0].batch_set_v2(state) == {"mamba": [True]}
    assert ranks[0].batch_get_v2(state) == {"mamba": [True]}
    assert ranks[1].batch_get_v2(state) == {"mamba": [False]}
    assert ranks[0].batch_set_v2([transfer(PoolName.DRAFT, names, indices_of(mha_pool("page_first"), [0]))]) == {
        "draft": [False]
    }


def test_a_pool_that_was_not_registered_is_a_miss(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    backend = make(mha_pool("page_first"))
    assert backend.batch_get_v2([transfer(PoolName.SWA, hashes(1), torch.tensor([0]))]) == {"swa": [False]}
    assert "no host pool 'swa' was registered" in caplog.text
