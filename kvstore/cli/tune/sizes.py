"""Bytes of a block: what its slot takes, with each codec."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.cli.codec_slots import RAW, plain_bytes, slot_bytes_with
from kvstore.cli.model_files import read_model
from kvstore.cli.quality.measured import measured
from kvstore.cli.render import size
from kvstore.cli.tune.options import Capacity
from kvstore.errors import InvalidArgument
from kvstore.format.constants import RECORD_HEADER_BYTES
from kvstore.format.record import padded_bytes
from kvstore_kernels.codecs import Codec, get_codec
from kvstore_kernels.models import ModelLayout

__all__ = ["RAW", "BlockSizes", "given_sizes", "model_sizes", "recorded_sizes"]


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """What a block takes.

    Attributes:
        source: where the sizes come from, for people.
        block_bytes: as the engine holds it.
        slot_bytes: of DRAM or SSD, by codec; ``raw`` is always there.
    """

    source: str
    block_bytes: int
    slot_bytes: dict[str, int]

    def bytes_of(self, capacity: Capacity) -> int:
        """Bytes of a capacity, which may be given in uncompressed blocks."""
        return capacity.size_bytes or capacity.blocks * self.slot_bytes[RAW]

    def too_small(self, option: str, given_bytes: int, codec: str) -> InvalidArgument:
        """The error for a capacity that holds no block of a codec."""
        return InvalidArgument(
            f"{option}: {size(given_bytes)} cannot hold a block: one takes {size(self.slot_bytes[codec])} with {codec} "
            f"({self.source}); see --model and --block-bytes"
        )


def model_sizes(model: str, block_tokens: int, codecs: Sequence[str], *, also: str | None = None) -> BlockSizes:
    """Sizes of a model's KV.

    Args:
        model: what ``kvstore layout`` takes.
        block_tokens: tokens a block.
        codecs: names of codecs.
        also: one more, which is left out if it cannot store the model.

    Raises:
        InvalidArgument: no such model, or a codec cannot store it.
    """
    layout = read_model(model, block_tokens)
    slots = {name: _model_slot(model, layout, get_codec(name)) for name in dict.fromkeys((RAW, *codecs))}
    if also is not None and also not in slots:
        with contextlib.suppress(InvalidArgument):
            slots[also] = _model_slot(model, layout, get_codec(also))
    return BlockSizes(f"{model}, {layout.groups[0].layout.dtype}", layout.block_bytes, slots)


def given_sizes(block_bytes: int, codecs: Sequence[str]) -> BlockSizes:
    """Sizes from that of a block of 16-bit values, by the bits that codecs take for a value of common layouts."""
    slots = {name: slot_bytes_with(block_bytes, name, RECORD_HEADER_BYTES) for name in dict.fromkeys((RAW, *codecs))}
    return BlockSizes("as given", block_bytes, slots)


def recorded_sizes(slot_bytes: int, codec: str, codecs: Sequence[str]) -> BlockSizes:
    """Sizes from what blocks took where they were recorded.

    Args:
        slot_bytes: of a block.
        codec: that it was stored with, "" for several, which are taken for ``raw``.
        codecs: names of codecs.

    Raises:
        InvalidArgument: nothing is known of that codec.
    """
    if codec and codec not in measured():
        raise InvalidArgument(
            f"the trace has blocks of the codec {codec!r}, unknown here; give --model or --block-bytes"
        )
    block_bytes = plain_bytes(slot_bytes, codec)
    sizes = given_sizes(block_bytes, codecs)
    # A slot has its header and padding already.
    slots = {name: slot_bytes_with(block_bytes, name) for name in sizes.slot_bytes}
    return BlockSizes("as recorded", block_bytes, slots)


def _model_slot(model: str, layout: ModelLayout, codec: Codec) -> int:
    total = 0
    for group in layout.groups:
        try:
            codec.check(group.layout)
        except ValueError as wrong:
            raise InvalidArgument(f"--codecs: {codec.name} cannot store {model}: {wrong}") from None
        sections = codec.section_bytes(group.layout)
        if sections is None:
            total += slot_bytes_with(group.layout.block_bytes, codec.name, RECORD_HEADER_BYTES)
        else:
            total += padded_bytes(RECORD_HEADER_BYTES + sum(sections))
    return total
