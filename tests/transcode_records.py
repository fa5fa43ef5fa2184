"""Records for tests of transcoding: raw ones of any bytes, lossless ones of any layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvstore.format.constants import DTYPE_SIZES, FIDELITY_EXACT, CodecId
from kvstore.format.record import checksum, encode_header, raw_header, record_header
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.layout import Layout

KEY, PARENT, NAMESPACE = b"k" * 32, b"p" * 32, b"n" * 32


def raw_record(
    payload: bytes, dtype: str = "uint8", shape: Sequence[int] | None = None, *, lineage: int = 255, part: int = 3
) -> bytes:
    if shape is None:
        shape = (len(payload) // DTYPE_SIZES[dtype],)
    header = raw_header(
        key=KEY, parent_key=PARENT, namespace_digest=NAMESPACE, part=part, payload=payload, dtype=dtype, shape=shape,
        token_count=64, lineage=lineage,
    )  # fmt: skip
    return encode_header(header) + payload


def lossless_record(block: torch.Tensor, layout: Layout, codec: str = "lossless", *, lineage: int = 255) -> bytes:
    """As a tensor store writes it."""
    (section,) = get_codec(codec).encode(block, layout).sections
    header = record_header(
        key=KEY, parent_key=PARENT, namespace_digest=NAMESPACE, part=3, codec=CodecId(get_codec(codec).id),
        codec_parameters=get_codec(codec).digest, fidelity=FIDELITY_EXACT, dtype=layout.dtype, shape=layout.shape,
        section_bytes=(len(section),), payload_checksum=checksum(section), token_count=layout.block_tokens,
        lineage=lineage,
    )  # fmt: skip
    return encode_header(header) + bytes(section)


def kv_bytes(values: int, dtype: str = "bfloat16", seed: int = 0) -> bytes:
    """Normal numbers."""
    numbers = np.random.default_rng(seed).standard_normal(values, np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return numbers.astype(dtype).tobytes()


def payload_of(kind: str, length: int, seed: int) -> bytes:
    """Bytes of a kind: what compresses well, a little, not at all, or only taken apart by two or by four."""
    random = np.random.default_rng(seed)
    if kind == "zeros":
        return bytes(length)
    if kind == "noise":
        return random.bytes(length)
    if kind == "period":
        period = random.bytes(int(random.integers(1, 100)))
        return (period * (length // len(period) + 1))[:length]
    if kind == "special":
        # Zeros of both signs, denormals, infinities and NaN with payloads, of each width.
        patterns = [0, 1, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0x7C00, 0x0001, 0x7F800000, 0xFFC00001, 0x80000000]
        words = random.choice(np.array(patterns, np.uint32), length // 4 + 1)
        return words.tobytes()[:length]
    values = math.ceil(length / DTYPE_SIZES[kind])
    return kv_bytes(values, kind, seed)[:length]
