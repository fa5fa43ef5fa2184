"""Compiling the functions that touch shared memory, once a machine (``kvstore_kernels.compiled``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from kvstore_kernels.compiled import CodeCache, inlined

__all__ = ["cache_directory", "compiled", "inlined"]

_CODE: Final = CodeCache(Path(__file__).parent, "reads shared memory", logging.getLogger("kvstore.mapped"))

compiled = _CODE.compiled


def cache_directory() -> Path | None:
    """Where compiled code is kept, made if need be; None where nothing can be written to."""
    return _CODE.directory
