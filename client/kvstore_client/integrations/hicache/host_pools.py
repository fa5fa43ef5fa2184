"""The pages of SGLang's host pools: as strides that the kernels read and write, or as bytes.

Covers the pools of multi-head and latent attention in every memory layout whose strides are even. Others are bytes,
which no codec can make smaller. Nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore_kernels.layout import KVLayout, MLALayout
from kvstore_kernels.paged import PagedKV

__all__ = ["is_logical", "page_ids", "page_tokens_of", "paged_of", "shares_out_heads"]

_MHA: Final = ("MHATokenToKVPoolHost", "HiSparseMHATokenToKVPoolHost")
_MLA: Final = ("MLATokenToKVPoolHost",)
"""Classes by exact name: a subclass may keep a part of its pages elsewhere, as those with scales do."""

_BY_HEAD: Final = ("MHATokenToKVPoolHost", "MHATokenToKOnlyPoolHost", "MambaPoolHost")


def page_tokens_of(pool: Any) -> int:
    """Indices a page of a pool."""
    return int(getattr(pool, "page_size", 1) or 1)


def is_logical(pool: Any) -> bool:
    """Whether a pool only numbers pages that other pools hold."""
    return getattr(pool, "kv_buffer", None) is None and type(pool).__name__ == "LogicalHostPool"


def shares_out_heads(pool: Any) -> bool:
    """Whether tensor-parallel ranks hold parts of a pool's pages each, also in models whose KV they all hold."""
    return any(base.__name__ in _BY_HEAD for base in type(pool).__mro__)


def paged_of(pool: Any) -> PagedKV:
    """A host pool's pages, one a store block.

    Args:
        pool: SGLang's ``MHATokenToKVPoolHost`` or ``MLATokenToKVPoolHost``, in host memory.

    Raises:
        ValueError: its pages are no even strides; says why.
    """
    name = type(pool).__name__
    buffer: Any = getattr(pool, "kv_buffer", None)
    dtype = str(getattr(pool, "dtype", "")).removeprefix("torch.")
    if name not in (*_MHA, *_MLA) or not hasattr(buffer, "data_ptr"):
        raise ValueError(f"pages of a {name} are not known as tensors")
    if getattr(pool, "dcp_size", 1) > 1:
        raise ValueError("its pages are shared out to decode-context-parallel ranks")
    tokens = page_tokens_of(pool)
    if name in _MLA:
        latent, rotary, width = pool.kv_lora_rank, pool.qk_rope_head_dim, int(buffer.shape[-1])
        if getattr(pool, "dsa_kv_cache_store_fp8", False) or latent + rotary != width:
            raise ValueError(f"its rows of {width} elements are not a latent of {latent} and a rotary key of {rotary}")
        layers, axes = _latent_layers(pool, buffer, tokens)
        return PagedKV.from_layers(MLALayout(len(layers), latent, rotary, dtype, tokens), layers, axes)
    if getattr(pool, "v_head_dim", pool.head_dim) != pool.head_dim:
        raise ValueError(f"its keys have {pool.head_dim} channels a head, its values {pool.v_head_dim}")
    layers, axes = _head_layers(pool, buffer, tokens)
    layout = KVLayout(len(layers), pool.head_num, pool.head_dim, dtype, tokens)
    return PagedKV.from_layers(layout, layers, axes)


def _head_layers(pool: Any, buffer: Any, tokens: int) -> tuple[list[Any], str]:
    """Views of each layer, and their axes."""
    heads, dim, count, kind = pool.head_num, pool.head_dim, pool.layer_num, pool.layout
    pages = pool.size // tokens
    shapes = {
        "layer_first": (2, count, pool.size, heads, dim),
        "page_first": (2, pool.size, count, heads, dim),
        "page_first_direct": (2, pages, count, tokens, heads, dim),
        "page_head": (2, pages, heads, tokens, count, dim),
    }
    _check(kind, buffer, shapes)
    if kind == "layer_first":
        paged = buffer.view(2, count, pages, tokens, heads, dim)
        return [paged[:, layer] for layer in range(count)], "kv page token head dim"
    if kind == "page_first":
        paged = buffer.view(2, pages, tokens, count, heads, dim)
        return [paged[:, :, :, layer] for layer in range(count)], "kv page token head dim"
    if kind == "page_first_direct":
        return [buffer[:, :, layer] for layer in range(count)], "kv page token head dim"
    return [buffer[:, :, :, :, layer] for layer in range(count)], "kv page head token dim"


def _latent_layers(pool: Any, buffer: Any, tokens: int) -> tuple[list[Any], str]:
    width, count, kind = int(buffer.shape[-1]), pool.layer_num, pool.layout
    pages = pool.size // tokens
    shapes: dict[str, tuple[int, ...]] = {
        "layer_first": (count, pool.size, 1, width),
        "page_first": (pool.size, count, 1, width),
        "page_first_direct": (pages, count, tokens, 1, width),
        "page_unified": (pages, count, tokens, width),
    }
    _check(kind, buffer, shapes)
    if kind == "layer_first":
        paged = buffer.view(count, pages, tokens, width)
        return [paged[layer] for layer in range(count)], "page token dim"
    if kind == "page_first":
        paged = buffer.view(pages, tokens, count, width)
        return [paged[:, :, layer] for layer in range(count)], "page token dim"
    paged = buffer.view(pages, count, tokens, width)
    return [paged[:, layer] for layer in range(count)], "page token dim"


def _check(kind: str, buffer: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    if kind not in shapes:
        raise ValueError(f"pages of the memory layout {kind!r} are not known as tensors; known are {', '.join(shapes)}")
    if tuple(buffer.shape) != shapes[kind] or not buffer.is_contiguous():
        raise ValueError(f"its buffer of {kind} has shape {list(buffer.shape)}, expected {list(shapes[kind])}")


def page_ids(indices: object, count: int, tokens: int) -> npt.NDArray[np.int64]:
    """Pages by number, from SGLang's index of each token.

    Args:
        indices: a tensor or array of ``count * tokens`` token indices, whole pages one behind the other.
        count: how many pages there must be.
        tokens: indices a page.

    Raises:
        InvalidArgument: they are something else.
    """
    given: Any = indices
    if hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    rows = np.asarray(given)
    if rows.size != count * tokens or (rows.size and rows.dtype.kind not in "iu"):
        raise InvalidArgument(
            f"{count} pages of {tokens} tokens need {count * tokens} host indices, got {rows.size} of {rows.dtype}"
        )
    table = rows.reshape(count, tokens).astype(np.int64)
    if count and ((table[:, 0] % tokens).any() or (np.diff(table, axis=1) != 1).any()):
        raise InvalidArgument(f"host indices are not whole pages of {tokens} tokens")
    ids: npt.NDArray[np.int64] = table[:, 0] // tokens
    return ids


def pages_of(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """As ``TensorStore`` takes pages, one a block."""
    return np.asarray(ids, np.int32).reshape(-1, 1)
