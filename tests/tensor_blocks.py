"""Tensor stores for tests: KV with a known answer, caches in pages, records that no store would write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from kvstore.format.record import checksum, decode_header, encode_header
from kvstore.protocol.messages import PutStatus
from kvstore_client import Client
from kvstore_client.tensors import TensorStore
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout, Layout, MLALayout
from kvstore_kernels.paged import PagedKV

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=64)
LATENT = MLALayout(num_layers=2, latent_dim=128, rotary_dim=64, dtype="bfloat16", block_tokens=64)


def kv_of(layout: Layout, blocks: int, seed: int = 0) -> torch.Tensor:
    """Blocks side by side in one tensor, each of other numbers."""
    parts = [
        torch.randn(layout.shape, generator=torch.Generator().manual_seed(1000 * seed + block))
        for block in range(blocks)
    ]
    return torch.cat(parts, dim=token_axis(layout)).to(getattr(torch, layout.dtype))


def token_axis(layout: Layout) -> int:
    return 1 if isinstance(layout, MLALayout) else 2


def block_of(kv: torch.Tensor, layout: Layout, block: int) -> torch.Tensor:
    return kv.narrow(token_axis(layout), block * layout.block_tokens, layout.block_tokens)


def decoded(kv: torch.Tensor, layout: Layout, codec: str) -> torch.Tensor:
    """What a codec's reference makes of blocks and back."""
    reference = get_codec(codec)
    blocks = kv.shape[token_axis(layout)] // layout.block_tokens
    parts = [
        reference.decode(reference.encode(block_of(kv, layout, block), layout).sections, layout)
        for block in range(blocks)
    ]
    return torch.cat(parts, dim=token_axis(layout))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def filled(tensor: torch.Tensor) -> torch.Tensor:
    """Memory like a tensor's, in which nothing is right yet."""
    return torch.full_like(tensor, 7)


def pages_in(kv: torch.Tensor, layout: KVLayout, axes: str, page_tokens: int, spare: int, seed: int) -> Pages:
    """A paged cache with the blocks of a tensor in pages in any order, and some more pages."""
    count = kv.shape[2] // page_tokens
    order = np.random.default_rng(seed).permutation(count + spare)[:count].astype(np.int32)
    cache = Pages(layout, axes, page_tokens, count + spare, order.reshape(-1, layout.block_tokens // page_tokens))
    cache.fill(kv)
    return cache


class Pages:
    """A paged cache with one tensor a layer.

    Attributes:
        layers: the tensors.
        pages: page ids of each block.
        kv: as kernels see it.
    """

    def __init__(self, layout: KVLayout, axes: str, page_tokens: int, num_pages: int, pages: Any) -> None:
        self.layout = layout
        self.pages = pages
        size = {
            "kv": 2, "page": num_pages, "token": page_tokens, "head": layout.num_kv_heads, "dim": layout.head_dim
        }  # fmt: skip
        self._axes = axes.split()
        dtype = getattr(torch, layout.dtype)
        self.layers = [
            torch.full([size[axis] for axis in self._axes], 7, dtype=dtype) for _ in range(layout.num_layers)
        ]
        self.kv = PagedKV.from_layers(layout, self.layers, axes)

    def _page(self, layer: int, page: int) -> torch.Tensor:
        """``[2, token, head, dim]``."""
        tensor = self.layers[layer].select(self._axes.index("page"), page)
        axes = [axis for axis in self._axes if axis != "page"]
        return tensor.permute([axes.index(axis) for axis in ("kv", "token", "head", "dim")])

    def fill(self, kv: torch.Tensor) -> None:
        """Copy blocks side by side in one tensor into their pages."""
        tokens = self.kv.page_tokens
        for place, page in enumerate(self.pages.reshape(-1).tolist()):
            for layer in range(len(self.layers)):
                self._page(layer, page).copy_(kv[layer, :, place * tokens : (place + 1) * tokens])

    def read(self) -> torch.Tensor:
        """The blocks side by side in one tensor."""
        parts = [
            torch.stack([self._page(layer, page) for layer in range(len(self.layers))])
            for page in self.pages.reshape(-1).tolist()
        ]
        return torch.cat(parts, dim=2)

    def untouched(self) -> bool:
        """Whether pages of no block hold what they held."""
        others = set(range(self.kv.num_pages)) - set(self.pages.reshape(-1).tolist())
        return all(bool((self._page(layer, page) == 7).all()) for layer in range(len(self.layers)) for page in others)


def put_record(
    client: Client,
    key: bytes,
    payload: bytes,
    header: bytes,
) -> PutStatus:
    """Store a record by sending it, whatever its header says."""
    operations, session = client._operations, client._session
    asks = operations.record_asks([header], [memoryview(payload)], 0, b"")
    (answer,) = client._run(operations.send_puts(asks, 1, session.digest))
    return PutStatus(answer & 0xFF)


def header_of(
    store: TensorStore,
    key: bytes,
    payload: bytes,
    lengths: Sequence[int],
    parent: bytes = bytes(32),
    **changes: Any,
) -> bytes:
    """The header that a store would write for a payload, with changes."""
    header = store._plan.records.header(
        key,
        parent,
        store.client._session.digest,
        store.part,
        section_bytes=lengths,
        payload_checksum=checksum(payload),
    )
    return encode_header(msgspec.structs.replace(decode_header(header), **changes))


class Intercepted:
    """Kernels of a backend, with something done before or after each call.

    Attributes:
        encoded, decoded: blocks that went through.
        group_blocks: most blocks of one call of the encoder.
    """

    group_blocks = 3

    def __init__(
        self, backend: Any, *, encode: Callable[[], None] | None = None, decode: Callable[[], None] | None = None
    ):
        self._backend = backend
        self._on_encode = encode
        self._on_decode = decode
        self.encoded = self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, codec: Any, kv: Any, pages: Any, payloads: Any, stream: Any) -> Any:
        result = self._backend.encode(codec, kv, pages, payloads, stream)
        self.encoded += len(pages)
        if self._on_encode is not None:
            self._on_encode()
        return result

    def decode(self, codec: Any, kv: Any, pages: Any, payloads: Any, section_bytes: Any, stream: Any) -> None:
        self._backend.decode(codec, kv, pages, payloads, section_bytes, stream)
        self.decoded += len(pages)
        if self._on_decode is not None:
            self._on_decode()


def intercept(store: Any, **calls: Callable[[], None]) -> Intercepted:
    """Put something between a store and the CPU's kernels."""
    kv = PagedKV.from_tensor(store.layout, kv_of(store.layout, 1))
    intercepted = Intercepted(store._backend(kv), **calls)
    store._backends["cpu"] = intercepted
    return intercepted
