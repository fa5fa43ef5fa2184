"""Rows of a host buffer into the store and out of it, whole and as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import BlockKey
from kvstore.protocol.messages import PutStatus
from kvstore_client.integrations.row_tier.keys import Chain, OffloadKey
from kvstore_client.tensors import Failure, TensorStore
from kvstore_kernels.layout import ELEMENT_BYTES, KVLayout
from kvstore_kernels.paged import PagedKV, PagedPlanes

__all__ = ["Loaded", "Rows", "Stored", "load_rows", "store_rows"]

_SLICE_ROWS: Final = 64
"""Rows between two looks at the clock: as many as the store takes or holds at once."""

_MOST_THROTTLED: Final = 3
"""Refusals after which the rest of a load is not asked for."""


class Rows:
    """A buffer ``[rows, row_bytes]`` of bytes, as pages of one layer and head whose numbers are the bytes in order.

    Nothing is kept of the view: addresses are taken out of it, so that its owner can release it. The owner keeps it
    mapped until no call is made with this any more.

    Args:
        view: two dimensions of single bytes, writable, contiguous in a row.
        element: dtype of what is in it as far as that is known, for codecs that sort bytes; another one's rows are
            taken as bytes.
        block_tokens: tokens of a row, where its bytes can be shared out to them evenly.

    Attributes:
        layout: of a row.
        paged: where the rows are.
        count: of the rows.
        row_bytes: of each.

    Raises:
        InvalidArgument: the view is something else.
    """

    def __init__(self, view: memoryview, element: str = "uint8", block_tokens: int = 1) -> None:
        shape, strides = view.shape or (), view.strides or ()
        if len(shape) != 2 or view.itemsize != 1 or view.readonly or strides[1:] != (1,):
            raise InvalidArgument(
                f"the primary tier's view must be writable rows of bytes, got format {view.format!r} of shape "
                f"{list(shape)} and strides {list(strides)}"
            )
        self.count, self.row_bytes = shape
        dtype = element if element in ELEMENT_BYTES else "uint8"
        tokens = max(block_tokens, 1)
        if self.row_bytes % (2 * tokens * ELEMENT_BYTES[dtype]):
            tokens = 1
        if self.row_bytes % (2 * ELEMENT_BYTES[dtype]):
            dtype = "uint8"
        if not self.count or not self.row_bytes or self.row_bytes % 2:
            raise InvalidArgument(f"the primary tier's view has {self.count} rows of {self.row_bytes} bytes")
        size = ELEMENT_BYTES[dtype]
        self.layout = KVLayout(1, 1, self.row_bytes // (2 * tokens * size), dtype, tokens)
        array = np.asarray(view)
        address, (stride, _) = int(array.ctypes.data), array.strides
        del array
        token = self.layout.head_dim * size
        halves = [
            PagedPlanes(np.array([address + begin], np.int64), stride, token, token, size)
            for begin in (0, self.row_bytes // 2)
        ]
        self.paged = PagedKV(self.layout, tokens, self.count, (halves[0], halves[1]), "cpu", None)


@dataclass(slots=True)
class Loaded:
    """What became of a load.

    Attributes:
        keys: of the rows that are right now.
        failed: why others were not loaded: a ``Failure``'s name, ``cancelled``, ``unavailable``.
        stored_bytes: encoded payloads of those that were.
        error: that ended it, if one did.
    """

    keys: list[OffloadKey] = field(default_factory=list)
    failed: dict[OffloadKey, str] = field(default_factory=dict)
    stored_bytes: int = 0
    error: BaseException | None = None


@dataclass(slots=True)
class Stored:
    """What became of a store.

    Attributes:
        results: of each row: ``stored``, ``exists``, the reason of a refusal, ``cancelled``, ``unavailable``.
        stored_bytes: encoded payloads of those that were stored.
        error: that ended it, if one did.
    """

    results: dict[OffloadKey, str] = field(default_factory=dict)
    stored_bytes: int = 0
    error: BaseException | None = None

    @property
    def complete(self) -> bool:
        """Whether every row is in the store now."""
        return all(result in ("stored", "exists") for result in self.results.values())


def load_rows(
    store: TensorStore,
    paged: PagedKV,
    keys: Sequence[tuple[OffloadKey, BlockKey]],
    rows: Sequence[int],
    ended: Callable[[], bool],
    request: int | None = None,
) -> Loaded:
    """Load blocks into their rows; one that cannot be loaded does not keep the others back.

    Args:
        store: of rows.
        paged: of its layout.
        keys: as the engine and as the store names them.
        rows: of each.
        ended: whether the rest is to be left, asked before each of some rows.
        request: the engine request, where a match said one.
    """
    done = Loaded()
    at = throttled = 0
    try:
        while at < len(keys):
            why = "cancelled" if ended() else "throttled" if throttled >= _MOST_THROTTLED else ""
            if why:
                done.failed.update((key, why) for key, _ in keys[at:])
                break
            some = slice(at, at + _SLICE_ROWS)
            report = store.load_blocks([key for _, key in keys[some]], paged, pages=_pages(rows[some]), request=request)
            done.keys += [key for key, _ in keys[at : at + report.loaded]]
            done.stored_bytes += report.stored_bytes
            at += report.loaded
            if report.failure is not None:
                done.failed[keys[at][0]] = report.failure.value
                throttled += report.failure is Failure.THROTTLED
                at += 1
    except Exception as error:
        done.error = error
        done.failed.update((key, "unavailable") for key, _ in keys[at:])
    return done


def store_rows(
    store: TensorStore,
    paged: PagedKV,
    wanted: Sequence[Chain],
    ended: Callable[[], bool],
) -> Stored:
    """Store the rows of chains.

    Args:
        store: of rows.
        paged: of its layout.
        wanted: what is stored.
        ended: as of ``load_rows``.
    """
    done = Stored()
    try:
        for chain in wanted:
            parent = chain.parent
            for at in range(0, len(chain.keys), _SLICE_ROWS):
                if ended():
                    return _fill(done, wanted, "cancelled")
                some = slice(at, at + _SLICE_ROWS)
                report = store.save_blocks(chain.keys[some], paged, pages=_pages(chain.rows[some]), parent=parent)
                done.stored_bytes += report.stored_bytes
                for index, key in enumerate(chain.offload_keys[some]):
                    done.results[key] = _result(report.statuses[index], report.reasons, index)
                parent = chain.keys[some][-1]
    except Exception as error:
        done.error = error
        return _fill(done, wanted, "unavailable")
    return done


def _pages(rows: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(rows, np.int32).reshape(-1, 1)


def _result(status: PutStatus, reasons: Mapping[int, str], index: int) -> str:
    return reasons.get(index) or status.name.lower()


def _fill(done: Stored, wanted: Sequence[Chain], why: str) -> Stored:
    for chain in wanted:
        for key in chain.offload_keys:
            done.results.setdefault(key, why)
    return done
