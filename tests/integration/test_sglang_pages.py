"""Pages of host pools through a live daemon, without SGLang: pools with the face of SGLang's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daemon_process import DaemonProcess
from fakes.host_pools import MambaPoolHost, MHATokenToKVPoolHost, MLATokenToKVPoolHost, OtherPoolHost

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.identity import Identity
from kvstore_client.integrations.hicache.keys import keys_of
from kvstore_client.integrations.hicache.page_stores import PageStore
from kvstore_client.integrations.hicache.settings import HiCacheSettings
from kvstore_client.integrations.hicache.stores import KV, Stores, open_kv, open_pool, open_values, plan_kv, plan_pool
from kvstore_client.integrations.hicache.values import Values
from kvstore_client.integrations.row_tier.counters import Counters

NAMES = [f"{at:064x}" for at in range(1, 9)]
KEYS = keys_of(NAMES)


@pytest.fixture(params=[True, False], ids=["mapped", "socket"])
def identity(request: pytest.FixtureRequest, daemon: DaemonProcess, namespace: str) -> Callable[..., Identity]:
    def one(codec: str = "raw", **changes: Any) -> Identity:
        alone = {
            "tp_rank": 0,
            "tp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
            "attn_cp_rank": 0,
            "attn_cp_size": 1,
            "is_mla_model": False,
            "should_split_heads": False,
            "model_name": "m",
        }
        settings = HiCacheSettings(
            endpoint=daemon.endpoint,
            mapped=request.param,
            codec=codec,
            interface_v1=True,
            name=namespace,
            unknown_revision="ignore",
        )
        return Identity.of(SimpleNamespace(**(alone | changes)), settings, SimpleNamespace(), "0.5.23")

    return one


def rows(*pages: int, tokens: int = 64) -> torch.Tensor:
    return torch.cat([page * tokens + torch.arange(tokens) for page in pages])


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_pages_come_back_into_other_pages(
    identity: Callable[..., Identity], stack: ExitStack, layout: str, codec: str
) -> None:
    pool, one = MHATokenToKVPoolHost(layout), identity(codec)
    store = _opened(stack, open_kv(one, plan_kv(one, pool)))
    before = [pool.page(0), pool.page(2)]
    assert store.match(KEYS[:2]) == 0
    assert store.save(KEYS[:2], rows(0, 2), None).there == [True, True]
    assert store.match(KEYS[:3]) == 2
    assert store.exists(KEYS[1:3]) == [True, False]
    again = store.save(KEYS[:3], rows(0, 2, 1), None)
    assert again.results == ["exists", "exists", "stored"]
    loaded = store.load(KEYS[:2], rows(5, 3))
    assert (loaded.pages, loaded.failure) == (2, "")
    assert torch.equal(pool.page(5), before[0])
    assert torch.equal(pool.page(3), before[1])
    assert (store.load(KEYS[:4], rows(5, 3, 4, 1)).pages, store.load(KEYS[4:5], rows(5)).failure) == (3, "miss")


def test_ranks_hold_parts_of_a_page(identity: Callable[..., Identity], stack: ExitStack) -> None:
    stores = []
    for rank in range(2):
        one, pool = identity(tp_rank=rank, tp_size=2), MHATokenToKVPoolHost("page_first")
        stores.append(_opened(stack, open_kv(one, plan_kv(one, pool))))
    assert stores[0].save(KEYS[:2], rows(0, 1), None).there == [True, True]
    assert [store.match(KEYS[:2]) for store in stores] == [0, 0]
    assert stores[1].save(KEYS[:1], rows(0), None).there == [True]
    assert [store.match(KEYS[:2]) for store in stores] == [1, 1]


def test_latent_pages_are_one_for_all_ranks(identity: Callable[..., Identity], stack: ExitStack) -> None:
    pools = [MLATokenToKVPoolHost("page_first") for _ in range(2)]
    stores = []
    for rank, pool in enumerate(pools):
        one = identity("lossless", tp_rank=rank, tp_size=2, is_mla_model=True)
        stores.append(_opened(stack, open_kv(one, plan_kv(one, pool))))
    assert stores[0].save(KEYS[:1], rows(1), None).there == [True]
    assert stores[1].load(KEYS[:1], rows(4)).pages == 1
    assert torch.equal(pools[1].kv_buffer[256:320], pools[0].kv_buffer[64:128])


def test_pages_as_bytes_come_back(identity: Callable[..., Identity], stack: ExitStack) -> None:
    one = identity("kivi4")
    states, other = MambaPoolHost(), OtherPoolHost()
    store = _opened(stack, open_pool(one, plan_pool(one, "mamba", states)))
    old = states.temporal.clone()
    assert store.save(KEYS[:2], torch.tensor([1, 2]), None).results == ["stored", "stored"]
    assert store.save(KEYS[:3], torch.tensor([1, 2, 3]), None).results == ["exists", "exists", "stored"]
    assert store.load(KEYS[:4], torch.tensor([5, 4, 0, 1])).pages == 3
    assert torch.equal(states.temporal[[5, 4, 0, 1]], old[[1, 2, 3, 1]])
    copied = _opened(stack, open_pool(one, plan_pool(one, "swa", other)))
    page = other.kv_buffer[:4].clone()
    assert copied.save(KEYS[:1], rows(0, tokens=4), None).there == [True]
    assert copied.load(KEYS[:1], rows(3, tokens=4)).pages == 1
    assert torch.equal(other.kv_buffer[12:16], page)
    with pytest.raises(InvalidArgument, match="need 4 host indices, got 3"):
        copied.load(KEYS[:1], torch.arange(3))


def test_pools_of_one_name_and_other_sizes_do_not_meet(identity: Callable[..., Identity], stack: ExitStack) -> None:
    one = identity()
    small, large = (
        _opened(stack, open_pool(one, plan_pool(one, "swa", OtherPoolHost(width=width)))) for width in (16, 32)
    )
    assert small.save(KEYS[:1], rows(0, tokens=4), None).there == [True]
    assert (small.match(KEYS[:1]), large.match(KEYS[:1])) == (1, 0)
    assert large.load(KEYS[:1], rows(0, tokens=4)).failure == "miss"


def test_values_come_back_up_to_the_first_that_is_not_there(
    identity: Callable[..., Identity], stack: ExitStack
) -> None:
    store = _opened(stack, open_values(identity(), 64, {}))
    values = Values(Counters())
    tensors = [torch.randn(5, 3), torch.arange(7), torch.ones(2, dtype=torch.bfloat16)]
    assert values.set(store, KEYS[:3], tensors)
    targets = [torch.zeros_like(tensor) for tensor in (*tensors, tensors[0])]
    got = values.get(store, KEYS[:4], targets)
    assert got[3] is None
    assert all(torch.equal(one, other) for one, other in zip(got, tensors, strict=False))
    assert values.get(store, [KEYS[5], KEYS[0]], None) == [None, None]
    assert values.get(store, KEYS[:1], [torch.zeros(16)]) == [None]
    for wrong in ([torch.ones(3, 3).t()[:, :2]], [b"bytes"], [torch.ones(0)]):
        with pytest.raises(InvalidArgument, match="values must"):
            values.get(store, KEYS[:1], wrong)


def test_a_codec_that_does_not_take_the_pages_names_a_page_size(identity: Callable[..., Identity]) -> None:
    one = identity("kivi4")
    with pytest.raises(
        InvalidArgument, match=r"does not take pages of 16 tokens .*--page-size (32|64), or use codec raw"
    ):
        plan_kv(one, MHATokenToKVPoolHost("page_first", page_size=16))
    with pytest.raises(InvalidArgument, match="OtherPoolHost are not known as tensors; use codec 'raw'"):
        plan_kv(one, _layered(OtherPoolHost()))


def test_stores_are_opened_once_and_by_name(identity: Callable[..., Identity], stack: ExitStack) -> None:
    one = identity()
    pool = plan_kv(one, MHATokenToKVPoolHost("page_first"))
    opened: list[str] = []

    def count(name: str) -> PageStore:
        opened.append(name)
        return open_kv(one, pool)

    stores = Stores({KV: lambda: count(KV), "mamba": lambda: count("mamba")}, KV)
    stack.callback(stores.close)
    assert stores.of(KV) is stores.of(KV)
    assert stores.of("mamba") is stores.of("mamba")
    assert opened == [KV, "mamba"]
    with pytest.raises(InvalidArgument, match="no host pool 'swa' was registered; there are kv, mamba"):
        stores.of("swa")


def _opened(stack: ExitStack, store: PageStore) -> PageStore:
    stack.callback(store.close)
    return store


def _layered(pool: Any) -> Any:
    pool.layer_num = 1
    return pool
