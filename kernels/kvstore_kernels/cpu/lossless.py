"""``lossless`` and ``lossless-zstd`` (``docs/codecs.md``): byte planes here, compression by its libraries.

A block is copied out of its pages first, so that its values stand in the layout's order; that copy is small beside
the compression.
"""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import numpy.typing as npt

from kvstore_kernels.codecs.lossless import CHUNK_VALUES, STORED, Compressor, chunk_count, stored_planes
from kvstore_kernels.cpu.byte_planes import join_planes, split_planes
from kvstore_kernels.cpu.kinds import Kind
from kvstore_kernels.layout import Layout

__all__ = ["compress_block", "decompress_block"]


def compress_block(compressor: Compressor, layout: Layout, block: npt.NDArray[np.uint8], target: int) -> int:
    """Compress a block.

    Args:
        compressor: of the codec.
        layout: of the block.
        block: its bytes.
        target: address of the section.

    Returns:
        Bytes of the section.
    """
    width, values = layout.element_bytes, layout.block_bytes // layout.element_bytes

    entries: list[tuple[int, bytes | npt.NDArray[np.uint8]]] = []
    for first in range(0, values, CHUNK_VALUES):
        count = min(CHUNK_VALUES, values - first)
        planes = np.empty((width, count), np.uint8)
        split_planes(Kind(layout.dtype), block.ctypes.data + first * width, planes.ctypes.data, count)
        for plane in planes:
            compressed = compressor.compress(plane.data)
            entries.append((len(compressed), compressed) if len(compressed) < count else (count | STORED, plane))
    table = struct.pack(f"<{len(entries)}I", *(entry for entry, _ in entries))
    section_bytes = 0
    for data in (table, *(data for _, data in entries)):
        view = np.frombuffer(data, np.uint8)
        ctypes.memmove(target + section_bytes, view.ctypes.data, view.size)
        section_bytes += view.size
    return section_bytes


def decompress_block(
    compressor: Compressor, layout: Layout, section: int, section_bytes: int, block: npt.NDArray[np.uint8]
) -> None:
    """Inverse of ``compress_block``.

    Args:
        compressor: of the codec.
        layout: of the block.
        section: address of the section.
        section_bytes: its length; nothing is read behind it.
        block: memory for the block's bytes.

    Raises:
        ValueError: the section is not well formed.
    """
    width = layout.element_bytes
    view = memoryview((ctypes.c_ubyte * section_bytes).from_address(section)).cast("B")
    stored = list(stored_planes(view, layout))

    for chunk in range(chunk_count(layout)):
        planes = []
        for data, as_it_is, plane_bytes in stored[chunk * width : (chunk + 1) * width]:
            plane = data if as_it_is else compressor.decompress(data, plane_bytes)
            planes.append(np.frombuffer(plane, np.uint8))
        addresses = np.array([plane.ctypes.data for plane in planes], np.int64)
        target = block.ctypes.data + chunk * CHUNK_VALUES * width
        join_planes(Kind(layout.dtype), target, addresses.ctypes.data, planes[0].size)
