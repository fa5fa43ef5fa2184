"""Blocks in an engine's pages on a GPU to encoded blocks and back: the face of the CPU's kernels, and a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore_kernels.codecs import Codec
from kvstore_kernels.cuda.device import DeviceLaunch, device_of
from kvstore_kernels.cuda.launch import MAX_BLOCKS, Launch
from kvstore_kernels.cuda.program import program_for
from kvstore_kernels.encoded import EncodedBlocks, check_blocks, check_lengths
from kvstore_kernels.paged import PagedKV

__all__ = ["check", "decode", "encode"]


def check(codec: Codec, kv: PagedKV) -> None:
    """Whether the kernels can store blocks of these pages; needs no GPU.

    Raises:
        ValueError: they cannot; says why, and what would do.
    """
    if kv.device != "cuda":
        raise ValueError(f"the pages are on the device {kv.device!r}: use kvstore_kernels.cpu")
    program_for(codec, kv, 16)


def encode(
    codec: Codec,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    payloads: npt.NDArray[np.uint64],
    *,
    threads: int = 1,
    stream: Any = None,
) -> EncodedBlocks:
    """Encode blocks out of an engine's pages, in one launch; returns when it is done.

    Args:
        codec: to use.
        kv: the pages, on a device.
        pages: of each block, in its order: int32 ``[blocks, kv.block_pages]``.
        payloads: addresses of memory for each block, of ``sum(codec.max_section_bytes(kv.layout))`` bytes, which the
            device can write: its own, or pinned host memory. That all of them can be is the caller's duty; the first is
            looked at. Multiples of 16 are fastest.
        threads: has no meaning here.
        stream: to run on, after what is already enqueued: a ``cupy.cuda.Stream`` or a stream's handle; None for CuPy's
            current one.

    Raises:
        ValueError: the codec or the kernels cannot store these pages, or an argument is out of range.
        CudaUnavailable: no CuPy, NVRTC, driver or device.
    """
    voids = [launch.finish() for launch in _run("kv_encode", codec, kv, pages, payloads, stream)]
    lengths = codec.section_bytes(kv.layout)
    assert lengths is not None
    blocks = len(pages)
    return EncodedBlocks(
        np.tile(np.array(lengths, np.int64), (blocks, 1)), np.concatenate([*voids, np.empty(0, np.int64)])
    )


def decode(
    codec: Codec,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    payloads: npt.NDArray[np.uint64],
    section_bytes: npt.NDArray[np.int64],
    *,
    threads: int = 1,
    stream: Any = None,
) -> None:
    """Decode blocks into an engine's pages, in one launch; returns when it is done.

    Args:
        codec: that encoded the blocks.
        kv: the pages, on a device; overwritten.
        pages: of each block, as for ``encode``.
        payloads: addresses of the encoded blocks, which the device can read, as for ``encode``.
        section_bytes: of each block ``[blocks, sections]``.
        threads: has no meaning here.
        stream: as for ``encode``.

    Raises:
        ValueError: as for ``encode``, or a block's sections have other lengths than the codec gives them.
        CudaUnavailable: no CuPy, NVRTC, driver or device.
    """
    check(codec, kv)
    check_lengths(codec, kv, len(pages), section_bytes)
    for launch in _run("kv_decode", codec, kv, pages, payloads, stream):
        launch.finish()


def _run(
    kernel: str,
    codec: Codec,
    kv: PagedKV,
    pages: npt.NDArray[np.int32],
    payloads: npt.NDArray[np.uint64],
    stream: Any,
) -> list[DeviceLaunch]:
    check(codec, kv)
    pages, payloads = check_blocks(kv, pages, payloads)
    launches = list(_launches(codec, kv, pages, payloads))
    if not launches:
        return []
    device = device_of(int(kv.sections[0].bases[0]))
    device_of(int(payloads[0]))
    running = [DeviceLaunch(launch, device, stream) for launch in launches]
    for each in running:
        each.run(kernel)
    return running


def _launches(
    codec: Codec, kv: PagedKV, pages: npt.NDArray[np.int32], payloads: npt.NDArray[np.uint64]
) -> Iterator[Launch]:
    for begin in range(0, len(pages), MAX_BLOCKS):
        yield Launch(codec, kv, pages[begin : begin + MAX_BLOCKS], payloads[begin : begin + MAX_BLOCKS])
