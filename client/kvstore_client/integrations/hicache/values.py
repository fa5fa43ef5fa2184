"""Tensors of SGLang's generic interface as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import BlockKey
from kvstore_client.integrations.hicache.page_stores import BytePages, PageStore
from kvstore_client.integrations.row_tier.counters import Counters

__all__ = ["Values"]

_BATCH = 32


class Values:
    """Tensors by key; what was set is a chain no more than SGLang says it is.

    Args:
        counters: of the backend.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def get(self, store: PageStore, keys: Sequence[BlockKey], targets: Sequence[Any] | None) -> list[Any]:
        """Leading tensors that are there, None for the others.

        Args:
            store: of values.
            keys: of them.
            targets: a tensor for each; None makes new ones of ``uint8``.

        Raises:
            InvalidArgument: targets that cannot be written to.
        """
        assert isinstance(store, BytePages)
        found: list[Any] = []
        if targets is None:
            for key in keys:
                payload = store.client.get(key, part=store.part)
                if payload is None:
                    break
                found.append(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        else:
            if len(targets) != len(keys):
                raise InvalidArgument(f"{len(keys)} keys but {len(targets)} targets")
            for at in range(0, len(keys), _BATCH):
                some = list(targets[at : at + _BATCH])
                good, failure = store.get_into(keys[at : at + _BATCH], [_bytes_of(target) for target in some])
                found += some[:good]
                if failure:
                    break
        self._counters.add("get", "hit", by=len(found))
        self._counters.add("get", "miss", by=len(keys) - len(found))
        return found + [None] * (len(keys) - len(found))

    def set(self, store: PageStore, keys: Sequence[BlockKey], values: Sequence[Any]) -> bool:
        """Keep tensors; whether all are there now.

        Raises:
            InvalidArgument: something that is no tensor of the CPU.
        """
        assert isinstance(store, BytePages)
        if len(values) != len(keys):
            raise InvalidArgument(f"{len(keys)} keys but {len(values)} values")
        payloads = [_bytes_of(value.contiguous() if hasattr(value, "contiguous") else value) for value in values]
        saved = store.put(keys, lambda begin, end: payloads[begin:end], None, _BATCH)
        for result in saved.results:
            self._counters.add("set", result)
        return all(saved.there)


def _bytes_of(tensor: Any) -> memoryview:
    """The memory of a tensor.

    Raises:
        InvalidArgument: it is none, not of the CPU, or not contiguous.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        what = f"a tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InvalidArgument(f"values must be contiguous tensors in host memory, got {what}")
    if not tensor.numel():
        raise InvalidArgument("values must have at least one element")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
