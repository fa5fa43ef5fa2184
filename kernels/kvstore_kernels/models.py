"""The KV of a whole model: groups of layers that share a layout and a reach, their bytes, and how long these travel.

A model whose layers are alike has one group. Hybrid models have several: layers with a sliding window need only the
newest tokens of a prefix, layers that keep a state need only the newest block. Covers sizes with and without a codec;
``model_config`` makes a model's groups from its ``config.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import Layout

__all__ = ["ALL", "LAST", "LayerGroup", "ModelLayout", "Reach", "transfer_s", "window"]


@dataclass(frozen=True, slots=True)
class Reach:
    """How much of a prefix the layers of a group need to go on.

    Attributes:
        kind: ``"all"``, ``"window"`` (the newest tokens), or ``"last"`` (the newest block).
        window_tokens: tokens of the window; 0 for the others.
    """

    kind: str
    window_tokens: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("all", "window", "last"):
            raise ValueError(f"unknown reach {self.kind!r}; known are all, window, last")
        if (self.window_tokens > 0) != (self.kind == "window"):
            raise ValueError(f"a reach of kind {self.kind!r} cannot have a window of {self.window_tokens} tokens")

    def __str__(self) -> str:
        return f"window({self.window_tokens})" if self.kind == "window" else self.kind

    def blocks(self, num_blocks: int, block_tokens: int) -> int:
        """Blocks that are needed of a prefix of full blocks."""
        if self.kind == "all":
            return num_blocks
        return min(num_blocks, 1 if self.kind == "last" else -(-self.window_tokens // block_tokens))


ALL: Final = Reach("all")
LAST: Final = Reach("last")


def window(tokens: int) -> Reach:
    """The newest tokens of a prefix."""
    return Reach("window", tokens)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV is stored together.

    Attributes:
        name: unique in the model.
        layers: indices of the layers in the model, ascending.
        layout: of a block of these layers.
        reach: how much of a prefix they need.
    """

    name: str
    layers: tuple[int, ...]
    layout: Layout
    reach: Reach

    def __post_init__(self) -> None:
        if len(self.layers) != self.layout.num_layers:
            raise ValueError(
                f"group {self.name} has {len(self.layers)} layers, and a layout of {self.layout.num_layers}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the layers of group {self.name} must ascend, got {list(self.layers)}")


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """All KV groups of a model; they have one number of tokens a block.

    Attributes:
        groups: at least one, with names and layers of their own.
    """

    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a model has at least one group of layers with KV")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"two groups share a name: {', '.join(names)}")
        layers = [layer for group in self.groups for layer in group.layers]
        if len(set(layers)) < len(layers):
            raise ValueError("two groups share a layer")
        if len({group.layout.block_tokens for group in self.groups}) > 1:
            raise ValueError("all groups of a model must have the same block_tokens")

    @property
    def block_tokens(self) -> int:
        """Tokens a block."""
        return self.groups[0].layout.block_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV in all groups, as the engine holds it."""
        return sum(group.layout.token_bytes for group in self.groups)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all groups, as the engine holds it."""
        return sum(group.layout.block_bytes for group in self.groups)

    def check(self, codec: Codec) -> None:
        """Whether a codec can store every group.

        Raises:
            ValueError: it cannot.
        """
        for group in self.groups:
            try:
                codec.check(group.layout)
            except ValueError as error:
                raise ValueError(f"group {group.name}: {error}") from None

    def payload_bytes(self, codec: Codec) -> int | None:
        """Bytes of one block in all groups as a codec stores it, without headers; None where the data decides.

        Raises:
            ValueError: the codec cannot store the model.
        """
        self.check(codec)
        sections = [codec.section_bytes(group.layout) for group in self.groups]
        return None if None in sections else sum(sum(lengths) for lengths in sections if lengths is not None)

    def prefix_bytes(self, num_tokens: int, codec: Codec | None = None) -> int | None:
        """Bytes to move so that a prefix can be gone on with: its full blocks, of each group those in its reach.

        Args:
            num_tokens: tokens of the prefix; a partial tail counts for nothing.
            codec: stores them; left out, as the engine holds them.

        Returns:
            Bytes without headers, None where they depend on the data.

        Raises:
            ValueError: the codec cannot store the model.
        """
        if codec is not None:
            self.check(codec)
        total = 0
        for group in self.groups:
            sections = (group.layout.block_bytes,) if codec is None else codec.section_bytes(group.layout)
            if sections is None:
                return None
            num_blocks = group.layout.full_blocks(num_tokens)
            total += group.reach.blocks(num_blocks, self.block_tokens) * sum(sections)
        return total


def transfer_s(num_bytes: int, link_gb_per_s: float, latency_s: float = 0.0) -> float:
    """Seconds that bytes take over a link: ``latency + bytes / bandwidth``.

    Args:
        num_bytes: to move.
        link_gb_per_s: bandwidth in 10^9 bytes a second.
        latency_s: until the first byte arrives.

    Raises:
        ValueError: no bandwidth, or a negative number.
    """
    if not (link_gb_per_s > 0 and latency_s >= 0 and num_bytes >= 0 and math.isfinite(latency_s)):
        raise ValueError(
            f"bandwidth must be above 0, bytes and latency not below; "
            f"got {num_bytes} bytes, {link_gb_per_s} GB/s, {latency_s} s"
        )
    return latency_s + num_bytes / (link_gb_per_s * 1e9)
