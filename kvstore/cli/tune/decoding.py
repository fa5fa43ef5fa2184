"""How fast this machine decodes: a second of measuring for each codec, on blocks of common shape."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Final

import numpy as np

from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

__all__ = ["measured_decoding"]

_LAYOUT: Final = KVLayout(8, 8, 128, "bfloat16", 64)
_BLOCKS: Final = 8
_ROUNDS: Final = 5


def measured_decoding(codecs: Iterable[str]) -> dict[str, float]:
    """10^9 bytes a second that come out of each codec's decoder, on all cores; the best of a few rounds.

    Args:
        codecs: names.
    """
    draw = np.random.default_rng(1)
    values = draw.standard_normal((_BLOCKS, *_LAYOUT.shape), np.float32).view(np.uint32)
    layers = (values >> np.uint32(16)).astype(np.uint16).swapaxes(0, 1)
    kv = PagedKV.from_layers(_LAYOUT, list(layers), axes="page kv token head dim")
    pages = np.arange(_BLOCKS, dtype=np.int32).reshape(-1, 1)
    rates = {}
    for name in dict.fromkeys(codecs):
        codec = get_codec(name)
        payloads = np.empty((_BLOCKS, sum(codec.max_section_bytes(_LAYOUT))), np.uint8)
        addresses = payloads.ctypes.data + np.arange(_BLOCKS, dtype=np.uint64) * np.uint64(payloads.shape[1])
        encoded = cpu.encode(codec, kv, pages, addresses)
        best = float("inf")
        for _ in range(_ROUNDS):
            begin = perf_counter()
            cpu.decode(codec, kv, pages, addresses, encoded.section_bytes)
            best = min(best, perf_counter() - begin)
        rates[name] = round(_BLOCKS * _LAYOUT.block_bytes / best / 1e9, 3)
    return rates
