"""Tensors in the store: an engine's KV by block, encoded on its way in and decoded on its way out.

Loads ``kvstore_kernels``, and torch only where a caller's tensors are torch's. See ``docs/tensors.md``.
"""

from kvstore_client.tensors.plan import store_layout
from kvstore_client.tensors.results import Failure, LoadReport, SaveReport
from kvstore_client.tensors.store import AsyncTensorStore, TensorStore

__all__ = ["AsyncTensorStore", "Failure", "LoadReport", "SaveReport", "TensorStore", "store_layout"]
