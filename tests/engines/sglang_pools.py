"""SGLang's own host pools on the CPU, filled and compared; and what of its imports is played.

SGLang imports ``torchvision`` for the image processors of some models, and a build of it for the CPU's torch is not on
the package index. Where it is not installed, its place is taken by empty classes; nothing here calls one. No other
module is played: those that need a GPU are not imported by SGLang on a machine without one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

import torch


class _Played(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of one package, with an empty class for each name."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        played = name.split(".")[0] == self.package
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if played else None

    def exec_module(self, module: types.ModuleType) -> None:
        def empty(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = empty  # type: ignore[method-assign]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("torchvision") is None:
        # transformers looks whether torchvision is there, and must find that it is not.
        import transformers.image_utils  # noqa: F401

        sys.meta_path.append(_Played("torchvision"))

    from sglang.srt.managers.cache_controller import HiCacheController  # noqa: F401
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
    from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_unified")
PAGE = 64
PAGES = 12
LAYERS, HEADS, DIM = 3, 2, 64
LATENT, ROTARY = 128, 64
_CPU = torch.device("cpu")


def _pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def mha_pool(layout: str, *, page: int = PAGE, dtype: torch.dtype = torch.bfloat16, v_dim: int = DIM) -> Any:
    """A pool of multi-head attention, of ``PAGES`` pages and a spare one."""
    k = tuple(torch.zeros(page, HEADS, DIM, dtype=dtype) for _ in range(LAYERS))
    v = tuple(torch.zeros(page, HEADS, v_dim, dtype=dtype) for _ in range(LAYERS))
    buffers = KVBuffers(k=k, v=v, k_data_ptrs=_pointers(k), v_data_ptrs=_pointers(v), layout=KVBufferLayout.NHD)
    info = MHABufferInfo(
        buffers=buffers, page_size=page, head_num=HEADS, head_dim=DIM, v_head_dim=v_dim, dtype=dtype, device=_CPU
    )
    kind = MHATokenToKVPoolHost if v_dim == DIM else AsymmetricMHATokenToKVPoolHost
    return kind(
        info,
        1.0,
        0,
        page,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGES * page,
        start_layer=0,
        end_layer=LAYERS,
    )


def mla_pool(layout: str, *, page: int = PAGE, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A pool of latent attention."""
    width = LATENT + ROTARY
    rows = tuple(torch.zeros(page, 1, width, dtype=dtype) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=page,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROTARY,
        kv_cache_dim=width,
        dtype=dtype,
        device=_CPU,
    )
    return MLATokenToKVPoolHost(
        info,
        1.0,
        0,
        page,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGES * page,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )


def mamba_pool() -> Any:
    """SGLang's ``MambaPoolHost`` with its buffers, made without the device pool that it mirrors."""
    pool = object.__new__(MambaPoolHost)
    pool.layout, pool.page_size, pool.dtype, pool.device, pool.pin_memory = "page_first", 1, torch.float32, "cpu", False
    pool.num_mamba_layers, pool.slot_state_device_tensors, pool.slot_state_buffers = 2, [], []
    pool.temporal_dtype, pool.temporal_state_elem_size = torch.float32, 24
    pool.conv_dtype, pool.conv_state_elem_sizes, pool.conv_state_shapes = torch.bfloat16, [10], [(2, 5)]
    pool.temporal_buffer = torch.randn(6, 2, 24)
    pool.conv_buffer = [torch.randn(6, 2, 10).to(torch.bfloat16)]
    pool.kv_buffer = [pool.temporal_buffer, *pool.conv_buffer]
    pool.layer_num = pool.start_layer = pool.end_layer = 0
    return pool


def fill(pool: Any, seed: int = 0) -> None:
    """Random values in all pages."""
    generator = torch.Generator().manual_seed(seed)
    for buffer in buffers_of(pool):
        buffer.copy_(torch.randn(buffer.shape, generator=generator).to(buffer.dtype))


def wipe(pool: Any) -> None:
    """Something else in all pages."""
    for buffer in buffers_of(pool):
        buffer.fill_(7)


def buffers_of(pool: Any) -> list[torch.Tensor]:
    """The pool's memory."""
    return list(pool.kv_buffer) if isinstance(pool.kv_buffer, tuple) else [pool.kv_buffer]


def page_of(pool: Any, page: int) -> torch.Tensor:
    """A copy of one page: ``[kv, layer, token, head, dim]`` or ``[layer, token, dim]``, whatever the memory layout."""
    buffer, at, kind = pool.kv_buffer, page * pool.page_size, pool.layout
    rows = slice(at, at + pool.page_size)
    if isinstance(pool, MLATokenToKVPoolHost):
        if kind == "layer_first":
            return buffer[:, rows, 0].clone()
        if kind == "page_first":
            return buffer[rows, :, 0].transpose(0, 1).clone()
        return buffer[page].reshape(LAYERS, pool.page_size, -1).clone()
    if kind == "layer_first":
        return buffer[:, :, rows].clone()
    if kind == "page_first":
        return buffer[:, rows].transpose(1, 2).clone()
    if kind == "page_first_direct":
        return buffer[:, page].clone()
    return buffer[:, page].permute(0, 3, 2, 1, 4).clone()


def indices_of(pool: Any, pages: list[int]) -> torch.Tensor:
    """The index of each token of pages, as SGLang hands them over."""
    rows = torch.arange(pool.page_size, dtype=torch.int64)
    return torch.cat([page * pool.page_size + rows for page in pages])


def config(extra: dict[str, Any] | None = None, **changes: Any) -> HiCacheStorageConfig:
    """As the controller makes it, of one rank unless told otherwise."""
    given: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "test/model",
        "extra_config": extra,
    }
    return HiCacheStorageConfig(**(given | changes))
