"""How many blocks fit into the same bytes of an arena: as they are, and as real records of codecs."""

from __future__ import annotations

import pytest
import torch
from daemon_process import DaemonProcess

from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import padded_bytes
from kvstore.protocol.statistics import DramStats
from kvstore_client.tensors import TensorStore
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

LAYOUT = KVLayout(num_layers=32, num_kv_heads=2, head_dim=128, dtype="bfloat16", block_tokens=64)
RAW_SLOT_BYTES = padded_bytes(RECORD_HEADER_BYTES + LAYOUT.block_bytes)
RAW_BLOCKS = 24
AT_ONCE = 4
DRAM = ("--slab", str(2 * RAW_SLOT_BYTES))


def filled(codec: str, blocks: int) -> DramStats:
    """A daemon's memory after so many blocks, which are more than it holds."""
    block = torch.randn((LAYOUT.num_layers, 2, AT_ONCE * 64, 2, 128), generator=torch.Generator().manual_seed(1))
    kv = block.to(torch.bfloat16)
    with (
        DaemonProcess(*DRAM, capacity=str(RAW_BLOCKS * RAW_SLOT_BYTES), grant=str(8 * RAW_SLOT_BYTES)) as daemon,
        TensorStore(LAYOUT, codec, name="capacity", endpoint=daemon.endpoint, timeout=30.0) as store,
    ):
        pages = [[page] for page in range(AT_ONCE)]
        for begin in range(0, blocks, AT_ONCE):
            keys = [(begin + index + 1).to_bytes(4, "big") * 8 for index in range(AT_ONCE)]
            saved = store.save_blocks(keys, PagedKV.from_tensor(LAYOUT, kv), pages=pages)
            assert {status.name for status in saved.statuses} == {"STORED"}, saved
        target = torch.zeros_like(kv)
        loaded = store.load_blocks(keys, PagedKV.from_tensor(LAYOUT, target), pages=pages)
        assert loaded.loaded == AT_ONCE
        assert loaded.lineage == get_codec(codec).fidelity
        if codec == "raw":
            assert torch.equal(target, kv)
        assert store.client.verify().problems == []
        return store.client.stats().dram


@pytest.mark.parametrize(("codec", "least"), [("raw", 1.0), ("kivi4", 3.4), ("turbo3", 4.9)])
def test_capacity_of_two_mib_blocks_by_codec(codec: str, least: float):
    """All slots filled: what a codec saves is in blocks, and not lost in pages, headers or slabs."""
    assert LAYOUT.block_bytes == 2 << 20
    payload_bytes = sum(get_codec(codec).section_bytes(LAYOUT) or ())
    slot_bytes = padded_bytes(RECORD_HEADER_BYTES + payload_bytes)
    dram = filled(codec, int(RAW_BLOCKS * RAW_SLOT_BYTES / slot_bytes * 1.3) // AT_ONCE * AT_ONCE + AT_ONCE)
    assert dram.capacity_bytes == RAW_BLOCKS * RAW_SLOT_BYTES
    (slots,) = [one for one in dram.classes if one.used_slots]
    assert slots.slot_bytes == slot_bytes
    assert dram.resident_bytes == dram.blocks * slot_bytes
    assert dram.capacity_bytes - dram.resident_bytes < slot_bytes, "a slot is left"
    print(f"{codec}: {dram.blocks} blocks where raw has {RAW_BLOCKS}: {dram.blocks / RAW_BLOCKS:.2f} times")
    assert dram.blocks >= least * RAW_BLOCKS
