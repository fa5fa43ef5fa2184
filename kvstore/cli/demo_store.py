"""What the demo's engine puts into the store and gets from it: the KV of a prompt's blocks, in place in its cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.errors import KVStoreError
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.messages import PutStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore_client.tensors import LoadReport, TensorStore
    from kvstore_kernels.paged import PagedKV

__all__ = ["Stored", "block_pages", "load_blocks", "store_blocks"]

_RETRY_S: Final = 0.02


def load_blocks(store: TensorStore, keys: list[bytes], kv: PagedKV, request: int) -> LoadReport:
    """Load leading blocks into their pages; a block that is gone ends them.

    Raises:
        KVStoreError: a block is there and is none of this model's.
    """
    from kvstore_client.tensors import Failure

    loaded = store.load_blocks(keys, kv, pages=block_pages(0, len(keys)), request=request)
    if loaded.failure not in (None, Failure.MISS, Failure.THROTTLED):
        raise KVStoreError(f"the store gave a block that is none of this model's: {loaded.detail}")
    return loaded


@dataclass(slots=True)
class Stored:
    """Blocks that were not in the store before, their bytes there, and those of their KV."""

    blocks: int = 0
    stored_bytes: int = 0
    kv_bytes: int = 0


def store_blocks(
    store: TensorStore,
    keys: list[bytes],
    kv: PagedKV,
    first: int,
    request: int,
    timeout_s: float,
    lineage: LoadReport | None = None,
) -> Stored:
    """Store blocks ``first`` to the last of a chain; page n of ``kv`` is block n.

    Args:
        store: to put them into.
        keys: of all blocks of the chain.
        kv: where they are.
        first: number of the first that is stored.
        request: of the match.
        timeout_s: how long throttled blocks are tried again.
        lineage: the report of the load of the blocks before.

    Raises:
        KVStoreError: a block was rejected, or throttled for longer than ``timeout_s``.
    """
    total = Stored()
    deadline = time.monotonic() + timeout_s
    while first < len(keys):
        saved = store.save_blocks(
            keys[first:],
            kv,
            pages=block_pages(first, len(keys)),
            parent=keys[first - 1] if first else None,
            lineage=FIDELITY_EXACT if lineage is None else lineage,
            request=request,
        )
        total.blocks += saved.stored
        total.stored_bytes += saved.stored_bytes
        total.kv_bytes += saved.raw_bytes
        if PutStatus.REJECTED in saved.statuses:
            at = saved.statuses.index(PutStatus.REJECTED)
            raise KVStoreError(
                f"the store rejected block {first + at} of the prompt: {saved.reasons.get(at, 'no reason')}"
            )
        if saved.complete:
            break
        if time.monotonic() > deadline:
            raise KVStoreError(f"the store has throttled the prompt's blocks for {timeout_s:g} s")
        time.sleep(_RETRY_S)
    return total


def block_pages(first: int, last: int) -> NDArray[np.int32]:
    """Pages of blocks ``first`` to ``last - 1`` where page n is block n, ``[blocks, 1]``."""
    return np.arange(first, last, dtype=np.int32).reshape(-1, 1)
