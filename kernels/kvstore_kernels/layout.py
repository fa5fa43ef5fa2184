"""The layout of one block's KV: its axes, its shape and its size in bytes.

Covers attention with separate keys and values for each KV head: multi-head (as many KV heads as query heads),
grouped-query (fewer) and multi-query (one). How many query heads share a KV head does not change a byte of the KV, so
the layout does not hold it. Does not cover latent attention (MLA), nor where an engine keeps its KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["AXES", "ELEMENT_BYTES", "KVLayout"]

AXES: Final = ("layer", "kv", "token", "head", "dim")
"""Axes of a block, outermost first; along ``kv`` 0 is the keys (positions already applied) and 1 the values."""

ELEMENT_BYTES: Final[dict[str, int]] = {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
}
"""Bytes an element, by dtype name as torch and the record header spell it."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and size of the KV of one block, contiguous in the order of ``AXES``.

    Attributes:
        num_layers: layers that have KV, L.
        num_kv_heads: KV heads a layer, H.
        head_dim: elements a head, D.
        dtype: name of the element type, one of ``ELEMENT_BYTES``.
        block_tokens: tokens a block, T.

    Raises:
        ValueError: a count that is no whole number of at least 1, or an unknown dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_kv_heads", "head_dim", "block_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known are {', '.join(ELEMENT_BYTES)}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``[num_layers, 2, block_tokens, num_kv_heads, head_dim]``."""
        return (self.num_layers, 2, self.block_tokens, self.num_kv_heads, self.head_dim)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV in all layers: ``L * 2 * H * D * element_bytes``."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: ``T * token_bytes``."""
        return self.block_tokens * self.token_bytes

    def full_blocks(self, num_tokens: int) -> int:
        """Full blocks in a sequence; a partial tail is none."""
        return num_tokens // self.block_tokens

    @property
    def text(self) -> str:
        """Canonical text for a namespace, which names dtype and tokens a block in fields of their own.

        For example ``"gqa layers=32 kv_heads=8 head_dim=128 axes=layer.kv.token.head.dim"``. Multi-head and
        multi-query are the two ends of ``gqa`` and are called so too.
        """
        return (
            f"gqa layers={self.num_layers} kv_heads={self.num_kv_heads} head_dim={self.head_dim} axes={'.'.join(AXES)}"
        )
