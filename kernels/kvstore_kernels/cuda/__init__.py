"""Codecs on a GPU: CUDA kernels that read an engine's pages and write encoded blocks, and back, in one launch.

Bytes and values are those of ``kvstore_kernels.codecs`` and ``kvstore_kernels.cpu``. The CUDA C++ sources are in
``sources``; they are compiled by NVRTC, through CuPy, at the first use of a combination of codec, dtype and shape, and
kept. Importing this package loads neither CuPy nor a driver; without them calls raise ``CudaUnavailable``.

What the kernels take: all codecs but the lossless ones (encode those on the CPU); bfloat16, float16 and float32, ``raw``
any dtype; any number of tokens and any page size that the codec takes; head dimensions that are multiples of 64 (for
``raw`` any), up to 512 for two-byte types and 256 for float32 (fewer where shared memory ends: 512 and 256 hold for every
codec); channels side by side; addresses and strides that are multiples of 16 bytes (``raw``: any). Fastest are bfloat16,
dimensions of 64, 128 and 256, blocks of a multiple of 64 tokens, pages of 16 tokens and more. ``check`` refuses what they
do not take, and says what does.
"""

from __future__ import annotations

from kvstore_kernels.cuda.blocks import check, decode, encode
from kvstore_kernels.cuda.device import CudaUnavailable
from kvstore_kernels.encoded import EncodedBlocks

__all__ = ["CudaUnavailable", "EncodedBlocks", "check", "decode", "encode"]
