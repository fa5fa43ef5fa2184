"""Tensors of a cache as pages of blocks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from fakes.fake_tensor_store import FakeTensorStore

if find_spec("torch") is None or find_spec("transformers") is None:
    pytest.skip("torch and transformers are not installed (the extra 'transformers')", allow_module_level=True)

from tiny_models import torch, transformers

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.transformers_cache.states import empty_states, layer_of, page_ids, pages_of, stream_of
from kvstore_kernels.layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="float32", block_tokens=16)
NAMES = [bytes([number]) * 32 for number in range(3)]


def drawn(blocks: int = 3) -> Any:
    draw = torch.Generator().manual_seed(2)
    states = empty_states(LAYOUT, blocks, torch.device("cpu"))
    for layer in states:
        for tensor in layer:
            tensor.normal_(generator=draw)
    return states


def test_pages_are_blocks_in_place() -> None:
    states, store = drawn(), FakeTensorStore(LAYOUT)
    assert store.save_blocks(NAMES, pages_of(LAYOUT, states), pages=page_ids(0, 3)).stored == 3
    block = torch.frombuffer(bytearray(store.blocks[NAMES[1]]), dtype=torch.float32).view(LAYOUT.shape)
    assert torch.equal(block[1, 0, 3, 2], states[1][0][0, 2, 16 + 3])
    assert torch.equal(block[1, 1, 3, 2], states[1][1][0, 2, 16 + 3])
    target = empty_states(LAYOUT, 3, torch.device("cpu"))
    assert len(store.load_blocks(NAMES, pages_of(LAYOUT, target), pages=page_ids(0, 3))) == 3
    for loaded, stored in zip(target, states, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(loaded, stored, strict=True))


def test_tensors_of_other_strides_are_copied_and_those_alike_are_not() -> None:
    states = drawn()
    assert pages_of(LAYOUT, states).sections[0].bases.tolist() == [keys.data_ptr() for keys, _ in states]
    other = [(keys.transpose(1, 2).contiguous().transpose(1, 2), values) for keys, values in states]
    stores = [FakeTensorStore(LAYOUT) for _ in range(2)]
    for store, kept in zip(stores, (states, other), strict=True):
        store.save_blocks(NAMES, pages_of(LAYOUT, kept), pages=page_ids(0, 3))
    assert stores[0].blocks == stores[1].blocks


@pytest.mark.parametrize("change", [lambda kept: kept.half(), lambda kept: kept[:, :2], lambda kept: kept[..., :4]])
def test_tensors_of_another_layout_are_refused(change: Any) -> None:
    states = [(change(keys), change(values)) for keys, values in drawn()]
    with pytest.raises(InvalidArgument, match="not of the model that the store was made for"):
        pages_of(LAYOUT, states)


def test_a_layer_has_its_tensors_as_they_are() -> None:
    ((keys, values), _) = drawn()
    layer = layer_of(keys, values)
    assert layer.keys is keys
    assert layer.values is values
    assert layer.get_seq_length() == 48
    plain = transformers.cache_utils.DynamicLayer()
    plain.update(keys, values)
    for one in (layer, plain):
        one.update(keys[:, :, :1], values[:, :, :1])
    assert torch.equal(layer.keys, plain.keys)
    assert vars(layer).keys() >= vars(plain).keys()


def test_pages_and_streams() -> None:
    assert page_ids(2, 5).tolist() == [[2], [3], [4]]
    assert page_ids(2, 2).shape == (0, 1)
    assert page_ids(0, 1).dtype == np.int32
    assert stream_of(torch.device("cpu")) is None
