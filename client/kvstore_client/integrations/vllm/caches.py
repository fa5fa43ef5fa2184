"""A worker's KV cache tensors as pages that blocks are encoded from and decoded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.vllm.model import EngineGroup
from kvstore_kernels.layout import MLALayout
from kvstore_kernels.paged import PagedKV

__all__ = ["GroupCache"]


@dataclass(frozen=True, slots=True)
class GroupCache:
    """The tensors of one KV group.

    Attributes:
        group: which.
        pages: of the engine.
        spare: one store block's pages beside the cache, for blocks of which only some pages may be written.
        tensors: of the engine, ``[num_pages, ...]``.
        spare_tensors: of the spare pages, alike.
    """

    group: EngineGroup
    pages: PagedKV
    spare: PagedKV
    tensors: tuple[torch.Tensor, ...]
    spare_tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, group: EngineGroup, kv_caches: Mapping[str, torch.Tensor]) -> GroupCache:
        """Describe the tensors that vLLM registered; nothing is copied.

        Args:
            group: whose layers.
            kv_caches: layer name to ``[num_pages, num_kv_heads, page_tokens, 2 * head_dim]``, or ``[num_pages, 1,
                page_tokens, latent_dim + rotary_dim]`` of latent attention, in any order of strides.

        Raises:
            InvalidArgument: a layer is missing, or its tensor is not what vLLM says of it.
        """
        missing = [name for name in group.layer_names if name not in kv_caches]
        if missing:
            raise InvalidArgument(f"vLLM registered no KV cache of layer {missing[0]!r} of KV group {group.index}")
        tensors = tuple(kv_caches[name] for name in group.layer_names)
        block_pages = group.layout.block_tokens // group.page_tokens
        spare = tuple(torch.zeros_like(tensor[:block_pages]) for tensor in tensors)
        try:
            return cls(group, _paged(group, tensors), _paged(group, spare), tensors, spare)
        except ValueError as error:
            raise InvalidArgument(
                f"the KV cache of layer {group.layer_names[0]!r} is not laid out as vLLM 0.32 and 0.33 do: {error}"
            ) from None

    @property
    def block_pages(self) -> int:
        """Pages of a store block."""
        return self.pages.block_pages

    def copy_spare(self, places: Sequence[int], pages: Sequence[int]) -> None:
        """Copy pages of the spare block into the cache.

        Args:
            places: of the pages in the spare block.
            pages: of the cache, as many; written to.
        """
        device = self.tensors[0].device
        source, target = torch.tensor(places, device=device), torch.tensor(pages, device=device)
        for tensor, spare in zip(self.tensors, self.spare_tensors, strict=True):
            tensor[target] = spare[source]


def _paged(group: EngineGroup, tensors: Sequence[torch.Tensor]) -> PagedKV:
    layout: Any = group.layout
    if group.opaque:
        return PagedKV.from_layers(layout, [_bytes_of(tensor, group) for tensor in tensors], "page token kv head dim")
    if isinstance(layout, MLALayout):
        flat = [tensor.squeeze(1) if tensor.dim() == 4 else tensor for tensor in tensors]
        return PagedKV.from_layers(layout, flat, "page token dim")
    if tensors[0].device.type == "cpu":
        return PagedKV.from_vllm_cpu(layout, tensors)
    pairs = [tuple(tensor.split(layout.head_dim, dim=-1)) for tensor in tensors]
    return PagedKV.from_layers(layout, pairs, "page head token dim")


def _bytes_of(tensor: torch.Tensor, group: EngineGroup) -> torch.Tensor:
    """Pages as bytes ``[pages, page_tokens, 2, 1, half]``: a page's bytes side by side, cut evenly."""
    pages = tensor.shape[0]
    raw = tensor.view(torch.uint8)
    if not raw[0].is_contiguous():
        raise ValueError("pages that the engine packed must be contiguous each")
    half = group.layout.shape[-1]
    shape = (pages, group.page_tokens, 2, 1, half)
    strides = (raw.stride(0), 2 * half, half, half, 1)
    return raw.as_strided(shape, strides, raw.storage_offset())
