"""Codecs on a GPU: CUDA kernels that read an engine's pages and write encoded blocks, and back, in one launch.

Bytes and values are those of ``kvstore_kernels.codecs`` and ``kvstore_kernels.cpu``. The CUDA C++ sources are in
``sources``; they are compiled by NVRTC, through CuPy, at the first use of a combination of codec, dtype and shape, and
kept. Importing this package loads neither CuPy nor a driver; without them calls raise ``CudaUnavailable``.

What the kernels take:

- all codecs but the lossless ones, which are encoded on the CPU;
- bfloat16, float16 and float32, and ``raw`` every dtype;
- head dimensions that are multiples of 64, up to 512 (float32: 256), and ``raw`` any;
- as many tokens as the codec takes, in pages of any size;
- channels that lie side by side, addresses and strides that are multiples of 16 bytes (``raw``: any).

Fastest are bfloat16, 64, 128 or 256 channels, blocks of a multiple of 64 tokens, pages of 16 tokens or more, and
payloads at multiples of 16 bytes. ``check`` refuses what the kernels do not take, and says what does.
"""

from __future__ import annotations

from kvstore_kernels.cuda.blocks import check, decode, encode
from kvstore_kernels.cuda.device import CudaUnavailable
from kvstore_kernels.encoded import EncodedBlocks

__all__ = ["CudaUnavailable", "EncodedBlocks", "check", "decode", "encode"]
