"""The blocks of one call: their keys, and where the engine keeps their KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import ROOT_KEY, check_parent, join_keys
from kvstore_kernels.layout import Layout
from kvstore_kernels.paged import PagedKV

__all__ = ["Blocks"]

Words = npt.NDArray[np.int64]
Pages = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a chain, one behind the other.

    Attributes:
        keys: of the blocks.
        key_words: the same, ``[count, 4]``.
        parent_words: keys of the blocks before them, ``[count, 4]``.
        kv: where their KV is.
        pages: of each block, ``[count, pages of a block]``.
    """

    keys: list[bytes]
    key_words: Words
    parent_words: Words
    kv: PagedKV
    pages: Pages

    @classmethod
    def of(
        cls,
        layout: Layout,
        keys: Sequence[bytes],
        kv: object,
        pages: object,
        parent: bytes | None,
        *,
        written: bool,
    ) -> Blocks:
        """Check the arguments of a call.

        Args:
            layout: that the KV must have.
            keys: of the blocks.
            kv: a ``PagedKV``, or one tensor with the blocks side by side.
            pages: of each block, for a ``PagedKV``.
            parent: key of the block before the first.
            written: whether the KV is written to.

        Raises:
            InvalidArgument: which of them is wrong, and why.
        """
        keys = keys if isinstance(keys, list | tuple) else list(keys)
        joined = join_keys(keys)
        before = check_parent(parent)
        count = len(joined) // len(ROOT_KEY)
        key_words: Words = np.frombuffer(joined, np.int64).reshape(count, 4)
        parent_words: Words = np.frombuffer(before + joined[: -len(before)], np.int64).reshape(-1, 4)[:count]
        own = (key_words == parent_words).all(axis=1)
        if own.any():
            raise InvalidArgument(f"keys[{int(own.argmax())}] is its own parent")
        if isinstance(kv, PagedKV):
            if kv.layout != layout:
                raise InvalidArgument(f"the cache has the layout {kv.layout}, this store {layout}")
            paged, rows = kv, _pages_of(pages, kv, count, written=written)
            if written and not all(map(_is_writable, kv.owner if isinstance(kv.owner, tuple) else (kv.owner,))):
                raise InvalidArgument("the target is read-only")
        else:
            if pages is not None:
                raise InvalidArgument("pages name pages of a PagedKV; a tensor has its blocks side by side")
            if written and not _is_writable(kv):
                raise InvalidArgument("the target is read-only")
            try:
                paged = PagedKV.from_tensor(layout, kv)
            except ValueError as error:
                raise InvalidArgument(str(error)) from None
            if paged.num_pages < count:
                raise InvalidArgument(
                    f"{count} keys but {paged.num_pages} blocks of {layout.block_tokens} tokens in the tensor"
                )
            rows = np.arange(count, dtype=np.int32).reshape(count, 1)
        if written and _overlaps(paged):
            raise InvalidArgument("elements of the target share memory (a stride is 0): give it memory of its own")
        return cls(keys if type(keys) is list else list(keys), key_words, parent_words, paged, rows)


def _pages_of(pages: object, kv: PagedKV, count: int, *, written: bool) -> Pages:
    """Page ids ``[count, pages of a block]``, or all in a row; each one of the cache's: kernels do not look."""
    if pages is None:
        raise InvalidArgument("a PagedKV needs pages=, the page ids of each block")
    try:
        ids: Any = np.asarray(pages)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"pages must be page ids in host memory: {error}") from None
    shape = count, kv.block_pages
    if not count and not ids.size:
        return np.zeros(shape, np.int32)
    if ids.dtype.kind not in "iu" or ids.shape not in (shape, (count * kv.block_pages,)):
        raise InvalidArgument(
            f"pages must be integers [{count}, {kv.block_pages}]: pages of {kv.page_tokens} tokens for {count} blocks "
            f"of {kv.layout.block_tokens}; got {ids.dtype} {list(ids.shape)}"
        )
    if not (int(ids.min()) >= 0 and int(ids.max()) < kv.num_pages):
        raise InvalidArgument(f"pages must be from 0 to {kv.num_pages - 1}, got {int(ids.min())} to {int(ids.max())}")
    if written:
        numbers, times = np.unique(ids, return_counts=True)
        if numbers.size != ids.size:
            twice = int(numbers[times.argmax()])
            raise InvalidArgument(f"page {twice} is there twice: two blocks would be loaded into it")
    return np.ascontiguousarray(ids.reshape(shape), np.int32)


def _overlaps(kv: PagedKV) -> bool:
    """Whether different elements have one address, as in an expanded tensor."""
    for planes, where in zip(kv.layout.planes, kv.sections, strict=True):
        strides = (
            (kv.num_pages, where.page_stride),
            (kv.page_tokens, where.token_stride),
            (planes.num_heads, where.head_stride),
            (planes.dim, where.element_stride),
        )
        if any(count > 1 and stride == 0 for count, stride in strides):
            return True
    return False


def _is_writable(tensor: Any) -> bool:
    flags = getattr(tensor, "flags", None)
    return bool(getattr(flags, "writeable", True))
