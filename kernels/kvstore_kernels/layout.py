"""The layout of one block's KV: its axes, its shape, its size in bytes, and the planes that codecs work on.

Covers attention with separate keys and values for each KV head (multi-head has as many KV heads as query heads,
grouped-query fewer, multi-query one: how many query heads share a KV head does not change a byte of the KV, so the
layout does not hold it), and latent attention (MLA), whose KV is one compressed latent and one rotary key a token.
Models that mix kinds of layers have one layout a group (``models``). Does not cover where an engine keeps its KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

__all__ = ["AXES", "ELEMENT_BYTES", "MLA_AXES", "KVLayout", "Layout", "MLALayout", "Planes", "Role", "Rule"]

AXES: Final = ("layer", "kv", "token", "head", "dim")
"""Axes of a block, outermost first; along ``kv`` 0 is the keys (positions already applied) and 1 the values."""

MLA_AXES: Final = ("layer", "token", "dim")
"""Axes of a block of latent attention; along ``dim`` the latent comes first, then the rotary key."""

ELEMENT_BYTES: Final[dict[str, int]] = {
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
}
"""Bytes an element, by dtype name as torch and the record header spell it."""

_LATENT_DIMS: Final = (128, 64)
"""Widths of the planes that a latent is cut into; the first that divides it."""


class Role(StrEnum):
    """What the planes of a section are to attention."""

    KEY = "key"
    VALUE = "value"
    LATENT = "latent"
    ROTARY = "rotary"


class Rule(StrEnum):
    """How a codec groups the numbers of a plane: each channel over tokens, each token over channels, or not at all."""

    CHANNEL = "channel"
    TOKEN = "token"
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Planes:
    """The planes of one role: ``num_layers * num_heads`` matrices ``[block_tokens, dim]``.

    Attributes:
        role: what they are.
        rule: how codecs group their numbers.
        num_layers: layers, L.
        num_heads: planes a layer, H.
        dim: channels of a plane, D.
        dtype: name of the element type.
    """

    role: Role
    rule: Rule
    num_layers: int
    num_heads: int
    dim: int
    dtype: str


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
        _check_counts(self, ("num_layers", "num_kv_heads", "head_dim", "block_tokens"))

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
    def planes(self) -> tuple[Planes, ...]:
        """Keys by channel and values by token, one plane a layer and head."""
        return (
            Planes(Role.KEY, Rule.CHANNEL, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype),
            Planes(Role.VALUE, Rule.TOKEN, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype),
        )

    def check_lossy(self) -> None:
        """What a layout must be for any lossy codec; a codec asks for more.

        Raises:
            ValueError: it is not.
        """

    def split(self, block: Any) -> tuple[Any, ...]:
        """Views ``[num_layers, num_heads, block_tokens, dim]`` of a block, one for each of ``planes``.

        Args:
            block: numpy array or torch tensor of ``shape``; writing to a view writes to it.
        """
        _check_shape(block, self.shape)
        return block[:, 0].swapaxes(1, 2), block[:, 1].swapaxes(1, 2)

    @property
    def text(self) -> str:
        """Canonical text for a namespace, which names dtype and tokens a block in fields of their own.

        For example ``"gqa layers=32 kv_heads=8 head_dim=128 axes=layer.kv.token.head.dim"``. Multi-head and
        multi-query are the two ends of ``gqa`` and are called so too.
        """
        return (
            f"gqa layers={self.num_layers} kv_heads={self.num_kv_heads} head_dim={self.head_dim} axes={'.'.join(AXES)}"
        )


@dataclass(frozen=True, slots=True)
class MLALayout:
    """Shape and size of the KV of one block of latent attention, contiguous in the order of ``MLA_AXES``.

    Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps for each token and layer one latent, from which
    keys and values of all heads are computed, and one key with rotary positions that all heads share.

    Attributes:
        num_layers: layers that have KV, L.
        latent_dim: elements of the latent, the model's ``kv_lora_rank``.
        rotary_dim: elements of the rotary key, the model's ``qk_rope_head_dim``.
        dtype: name of the element type, one of ``ELEMENT_BYTES``.
        block_tokens: tokens a block, T.

    Raises:
        ValueError: a count that is no whole number of at least 1, or an unknown dtype.
    """

    num_layers: int
    latent_dim: int
    rotary_dim: int
    dtype: str
    block_tokens: int

    def __post_init__(self) -> None:
        _check_counts(self, ("num_layers", "latent_dim", "rotary_dim", "block_tokens"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[num_layers, block_tokens, latent_dim + rotary_dim]``."""
        return (self.num_layers, self.block_tokens, self.latent_dim + self.rotary_dim)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV in all layers: ``L * (latent_dim + rotary_dim) * element_bytes``."""
        return self.num_layers * (self.latent_dim + self.rotary_dim) * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: ``T * token_bytes``."""
        return self.block_tokens * self.token_bytes

    def full_blocks(self, num_tokens: int) -> int:
        """Full blocks in a sequence; a partial tail is none."""
        return num_tokens // self.block_tokens

    @property
    def planes(self) -> tuple[Planes, ...]:
        """The latent, cut into planes of 128 or 64 channels, and the rotary key, which lossy codecs keep as it is.

        A latent that neither of them divides is one plane, which lossy codecs do not take (``check_lossy``).
        """
        dim = self._latent_plane_dim()
        return (
            Planes(Role.LATENT, Rule.CHANNEL, self.num_layers, self.latent_dim // dim, dim, self.dtype),
            Planes(Role.ROTARY, Rule.EXACT, self.num_layers, 1, self.rotary_dim, self.dtype),
        )

    def split(self, block: Any) -> tuple[Any, ...]:
        """Views ``[num_layers, num_heads, block_tokens, dim]`` of a block, one for each of ``planes``.

        Args:
            block: numpy array or torch tensor of ``shape``; writing to a view writes to it.
        """
        _check_shape(block, self.shape)
        dim = self._latent_plane_dim()
        latent = block[..., : self.latent_dim].reshape(self.num_layers, self.block_tokens, -1, dim)
        return latent.swapaxes(1, 2), block[:, None, :, self.latent_dim :]

    @property
    def text(self) -> str:
        """Canonical text for a namespace, which names dtype and tokens a block in fields of their own.

        For example ``"mla layers=61 latent=512 rotary=64 axes=layer.token.dim"``.
        """
        return (
            f"mla layers={self.num_layers} latent={self.latent_dim} rotary={self.rotary_dim} axes={'.'.join(MLA_AXES)}"
        )

    def check_lossy(self) -> None:
        """As ``KVLayout.check_lossy``."""
        if self._latent_plane_dim() not in _LATENT_DIMS:
            raise ValueError(
                f"a latent of {self.latent_dim} elements cannot be cut into planes of 128 or 64; "
                "store it with an exact codec (raw, lossless)"
            )

    def _latent_plane_dim(self) -> int:
        return next((dim for dim in _LATENT_DIMS if self.latent_dim % dim == 0), self.latent_dim)


Layout = KVLayout | MLALayout
"""Any layout of a block."""


def _check_counts(layout: Layout, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(layout, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
    if layout.dtype not in ELEMENT_BYTES:
        raise ValueError(f"unknown dtype {layout.dtype!r}; known are {', '.join(ELEMENT_BYTES)}")


def _check_shape(block: Any, shape: tuple[int, ...]) -> None:
    if tuple(block.shape) != shape:
        raise ValueError(f"a block of this layout has shape {list(shape)}, got {list(block.shape)}")
