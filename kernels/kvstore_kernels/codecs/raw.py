"""``raw``: the bytes of the block as they are, in the layout's order. 16 bits a value of bfloat16.

The only codec without parameters, and the one that an engine's own quantised cache is stored with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.base import Buffer, Encoded, WholeCodec, check_block, check_lengths
from kvstore_kernels.layout import Layout

if TYPE_CHECKING:
    import torch


class Raw(WholeCodec):
    """The block as it is."""

    def section_bytes(self, layout: Layout) -> tuple[int, ...]:
        """One section, the block."""
        return (layout.block_bytes,)

    def max_section_bytes(self, layout: Layout) -> tuple[int, ...]:
        """Exactly ``section_bytes``."""
        return self.section_bytes(layout)

    def encode(self, block: torch.Tensor, layout: Layout) -> Encoded:
        """As ``Codec.encode``."""
        check_block(block, layout)
        return Encoded([arithmetic.to_bytes(block)], 0)

    def decode(self, sections: Sequence[Buffer], layout: Layout) -> torch.Tensor:
        """As ``Codec.decode``."""
        check_lengths(sections, self.section_bytes(layout))
        return arithmetic.from_bytes(sections[0], layout.dtype, layout.shape)
