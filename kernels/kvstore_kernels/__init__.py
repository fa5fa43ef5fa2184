"""Layouts of KV blocks and what is computed on them, without knowing the store.

Covers: the shapes, axes, planes and sizes of a block (``layout``); the codecs, their exact sizes and their reference
implementations (``codecs``). Importing this package loads nothing beyond the standard library; modules that need numpy,
torch or a GPU import them where they use them.
"""

from __future__ import annotations

from kvstore_kernels.layout import KVLayout, MLALayout

__all__ = ["KVLayout", "MLALayout"]
