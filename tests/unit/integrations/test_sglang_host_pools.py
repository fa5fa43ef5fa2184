from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from fakes.host_pools import (
    LogicalHostPool,
    MambaPoolHost,
    MHATokenToKVPoolHost,
    MHATokenToKVPoolMXFP8Host,
    MLATokenToKVPoolHost,
    OtherPoolHost,
)

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.host_bytes import FlatPages, PointerPages, host_bytes
from kvstore_client.integrations.hicache.host_pools import is_logical, page_ids, paged_of, shares_out_heads
from kvstore_kernels.layout import KVLayout, MLALayout


def read(paged: Any, section: int, layer: int, page: int, token: int, head: int, channel: int) -> int:
    """Two bytes of an element, where the strides say it is."""
    where = paged.sections[section]
    at = int(where.bases[layer]) + page * where.page_stride + token * where.token_stride
    at += head * where.head_stride + channel * where.element_stride
    return ctypes.c_int16.from_address(at).value


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_strides_of_pages_by_head_lead_to_every_element(layout: str) -> None:
    pool = MHATokenToKVPoolHost(layout, pages=3, page_size=4, layers=2, heads=2, dim=4)
    paged = paged_of(pool)
    assert paged.layout == KVLayout(2, 2, 4, "bfloat16", 4)
    assert (paged.num_pages, paged.page_tokens) == (3, 4)
    for page in range(3):
        values = pool.page(page).view(torch.int16)
        for kv, layer, token, head, channel in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            assert read(paged, kv, layer, page, token, head, channel) == values[kv, layer, token, head, channel]


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_unified"])
def test_strides_of_latent_pages_lead_to_every_element(layout: str) -> None:
    pool = MLATokenToKVPoolHost(layout, pages=3, page_size=4, latent=64, rotary=8)
    paged = paged_of(pool)
    assert paged.layout == MLALayout(2, 64, 8, "bfloat16", 4)
    for layer, token, channel in [(0, 0, 0), (1, 5, 63), (0, 11, 64), (1, 7, 71)]:
        page, inside = divmod(token, 4)
        of_layout = {"layer_first": (layer, token), "page_first": (token, layer)}
        value = pool.kv_buffer[of_layout.get(layout, (page, layer, inside))].reshape(-1)[channel]
        section, at = (0, channel) if channel < 64 else (1, channel - 64)
        assert read(paged, section, layer, page, inside, 0, at) == value.view(torch.int16)


def test_latents_of_any_width_are_known() -> None:
    """Exact codecs take them; what a lossy one cannot cut it says itself."""
    assert paged_of(MLATokenToKVPoolHost("page_first", latent=100)).layout == MLALayout(2, 100, 64, "bfloat16", 64)


def test_pages_that_are_not_in_one_place_are_not_known() -> None:
    with pytest.raises(ValueError, match="MHATokenToKVPoolMXFP8Host are not known"):
        paged_of(MHATokenToKVPoolMXFP8Host("page_first"))
    for pool, message in (
        (MHATokenToKVPoolHost("page_unified"), "memory layout 'page_unified'"),
        (OtherPoolHost(), "OtherPoolHost are not known"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_of(pool)
    wrong: Any = MHATokenToKVPoolHost("page_first")
    wrong.kv_buffer = wrong.kv_buffer[:, :-64]
    with pytest.raises(ValueError, match="buffer of page_first has shape"):
        paged_of(wrong)
    packed: Any = MLATokenToKVPoolHost("page_first")
    packed.dsa_kv_cache_store_fp8 = True
    with pytest.raises(ValueError, match="rows of 192 elements"):
        paged_of(packed)
    shared: Any = MLATokenToKVPoolHost("page_first")
    shared.dcp_size = 2
    with pytest.raises(ValueError, match="decode-context-parallel"):
        paged_of(shared)


def test_kinds_of_pools_are_told_by_their_classes() -> None:
    assert is_logical(LogicalHostPool())
    assert not is_logical(OtherPoolHost())
    assert shares_out_heads(MHATokenToKVPoolMXFP8Host("page_first"))
    assert shares_out_heads(MambaPoolHost())
    assert not shares_out_heads(MLATokenToKVPoolHost("page_first"))


def test_page_ids_are_whole_pages_only() -> None:
    rows = torch.arange(4)
    assert page_ids(torch.cat([8 + rows, rows]), 2, 4).tolist() == [2, 0]
    assert page_ids([], 0, 4).tolist() == []
    for indices in (rows, torch.cat([rows, rows + 5]), torch.tensor([0, 1, 2, 4, 8, 9, 10, 11]), torch.rand(8)):
        with pytest.raises(InvalidArgument, match="host indices"):
            page_ids(indices, 2, 4)


def test_pieces_of_a_page_are_gathered_and_scattered() -> None:
    pool = MambaPoolHost()
    pages = host_bytes(pool)
    assert isinstance(pages, PointerPages)
    assert (pages.page_tokens, pages.page_bytes) == (1, 24 * 4 + 10 * 2)
    one = pages.sources(torch.tensor([2, 4]), 2)
    assert bytes(one[1]) == pool.temporal[4].numpy().tobytes() + pool.conv[4].view(torch.uint8).numpy().tobytes()
    targets = pages.targets(torch.tensor([0, 5]), 2)
    for target, source in zip(targets, one, strict=True):
        target[:] = source
    pages.accept(torch.tensor([0, 5]), 2, targets)
    assert torch.equal(pool.temporal[[0, 5]], pool.temporal[[2, 4]])
    assert torch.equal(pool.conv[[0, 5]], pool.conv[[2, 4]])


def test_a_page_of_one_piece_is_the_pools_memory() -> None:
    pool: Any = MHATokenToKVPoolHost("page_first", layers=1)
    row = pool.kv_buffer[0, 0].nbytes
    pool.get_page_buffer_meta = lambda indices: (
        [pool.kv_buffer.data_ptr() + row * at for at in indices.tolist()[::64]],
        [64 * row] * (len(indices) // 64),
    )
    pages = host_bytes(pool)
    (source,) = pages.sources(torch.arange(64, 128), 1)
    source[:] = bytes(len(source))
    assert not pool.kv_buffer[0, 64:128].any()
    assert pool.kv_buffer[0, :64].any()


def test_a_pool_without_addresses_copies_its_pages() -> None:
    pool = OtherPoolHost()
    pages = host_bytes(pool)
    assert isinstance(pages, FlatPages)
    source = pages.sources(torch.arange(4, 8), 1)
    old = pool.kv_buffer[4:8].clone()
    (target,) = pages.targets(torch.arange(8, 12), 1)
    target[:] = source[0]
    pages.accept(torch.arange(8, 12), 1, [target])
    assert torch.equal(pool.kv_buffer[8:12], old)
    with pytest.raises(InvalidArgument, match="host indices"):
        pages.sources(torch.arange(5), 1)


def test_a_pool_that_gives_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="LogicalHostPool gives its pages neither by address"):
        host_bytes(LogicalHostPool())
