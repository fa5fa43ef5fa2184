"""What encoding makes, the same on every backend, and the checks of arguments that all of them need."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

__all__ = ["EncodedBlocks", "check_blocks", "check_lengths"]


class EncodedBlocks(NamedTuple):
    """What encoding made.

    Attributes:
        section_bytes: int64 ``[blocks, sections]``; sections lie one behind another.
        void_groups: int64 ``[blocks]``, groups that decode to zeros because the codec cannot hold their numbers.
    """

    section_bytes: npt.NDArray[np.int64]
    void_groups: npt.NDArray[np.int64]


def check_blocks(
    kv: PagedKV, pages: npt.NDArray[np.int32], payloads: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Pages and addresses of blocks, as contiguous arrays of their types.

    Raises:
        ValueError: a wrong shape or type, or a page that there is not.
    """
    pages = np.asarray(pages)
    if pages.ndim != 2 or pages.shape[1] != kv.block_pages or pages.dtype.kind not in "iu":
        raise ValueError(
            f"pages must be whole numbers [blocks, {kv.block_pages}], got {pages.dtype.name} {list(pages.shape)}"
        )
    numbers = pages.ravel().tolist()  # Where few are cold, faster than numpy's extremes.
    if numbers and not 0 <= min(numbers) <= max(numbers) < kv.num_pages:
        raise ValueError(f"pages must be 0 to {kv.num_pages - 1}, got {min(numbers)} to {max(numbers)}")
    addresses = np.asarray(payloads)
    if addresses.shape != (len(pages),) or addresses.dtype.kind not in "iu":
        raise ValueError(f"expected {len(pages)} addresses of payloads, got {addresses.dtype.name} {addresses.shape}")
    return np.ascontiguousarray(pages, np.int32), np.ascontiguousarray(addresses, np.uint64)


def check_lengths(
    codec: Codec, kv: PagedKV, blocks: int, section_bytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Section lengths of blocks; those of codecs of fixed size are what they must be.

    Raises:
        ValueError: a wrong shape or type, or a wrong length; names the block.
    """
    given = np.asarray(section_bytes)
    expected = _fixed_lengths(codec, kv.layout)
    sections = len(codec.max_section_bytes(kv.layout)) if expected is None else expected.size
    if given.shape != (blocks, sections) or given.dtype.kind not in "iu":
        raise ValueError(
            f"section_bytes must be whole numbers [{blocks}, {sections}], got {given.dtype.name} {given.shape}"
        )
    if expected is not None and not (given == expected).all():
        block = int(np.argmax((given != expected).any(1)))
        raise ValueError(
            f"block {block}: codec {codec.name} has sections of {expected.tolist()} bytes here, "
            f"got {given[block].tolist()}"
        )
    return given


@functools.lru_cache(maxsize=64)
def _fixed_lengths(codec: Codec, layout: Layout) -> npt.NDArray[np.int64] | None:
    """Lengths of the sections that a codec makes, where they are fixed."""
    lengths = codec.section_bytes(layout)
    return None if lengths is None else np.array(lengths, np.int64)
