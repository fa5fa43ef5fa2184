"""Codecs on the CPU: compiled functions that read an engine's pages and write encoded blocks, and back.

Bytes and values are those of the reference implementations in ``kvstore_kernels.codecs``. What is used is compiled at
its first use and kept on disk (``kvstore_kernels.compiled``); importing this package loads numba and numpy.
"""

from __future__ import annotations

from kvstore_kernels.cpu.blocks import EncodedBlocks, decode, encode
from kvstore_kernels.cpu.threads import share_out

__all__ = ["EncodedBlocks", "decode", "encode", "share_out"]
