"""Host pools with the face of SGLang's, in host memory, and with the names by which those are told apart."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LogicalHostPool", "MHATokenToKVPoolHost", "MLATokenToKVPoolHost", "MambaPoolHost", "OtherPoolHost"]


class MHATokenToKVPoolHost:
    """Keys and values by head; one tensor for all pages."""

    def __init__(
        self, layout: str, *, pages: int = 6, page_size: int = 64, layers: int = 2, heads: int = 2, dim: int = 64
    ) -> None:
        self.layout, self.page_size, self.dtype = layout, page_size, torch.bfloat16
        self.layer_num, self.head_num, self.head_dim, self.size = layers, heads, dim, pages * page_size
        self.start_layer, self.end_layer = 0, layers
        shapes = {
            "layer_first": (2, layers, self.size, heads, dim),
            "page_first": (2, self.size, layers, heads, dim),
            "page_first_direct": (2, pages, layers, page_size, heads, dim),
            "page_head": (2, pages, heads, page_size, layers, dim),
        }
        self.kv_buffer = torch.randn(shapes.get(layout, shapes["page_first"])).to(self.dtype)

    def page(self, page: int) -> torch.Tensor:
        """A copy of a page: ``[kv, layer, token, head, dim]``."""
        rows = slice(page * self.page_size, (page + 1) * self.page_size)
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, rows].clone()
        if self.layout == "page_first":
            return self.kv_buffer[:, rows].transpose(1, 2).clone()
        if self.layout == "page_first_direct":
            return self.kv_buffer[:, page].clone()
        return self.kv_buffer[:, page].permute(0, 3, 2, 1, 4).clone()


class MLATokenToKVPoolHost:
    """One latent and rotary key a token."""

    def __init__(
        self, layout: str, *, pages: int = 6, page_size: int = 64, layers: int = 2, latent: int = 128, rotary: int = 64
    ) -> None:
        self.layout, self.page_size, self.dtype = layout, page_size, torch.bfloat16
        self.layer_num, self.size = layers, pages * page_size
        self.kv_lora_rank, self.qk_rope_head_dim = latent, rotary
        width = latent + rotary
        shapes: dict[str, tuple[int, ...]] = {
            "layer_first": (layers, self.size, 1, width),
            "page_first": (self.size, layers, 1, width),
            "page_first_direct": (pages, layers, page_size, 1, width),
            "page_unified": (pages, layers, page_size, width),
        }
        self.kv_buffer = torch.randn(shapes[layout]).to(self.dtype)


class MHATokenToKVPoolMXFP8Host(MHATokenToKVPoolHost):
    """As SGLang's: the scales of its pages are elsewhere."""


class LogicalHostPool:
    """Numbers pages that other pools hold."""

    kv_buffer = None
    page_size = 64


class MambaPoolHost:
    """Two tensors a state, and addresses of both."""

    def __init__(self, slots: int = 6) -> None:
        self.layout, self.page_size, self.dtype, self.layer_num = "page_first", 1, torch.float32, 2
        self.temporal, self.conv = torch.randn(slots, 24), torch.randn(slots, 10).to(torch.bfloat16)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """Address and size of each piece, page by page."""
        pointers, sizes = [], []
        for at in indices.tolist():
            for tensor in (self.temporal, self.conv):
                pointers.append(tensor[at].data_ptr())
                sizes.append(tensor[at].nbytes)
        return pointers, sizes


class OtherPoolHost:
    """A page of one piece, which it copies itself; by address it has none."""

    def __init__(self, pages: int = 6, page_size: int = 4, width: int = 16) -> None:
        self.layout, self.page_size, self.dtype = "layer_first", page_size, torch.float32
        self.kv_buffer = torch.randn(pages * page_size, width)

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """As SGLang's pools do for layouts that they do not tell."""
        raise ValueError(f"Unsupported layout: {self.layout}")

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """A copy of the page that begins at a token."""
        return self.kv_buffer[int(index) : int(index) + self.page_size].flatten()

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """A page to be written."""
        return torch.zeros(self.page_size * self.kv_buffer.shape[1])

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Take a page."""
        self.kv_buffer[int(index) : int(index) + self.page_size] = data_page.reshape(self.page_size, -1)
