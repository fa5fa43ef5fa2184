"""Pages of a host pool as bytes, where SGLang has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from kvstore.errors import InvalidArgument
from kvstore_client.integrations.hicache.host_pools import page_tokens_of

__all__ = ["FlatPages", "HostBytes", "PointerPages", "host_bytes"]


class PointerPages:
    """Pages that a pool tells the addresses of: each of one piece, or of several that are gathered.

    Args:
        pool: with ``get_page_buffer_meta``.

    Attributes:
        page_tokens: indices a page.
        page_bytes: of a page.
        described: what equal bytes have in common.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.page_tokens = page_tokens_of(pool)
        (pieces,) = self._pieces(torch.arange(self.page_tokens, dtype=torch.int64), 1)
        self._sizes = [size for _, size in pieces]
        self.page_bytes = sum(self._sizes)
        self.described = _described(pool) | {"pieces": self._sizes}

    def _pieces(self, indices: Any, count: int) -> list[list[tuple[int, int]]]:
        """Addresses and sizes of each page's pieces."""
        pointers, sizes = self._pool.get_page_buffer_meta(indices)
        if count < 1 or not pointers or len(pointers) % count or len(pointers) != len(sizes):
            raise InvalidArgument(f"{type(self._pool).__name__} names {len(pointers)} buffers for {count} pages")
        flat = list(zip(_flattened(pointers), _flattened(sizes), strict=True))
        each = len(flat) // count
        return [flat[at * each : (at + 1) * each] for at in range(count)]

    def sources(self, indices: Any, count: int) -> list[memoryview]:
        """The bytes of pages: the pool's memory, or gathered copies."""
        pages = self._known(indices, count)
        if len(self._sizes) == 1:
            return [_memory(*page[0]) for page in pages]
        gathered = []
        for page in pages:
            whole = np.empty(self.page_bytes, np.uint8)
            at = 0
            for address, size in page:
                ctypes.memmove(whole.ctypes.data + at, address, size)
                at += size
            gathered.append(whole.data)
        return gathered

    def targets(self, indices: Any, count: int) -> list[memoryview]:
        """Where pages are to be written; ``accept`` those that were."""
        if len(self._sizes) == 1:
            return self.sources(indices, count)
        return [np.empty(self.page_bytes, np.uint8).data for _ in range(count)]

    def accept(self, indices: Any, count: int, targets: Sequence[memoryview]) -> None:
        """Take over what was written, into the pages of ``indices``, of which there are ``count``."""
        if len(self._sizes) == 1:
            return
        for page, written in zip(self._known(indices, count), targets, strict=True):
            whole = np.frombuffer(written, np.uint8)
            at = 0
            for address, size in page:
                ctypes.memmove(address, whole.ctypes.data + at, size)
                at += size

    def _known(self, indices: Any, count: int) -> list[list[tuple[int, int]]]:
        pages = self._pieces(indices, count)
        for page in pages:
            if [size for _, size in page] != self._sizes:
                raise InvalidArgument(
                    f"pages of {type(self._pool).__name__} differ in size: {page} and pieces of {self._sizes} bytes"
                )
        return pages


class FlatPages:
    """Pages that a pool copies out and in itself.

    Args:
        pool: with ``get_data_page``, ``get_dummy_flat_data_page`` and ``set_from_flat_data_page``.

    Attributes: see ``PointerPages``.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.page_tokens = page_tokens_of(pool)
        self.page_bytes = _bytes_of(pool.get_data_page(0, flat=True)).nbytes
        into = _bytes_of(pool.get_dummy_flat_data_page()).nbytes
        if into != self.page_bytes:
            raise ValueError(f"pages of {self.page_bytes} bytes are put back from {into}")
        self.described = _described(pool) | {"flat": self.page_bytes}

    def sources(self, indices: Any, count: int) -> list[memoryview]:
        """Copies of the bytes of pages."""
        pages = [_bytes_of(self._pool.get_data_page(at, flat=True)) for at in self._first(indices, count)]
        for page in pages:
            if page.nbytes != self.page_bytes:
                raise InvalidArgument(
                    f"{type(self._pool).__name__} gave a page of {page.nbytes} bytes, expected {self.page_bytes}"
                )
        return pages

    def targets(self, indices: Any, count: int) -> list[memoryview]:
        """Where pages are to be written; ``accept`` those that were."""
        return [memoryview(bytearray(self.page_bytes)) for _ in range(count)]

    def accept(self, indices: Any, count: int, targets: Sequence[memoryview]) -> None:
        """Take over what was written, into the pages of ``indices``, of which there are ``count``."""
        for at, written in zip(self._first(indices, count), targets, strict=True):
            page = self._pool.get_dummy_flat_data_page()
            _bytes_of(page)[:] = written
            self._pool.set_from_flat_data_page(at, page)

    def _first(self, indices: Any, count: int) -> list[int]:
        """The index of each page's first token."""
        rows = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        if len(rows) != count * self.page_tokens:
            raise InvalidArgument(f"{count} pages need {count * self.page_tokens} host indices, got {len(rows)}")
        return rows[:: self.page_tokens]


HostBytes = PointerPages | FlatPages


def host_bytes(pool: Any) -> HostBytes:
    """A pool's pages as bytes: by address where it tells them, else as it copies them.

    Raises:
        InvalidArgument: it does neither.
    """
    try:
        return PointerPages(pool)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as by_address:
        try:
            return FlatPages(pool)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as by_copy:
            raise InvalidArgument(
                f"kvstore HiCache: the host pool {type(pool).__name__} gives its pages neither by address "
                f"({by_address}) nor as a copy ({by_copy}); use another --hicache-mem-layout"
            ) from None


_SAID: Final = ("layout", "dtype", "layer_num", "start_layer", "end_layer", "page_size", "storage_format_tag")


def _described(pool: Any) -> dict[str, object]:
    said: dict[str, object] = {name: str(getattr(pool, name, "")) for name in _SAID}
    return {"class": type(pool).__name__} | said


def _bytes_of(tensor: Any) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _memory(address: int, size: int) -> memoryview:
    """Memory that the pool keeps."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _flattened(values: Sequence[Any]) -> list[int]:
    flat: list[int] = []
    for value in values:
        flat += _flattened(value) if isinstance(value, (list, tuple)) else [int(value)]
    return flat
