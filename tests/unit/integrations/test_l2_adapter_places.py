from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore_client.integrations.l2_adapter.places import PIECE_BYTES, ObjectLayout, Place, Places
from kvstore_client.integrations.l2_adapter.settings import AdapterSettings
from kvstore_kernels.layout import KVLayout, MLALayout

KV: ObjectLayout = (((2, 4, 128, 256), "bfloat16"),)


def places(**params: Any) -> tuple[Places, list[str]]:
    said: list[str] = []
    return Places(AdapterSettings.parse(params), said.append), said


def place(layout: ObjectLayout, **params: Any) -> Place:
    return places(**params)[0].of("m", layout)


def test_layouts_have_namespaces_of_their_own() -> None:
    some, _ = places()
    layouts: list[ObjectLayout] = [
        KV,
        (((2, 4, 128, 256), "float16"),),
        (((2, 4, 64, 256), "bfloat16"),),
        (((2, 4, 128, 256), "bfloat16"), ((1, 7), "float32")),
        (),
    ]
    namespaces = [some.of("m", layout).namespace for layout in layouts] + [some.of("n", KV).namespace]
    assert len({namespace.canonical() for namespace in namespaces}) == len(namespaces)
    assert some.of("m", KV) is some.of("m", KV)
    assert len(some.known("m")) == 5


def test_settings_are_in_the_namespace() -> None:
    given = {place(KV, **params).namespace.canonical() for params in ({}, {"name": "n"}, {"revision": "r"})}
    assert len(given) == 3
    assert place(KV, revision={"m": "r"}).namespace == place(KV, revision="r").namespace


@pytest.mark.parametrize("layout", [(), (((7,), "uint8"),), (((2, 0, 3), "uint8"),)])
def test_what_has_no_shape_is_flat(layout: ObjectLayout) -> None:
    assert place(layout) == place(())
    assert place(layout).object_bytes == 0
    assert place(layout).piece(0) == slice(None)


@pytest.mark.parametrize(("tokens", "parts"), [(16, 1), (1024, 1), (1025, 2), (4096, 4), (4097, 5)])
def test_large_objects_lie_in_parts_that_cover_them(tokens: int, parts: int) -> None:
    large = place((((2, 4, tokens, 256), "bfloat16"),))
    assert large.object_bytes == 4096 * tokens
    assert large.parts == parts
    data = np.arange(large.object_bytes, dtype=np.uint32).astype(np.uint8)
    pieces = [data[large.piece(part)] for part in range(parts)]
    assert np.array_equal(np.concatenate(pieces), data)
    assert all(0 < piece.nbytes <= PIECE_BYTES for piece in pieces)


def test_a_codec_takes_attention_kv_by_its_head_dim() -> None:
    found = place(KV, codec="kivi4", head_dim=64)
    assert found.layout == KVLayout(4, 4, 64, "bfloat16", 128)
    assert not found.reason
    data = np.arange(2 * 4 * 128 * 256, dtype=np.uint16).view(np.uint8)
    tensor = found.tensor(data)
    assert tensor.shape == (4, 2, 128, 4, 64)
    plain = data.view(np.uint16).reshape(2, 4, 128, 256)
    assert np.array_equal(tensor[3, 1, 5].ravel(), plain[1, 3, 5])
    assert np.shares_memory(tensor, data)


@pytest.mark.parametrize("shape", [(4, 64, 576), (1, 4, 64, 576)])
def test_a_codec_takes_latent_attention_by_its_rotary_dim(shape: tuple[int, ...]) -> None:
    found = place(((shape, "float16"),), codec="kivi4", rotary_dim=64)
    assert found.layout == MLALayout(4, 512, 64, "float16", 64)
    assert found.tensor(np.zeros(4 * 64 * 576 * 2, np.uint8)).shape == (4, 64, 576)


@pytest.mark.parametrize(
    ("layout", "params", "why"),
    [
        (KV, {"codec": "kivi4", "rotary_dim": 64}, "head_dim is not set"),
        (KV, {"codec": "kivi4", "head_dim": 100}, "no whole number of heads"),
        ((((2, 4, 100, 256), "bfloat16"),), {"codec": "kivi4", "head_dim": 128}, "100"),
        ((((2, 4, 128, 256), "float8_e4m3fn"),), {"codec": "kivi4", "head_dim": 128}, "takes no float8_e4m3fn"),
        ((((4, 64, 576), "bfloat16"),), {"codec": "kivi4", "head_dim": 64}, "rotary_dim"),
        ((((4, 64, 576), "bfloat16"),), {"codec": "kivi4", "rotary_dim": 576}, "rotary_dim"),
        ((((3, 4, 64, 256), "bfloat16"),), {"codec": "kivi4", "head_dim": 64}, "neither"),
        ((*KV, *KV), {"codec": "kivi4", "head_dim": 64}, "several tensors"),
    ],
)
def test_what_a_codec_cannot_take_is_stored_as_it_is_and_said_once(
    layout: ObjectLayout, params: dict[str, Any], why: str
) -> None:
    some, said = places(**params)
    found = some.of("m", layout)
    assert found.layout is None
    assert why in found.reason
    assert found.namespace == place(layout).namespace
    some.of("m", layout)
    (line,) = said
    assert line.startswith("m: chunks of ")
    assert why in line


def test_lossless_needs_no_head_dim() -> None:
    assert place(KV, codec="lossless").layout == KVLayout(4, 1, 256, "bfloat16", 128)


def test_long_names_become_digests() -> None:
    model = "m" * 2000
    found = places()[0].of(model, tuple(KV * 60))
    assert found.namespace.model.startswith("sha256:")
    assert found.namespace.layout.startswith("sha256:")
    assert found.namespace != places()[0].of(model + "2", tuple(KV * 60)).namespace
