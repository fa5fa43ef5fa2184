"""The cache of what is compiled in this package (``kvstore_kernels.compiled``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from kvstore_kernels.compiled import CodeCache, inlined

__all__ = ["inlined", "kernel"]

_CODE: Final = CodeCache(Path(__file__).parent, "encodes and decodes KV", logging.getLogger("kvstore_kernels"))

kernel = _CODE.compiled_when_called
