"""``lossless`` and ``lossless-zstd``: byte planes, compressed one by one. About 12.8 and 10.7 bits a value of bfloat16.

The exponents of neighbouring values are alike and their mantissas are noise, so the bytes of a value are taken apart;
the sign, which is noise too, is rotated to the lowest bit, which leaves a plane of nothing but exponents. A plane that
does not get shorter is stored as it is. LZ4 (block format, https://github.com/lz4/lz4/blob/dev/doc) is fast enough for
memory; Zstandard (RFC 8878) finds the entropy that LZ4 leaves.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from kvstore_kernels.codecs import arithmetic
from kvstore_kernels.codecs.base import FIDELITY_EXACT, Buffer, Encoded, WholeCodec, check_block
from kvstore_kernels.layout import Layout

if TYPE_CHECKING:
    import torch

CHUNK_VALUES: Final = 65536
"""Values that are taken apart together."""

_THREAD: Final = threading.local()
"""Each thread's state of zstd's decompressor: making one takes half as long as what it decompresses then."""

STORED: Final = 1 << 31
"""Bit of a table entry: the plane is stored as it is."""


class Compressor(ABC):
    """Compresses one byte plane."""

    parameters: str

    @abstractmethod
    def compress(self, plane: Buffer) -> bytes:
        """The compressed bytes, whatever their length."""

    @abstractmethod
    def decompress(self, data: Buffer, plane_bytes: int) -> bytes:
        """The plane; allocates no more than ``plane_bytes``.

        Raises:
            ValueError: the bytes are not exactly one compressed plane of that length.
        """


class Lz4(Compressor):
    """LZ4 block format, without a size in front."""

    parameters = "lz4 block"

    def compress(self, plane: Buffer) -> bytes:
        """As ``Compressor.compress``."""
        import lz4.block

        compressed: bytes = lz4.block.compress(plane, store_size=False)
        return compressed

    def decompress(self, data: Buffer, plane_bytes: int) -> bytes:
        """As ``Compressor.decompress``."""
        import lz4.block

        try:
            plane: bytes = lz4.block.decompress(data, uncompressed_size=plane_bytes)
        except lz4.block.LZ4BlockError as error:
            raise ValueError(f"not lz4 of {plane_bytes} bytes: {error}") from None
        if len(plane) != plane_bytes:
            raise ValueError(f"lz4 of {len(plane)} bytes, not of {plane_bytes}")
        return plane


class Zstd(Compressor):
    """One Zstandard frame that says its content size."""

    parameters = "zstd frame"
    level = 1

    def compress(self, plane: Buffer) -> bytes:
        """As ``Compressor.compress``."""
        import zstandard

        return zstandard.ZstdCompressor(level=self.level, write_content_size=True).compress(plane)

    def decompress(self, data: Buffer, plane_bytes: int) -> bytes:
        """As ``Compressor.decompress``."""
        import zstandard

        try:
            declared = zstandard.get_frame_parameters(data).content_size
            if declared != plane_bytes:
                raise ValueError(f"a zstd frame of {declared} bytes, not of {plane_bytes}")
            context = getattr(_THREAD, "decompressor", None)
            if context is None:
                context = _THREAD.decompressor = zstandard.ZstdDecompressor()
            plane: bytes = context.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"not a zstd frame of {plane_bytes} bytes: {error}") from None
        if len(plane) != plane_bytes:
            raise ValueError(f"a zstd frame of {len(plane)} bytes, not of {plane_bytes}")
        return plane


class Lossless(WholeCodec):
    """Byte planes of chunks of values, each compressed or stored."""

    def __init__(self, name: str, id: int, compressor: Compressor) -> None:
        super().__init__(
            name,
            id,
            FIDELITY_EXACT,
            f"{name} version=1 chunk={CHUNK_VALUES} rotate=1 planes=little ({compressor.parameters})",
        )
        self.compressor = compressor

    def section_bytes(self, layout: Layout) -> None:
        """None: it depends on the data."""

    def max_section_bytes(self, layout: Layout) -> tuple[int, ...]:
        """The table, and all planes stored as they are."""
        return (4 * chunk_count(layout) * layout.element_bytes + layout.block_bytes,)

    def encode(self, block: torch.Tensor, layout: Layout) -> Encoded:
        """As ``Codec.encode``; no group is ever void."""
        check_block(block, layout)
        entries, stored = [], []
        values = arithmetic.from_bytes(arithmetic.to_bytes(block), "uint8", (-1, layout.element_bytes))
        for chunk in values.split(CHUNK_VALUES):
            for plane in _planes_of(chunk):
                data = arithmetic.to_bytes(plane)
                compressed = self.compressor.compress(data)
                short = len(compressed) < len(data)
                stored.append(compressed if short else data)
                entries.append(len(compressed) if short else len(data) | STORED)
        return Encoded([b"".join([struct.pack(f"<{len(entries)}I", *entries), *stored])], 0)

    def decode(self, sections: Sequence[Buffer], layout: Layout) -> torch.Tensor:
        """As ``Codec.decode``."""
        import torch

        if len(sections) != 1:
            raise ValueError(f"{self.name} has one section, got {len(sections)}")
        width, chunks = layout.element_bytes, []
        planes: list[torch.Tensor] = []
        for data, stored, plane_bytes in stored_planes(sections[0], layout):
            plane = data if stored else self.compressor.decompress(data, plane_bytes)
            planes.append(arithmetic.from_bytes(plane, "uint8", (plane_bytes,)))
            if len(planes) == width:
                chunks.append(_values_of(planes))
                planes = []
        return torch.cat(chunks).view(-1).view(getattr(torch, layout.dtype)).view(layout.shape)


def chunk_count(layout: Layout) -> int:
    """Chunks of a block."""
    return -(-(layout.block_bytes // layout.element_bytes) // CHUNK_VALUES)


def stored_planes(section: Buffer, layout: Layout) -> Iterator[tuple[memoryview, bool, int]]:
    """Walk the planes of a layout's block: ``planes_of_section``, which says what is given and raised."""
    return planes_of_section(section, layout.element_bytes, layout.block_bytes // layout.element_bytes)


def planes_of_section(section: Buffer, width: int, values: int) -> Iterator[tuple[memoryview, bool, int]]:
    """Walk the planes of a section: their bytes, whether they are stored as they are, and how long they are then.

    Lengths are checked before the first plane is given.

    Args:
        section: of a lossless record.
        width: bytes a value.
        values: of the block.

    Raises:
        ValueError: the table is cut off, or its lengths are impossible or not those of the section.
    """
    view = memoryview(section).cast("B")
    table_bytes = 4 * -(-values // CHUNK_VALUES) * width
    if view.nbytes < table_bytes:
        raise ValueError(f"a section of {view.nbytes} bytes ends inside its table of {table_bytes}")
    walk, at = [], table_bytes
    for index, entry in enumerate(struct.unpack(f"<{table_bytes // 4}I", view[:table_bytes])):
        plane_bytes = min(CHUNK_VALUES, values - index // width * CHUNK_VALUES)
        length, stored = entry & ~STORED, bool(entry & STORED)
        if length != plane_bytes if stored else not 0 < length < plane_bytes:
            how = "stored" if stored else "compressed"
            raise ValueError(f"plane {index} of {plane_bytes} bytes cannot be {how} in {length}")
        walk.append((at, length, stored, plane_bytes))
        at += length
    if at != view.nbytes:
        raise ValueError(f"the table's planes end at byte {at}, the section at {view.nbytes}")
    for begin, length, stored, plane_bytes in walk:
        yield view[begin : begin + length], stored, plane_bytes


def _planes_of(values: torch.Tensor) -> list[torch.Tensor]:
    """Byte planes of values ``[n, w]`` uint8, rotated left by one bit."""
    width = values.shape[1]
    whole = sum(values[:, p].long() << (8 * p) for p in range(width))
    rotated = (whole << 1) | (whole >> (8 * width - 1))
    return [((rotated >> (8 * p)) & 255).byte() for p in range(width)]


def _values_of(planes: list[torch.Tensor]) -> torch.Tensor:
    """Inverse of ``_planes_of``."""
    import torch

    width = len(planes)
    rotated = sum(plane.long() << (8 * p) for p, plane in enumerate(planes))
    whole = (rotated >> 1) | ((rotated & 1) << (8 * width - 1))
    return torch.stack([((whole >> (8 * p)) & 255).byte() for p in range(width)], 1)
