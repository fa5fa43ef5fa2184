"""A trace with blocks that are stored by codecs, each beside ``raw`` in a daemon of its own with as many bytes.

Covers: KV that derives from a block's key, a tensor store in the place of a client, and the comparison. Does not cover:
the loop and its figures, see ``kvstore.cli.replay_loop``.

The KV of a block is ``[layers, 2, 64, 1, 64]`` bfloat16. What is loaded is compared byte by byte with what the codec
alone makes of the KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from kvstore.cli import render
from kvstore.cli.block_bytes import BlockBytes
from kvstore.cli.replay_loop import ReplayReport, replay_trace, slot_bytes
from kvstore.errors import InvalidArgument
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.statistics import DaemonStats
from kvstore.simulator.requests import Prompt
from kvstore_client.tensors import Failure, TensorStore
from kvstore_kernels import cpu
from kvstore_kernels.codecs import Codec, get_codec
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from rich.table import Table

    from kvstore.cli.private_daemon import PrivateDaemon
    from kvstore_client import Match

__all__ = ["CodecsReplay", "KVBytes", "codecs_layout", "comparison_table", "replay_codecs"]

_TOKENS, _HEAD_DIM = 64, 64
_LAYER_BYTES: Final = 2 * _TOKENS * _HEAD_DIM * 2
_KEPT_BITS, _EXPONENT_BITS = np.uint16(0x80FF), np.uint16(0x3F00)
"""Any two bytes become a number of magnitude 0.5 to 2: sign, mantissa and the lowest bit of the exponent stay."""

RAW: Final = "raw"


class CodecsReplay(msgspec.Struct, kw_only=True):
    """One trace by several codecs.

    Attributes:
        capacity_bytes: that each daemon had for slots, at most.
        replays: by codec, ``raw`` first; ``block_bytes`` is that of unquantised blocks.
    """

    capacity_bytes: int
    replays: dict[str, ReplayReport]


def codecs_layout(block_bytes: int) -> KVLayout:
    """The layout of blocks of a size.

    Raises:
        InvalidArgument: there is none.
    """
    if block_bytes % _LAYER_BYTES:
        raise InvalidArgument(
            f"--block-bytes: with --codec a block has whole layers of {_LAYER_BYTES >> 10} KiB, got {block_bytes} bytes"
        )
    return KVLayout(block_bytes // _LAYER_BYTES, 1, _HEAD_DIM, "bfloat16", _TOKENS)


class KVBytes(BlockBytes):
    """Blocks of KV that derive from their keys; what is received must be what a codec makes of them."""

    def __init__(self, layout: KVLayout, codec: Codec, max_blocks: int) -> None:
        super().__init__(layout.block_bytes, max_blocks)
        self._codec = codec
        self.derived = self._pages(layout, self._derived)
        self.received = self._pages(layout, self._received)
        self._payloads = np.empty((max_blocks, sum(codec.max_section_bytes(layout))), np.uint8)

    @staticmethod
    def _pages(layout: KVLayout, blocks: NDArray[np.uint8]) -> PagedKV:
        kv = blocks.view(np.uint16).reshape(len(blocks), *layout.shape)
        return PagedKV.from_layers(layout, list(kv.swapaxes(0, 1)), axes="page kv token head dim")

    def _fill(self, keys: Sequence[bytes]) -> None:
        super()._fill(keys)
        bits = self._derived[: len(keys)].view(np.uint16)
        np.bitwise_and(bits, _KEPT_BITS, out=bits)
        np.bitwise_or(bits, _EXPONENT_BITS, out=bits)

    def _expect(self, keys: Sequence[bytes]) -> None:
        super()._expect(keys)
        if keys and not self._codec.exact:
            pages, payloads = block_pages(len(keys)), self._payloads
            addresses = payloads.ctypes.data + np.arange(len(keys), dtype=np.uint64) * np.uint64(payloads.shape[1])
            encoded = cpu.encode(self._codec, self.derived, pages, addresses)
            cpu.decode(self._codec, self.derived, pages, addresses, encoded.section_bytes)


def block_pages(count: int) -> NDArray[np.int32]:
    """Pages of the first blocks where a page is a block."""
    return np.arange(count, dtype=np.int32).reshape(-1, 1)


class _StoreAsClient:
    """What the loop needs of a client, by a tensor store: payloads are the KV of ``KVBytes``, in the same order."""

    def __init__(self, store: TensorStore, blocks: KVBytes) -> None:
        self._store = store
        self._blocks = blocks
        self.corrupt_records = 0

    def match(self, keys: Sequence[bytes]) -> Match:
        return self._store.match(keys)

    def get_many_into(self, keys: Sequence[bytes], outs: object, *, request: int) -> list[int | None]:
        loaded = self._store.load_blocks(keys, self._blocks.received, pages=block_pages(len(keys)), request=request)
        self.corrupt_records += loaded.failure is Failure.CORRUPT
        missing: list[int | None] = [None] * (len(keys) - loaded.loaded)
        return [self._blocks.payload_bytes] * loaded.loaded + missing

    def put_many(
        self, keys: Sequence[bytes], payloads: object, *, parent: bytes | None, request: int
    ) -> list[PutStatus]:
        pages = block_pages(len(keys))
        saved = self._store.save_blocks(keys, self._blocks.derived, pages=pages, parent=parent, request=request)
        return list(saved.statuses)

    def flush(self) -> object:
        return self._store.client.flush()

    def stats(self) -> DaemonStats:
        return self._store.client.stats()


def replay_codecs(
    requests: Sequence[Prompt],
    names: Sequence[str],
    daemon_for: Callable[[int | None, int], PrivateDaemon],
    *,
    trace: str,
    block_bytes: int,
    capacity_bytes: int,
    timeout_s: float,
    on_request: Callable[[], None] = lambda: None,
) -> CodecsReplay:
    """Replay a trace by ``raw`` and by each codec.

    Args:
        requests: of a trace.
        names: of codecs.
        daemon_for: a daemon (not started) for slots of a size, or of many, and so many bytes of them.
        trace: names the trace.
        block_bytes: of an unquantised block.
        capacity_bytes: of each daemon.
        timeout_s: of each call.
        on_request: called after each request of each replay.

    Raises:
        InvalidArgument: an unknown codec, or no layout has blocks of that size.
        KVStoreError: a daemon went away or did not answer in time.
    """
    layout = codecs_layout(block_bytes)
    try:
        codecs = [get_codec(name) for name in dict.fromkeys((RAW, *names))]
    except ValueError as wrong:
        raise InvalidArgument(f"--codec: {wrong}") from None
    longest = max(1, max(len(request.full_blocks) for request in requests))
    replays = {}
    for codec in codecs:
        sections = codec.section_bytes(layout)
        slot = None if sections is None else slot_bytes(sum(sections))
        blocks = KVBytes(layout, codec, longest)
        with daemon_for(slot, capacity_bytes) as daemon, _store(daemon, layout, codec, timeout_s) as store:
            client = _StoreAsClient(store, blocks)
            report = replay_trace(
                client, requests, trace=trace, block_bytes=block_bytes, blocks=blocks, on_request=on_request
            )
        used = slot or -(-report.daemon.resident_bytes // max(1, report.daemon.resident_blocks))
        replays[codec.name] = msgspec.structs.replace(
            report, slot_bytes=used, capacity_blocks=report.daemon.capacity_bytes // max(1, used)
        )
    return CodecsReplay(capacity_bytes=capacity_bytes, replays=replays)


@contextmanager
def _store(daemon: PrivateDaemon, layout: KVLayout, codec: Codec, timeout_s: float) -> Iterator[TensorStore]:
    with TensorStore(layout, codec.name, name="replay", endpoint=daemon.endpoint, timeout=timeout_s) as store:
        yield store


def comparison_table(report: CodecsReplay) -> Table:
    """One column a codec."""
    replays = report.replays
    some = next(iter(replays.values()))
    count, size = render.count, render.size
    made = render.table(f"Replay of {some.trace}, {size(report.capacity_bytes)} for slots each", ["", *replays])
    rows: list[tuple[str, Callable[[ReplayReport], str]]] = [
        ("hit rate", lambda one: render.ratio(one.blocks_hit, one.blocks_asked)),
        ("blocks hit", lambda one: count(one.blocks_hit)),
        ("blocks asked", lambda one: count(one.blocks_asked)),
        ("blocks that fit", lambda one: count(one.capacity_blocks)),
        ("as many as raw", lambda one: f"{one.capacity_blocks / replays[RAW].capacity_blocks:.2f}x"),
        ("resident at the end", lambda one: count(one.daemon.resident_blocks)),
        ("evicted", lambda one: count(one.daemon.evicted_blocks)),
        ("slot of a block", lambda one: size(one.slot_bytes)),
        ("KV read", lambda one: size(one.bytes_read)),
        ("hits lost before the get", lambda one: count(one.blocks_lost)),
        ("damaged records", lambda one: count(one.corrupt_records)),
        ("wrong bytes", lambda one: count(one.wrong_bytes)),
        ("get of a request, p50", lambda one: _p50(one, "get")),
        ("put of a request, p50", lambda one: _p50(one, "put")),
    ]
    for name, cell in rows:
        made.add_row(name, *(cell(one) for one in replays.values()))
    return made


def _p50(report: ReplayReport, call: str) -> str:
    latency = report.latency[call]
    return render.latency(latency.p50_us / 1e6) if latency.calls else render.NOTHING
