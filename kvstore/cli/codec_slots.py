"""What a block would take with another codec, from what it takes now: slots are whole pages.

Loads neither numpy nor torch.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from kvstore.cli.quality.measured import measured
from kvstore.format.record import padded_bytes

__all__ = ["RAW", "WHAT_IF_CODEC", "plain_bytes", "slot_bytes_with"]

RAW: Final = "raw"
_RAW_BITS: Final = 16
WHAT_IF_CODEC: Final = "kivi4"
"""What compression would do is told of this one where no codec was asked for."""


def plain_bytes(slot_bytes: int, codec: str) -> int:
    """Bytes of a block that takes such a slot, if it were not compressed; header and padding are taken for values.

    Args:
        slot_bytes: of the block.
        codec: that it is stored with, "" for ``raw``; one that was measured.
    """
    return round(slot_bytes * _RAW_BITS / _codec_bits(codec or RAW))


def slot_bytes_with(block_bytes: int, codec: str, header_bytes: int = 0) -> int:
    """The slot of a block with a codec.

    Args:
        block_bytes: uncompressed.
        codec: its name; one that was measured.
        header_bytes: that are stored as they are.
    """
    return padded_bytes(header_bytes + round(block_bytes * _codec_bits(codec) / _RAW_BITS))


@cache
def _codec_bits(name: str) -> float:
    """Bits for each value of 16, as measured by ``kvstore quality``."""
    return measured()[name].bits
