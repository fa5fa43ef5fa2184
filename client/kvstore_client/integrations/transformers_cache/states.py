"""The tensors of a cache as pages of blocks, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from kvstore.errors import InvalidArgument
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

__all__ = ["States", "empty_states", "layer_of", "page_ids", "pages_of", "stream_of"]

States = list[tuple[Any, Any]]
"""Keys and values of each layer, ``[1, kv_heads, tokens, head_dim]``."""


def empty_states(layout: KVLayout, blocks: int, device: Any) -> States:
    """Memory for so many blocks, a tensor for each half of each layer: each is freed when its layer grows."""
    shape = (1, layout.num_kv_heads, blocks * layout.block_tokens, layout.head_dim)
    dtype = getattr(torch, layout.dtype)
    with torch.inference_mode(False):
        return [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(layout.num_layers)
        ]


def pages_of(layout: KVLayout, states: States) -> PagedKV:
    """Whole blocks of keys and values, in place: page n is block n.

    Raises:
        InvalidArgument: these are not of the layout.
    """
    tensors = [tensor.detach()[0] for layer in states for tensor in layer]
    if len({(tensor.shape, tensor.stride()) for tensor in tensors}) > 1:
        # A layer that grew is contiguous in its own way only where something else made its tensor: such are copied.
        tensors = [tensor.contiguous().view(-1).view(tensor.shape) for tensor in tensors]
    pages = [tensor.unflatten(1, (-1, layout.block_tokens)) for tensor in tensors]
    try:
        return PagedKV.from_layers(layout, list(zip(pages[::2], pages[1::2], strict=True)), "head page token dim")
    except ValueError as error:
        raise InvalidArgument(f"the cache is not of the model that the store was made for: {error}") from None


def page_ids(first: int, last: int) -> Any:
    """Pages of blocks ``first`` to ``last - 1`` where page n is block n, ``[blocks, 1]``."""
    return np.arange(first, last, dtype=np.int32).reshape(-1, 1)


def stream_of(device: Any) -> int | None:
    """The stream on which torch computes at the moment, None on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def layer_of(keys: Any, values: Any) -> Any:
    """A layer of a cache with these tensors as they are: its ``update`` would copy them."""
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values = keys, values
    layer.is_initialized = True
    return layer
