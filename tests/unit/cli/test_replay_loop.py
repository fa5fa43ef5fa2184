from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import msgspec
import pytest
from synthetic_trace import synthetic_requests

from kvstore.cli.replay_loop import ReplayReport, replay_namespace, replay_trace, slot_bytes
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import PutStatus
from kvstore.protocol.statistics import DaemonStats
from kvstore.simulator.trace import TraceRequest, block_key

BLOCK_BYTES = 100


def zeros(kind: Any) -> Any:
    """A value of a type of statistics that is nothing: 0, "", empty, None, or a struct of such."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{field.name: zeros(field.type) for field in msgspec.structs.fields(kind)})
    if NoneType in get_args(kind):
        return None
    return (get_origin(kind) or kind)()


class FakeMatch:
    def __init__(self, hits: int, request: int) -> None:
        self._hits = hits
        self.request = request

    def __len__(self) -> int:
        return self._hits


class FakeClient:
    """A store in a dict, with everything remembered and faults on demand."""

    def __init__(self, max_blocks: int = 1 << 30) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.parents: dict[bytes, bytes | None] = {}
        self.max_blocks = max_blocks
        self.calls: list[tuple[str, int]] = []
        self.flipped: set[bytes] = set()
        self.forgotten: set[bytes] = set()
        self.requests: list[int] = []
        self.corrupt_records = 2
        self._stats: DaemonStats = zeros(DaemonStats)

    def match(self, keys: Sequence[bytes]) -> FakeMatch:
        hits = next((at for at, key in enumerate(keys) if key not in self.blocks), len(keys))
        self.calls.append(("match", len(keys)))
        self.requests.append(len(self.calls))
        lookups = self._stats.lookups
        lookups.match_keys += len(keys)
        lookups.match_hits += hits
        return FakeMatch(hits, len(self.calls))

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[memoryview], *, request: int) -> list[int | None]:
        assert request == self.requests[-1]
        self.calls.append(("get", len(keys)))
        lengths: list[int | None] = []
        for key, out in zip(keys, outs, strict=True):
            if key in self.forgotten:
                self.corrupt_records += 1
                lengths.append(None)
                continue
            out[:] = self.blocks[key]
            if key in self.flipped:
                out[7] ^= 1
            lengths.append(len(self.blocks[key]))
        return lengths

    def put_many(
        self, keys: Sequence[bytes], datas: Sequence[memoryview], *, parent: bytes | None, request: int
    ) -> list[PutStatus]:
        assert request == self.requests[-1]
        self.calls.append(("put", len(keys)))
        statuses = []
        for key, data in zip(keys, datas, strict=True):
            if len(self.blocks) >= self.max_blocks:
                statuses.append(PutStatus.THROTTLED)
                continue
            self.blocks[key] = bytes(data)
            self.parents[key] = parent
            parent = key
            statuses.append(PutStatus.STORED)
        return statuses

    def flush(self) -> None:
        self.calls.append(("flush", 0))

    def stats(self) -> DaemonStats:
        return msgspec.convert(msgspec.to_builtins(self._stats), DaemonStats)


def run(client: FakeClient, *prompts: tuple[int, ...]) -> ReplayReport:
    requests = [TraceRequest(0, 512 * len(prompt), 1, prompt) for prompt in prompts]
    return replay_trace(client, requests, trace="t", block_bytes=BLOCK_BYTES)  # type: ignore[arg-type]


def test_replay_puts_what_is_missing_as_a_chain_and_gets_the_rest() -> None:
    client = FakeClient()
    report = run(client, (1, 2), (1, 2, 3, 4), (1, 2, 3, 4))
    assert client.calls == [
        *[("match", 2), ("put", 2), ("flush", 0)],
        *[("match", 4), ("get", 2), ("put", 2), ("flush", 0)],
        *[("match", 4), ("get", 4), ("flush", 0)],
    ]
    assert [client.parents[block_key(block)] for block in (1, 2, 3, 4)] == [None, *map(block_key, (1, 2, 3))]
    assert (report.requests, report.blocks_asked, report.blocks_hit, report.hit_rate) == (3, 10, 6, 0.6)
    assert (report.wrong_bytes, report.blocks_lost) == (0, 0)
    assert (report.bytes_read, report.bytes_written) == (6 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    assert report.puts == {"stored": 4, "exists": 0, "throttled": 0, "rejected": 0}
    assert {name: latency.calls for name, latency in report.latency.items()} == {"match": 3, "get": 2, "put": 2}
    assert (report.daemon.match_keys, report.daemon.match_hits) == (10, 6)


def test_replay_request_without_full_block_counts_nothing() -> None:
    client = FakeClient()
    report = replay_trace(client, [TraceRequest(0, 300, 1, (9,))], trace="t", block_bytes=8)  # type: ignore[arg-type]
    assert client.calls == []
    assert (report.requests, report.blocks_asked, report.hit_rate) == (1, 0, 0.0)
    assert report.latency["match"].p99_us == 0.0


def test_replay_one_wrong_byte_is_counted() -> None:
    client = FakeClient()
    client.flipped.add(block_key(2))
    assert run(client, (1, 2, 3), (1, 2, 3), (1, 2, 3)).wrong_bytes == 2


def test_replay_blocks_of_another_size_are_wrong() -> None:
    client = FakeClient()
    run(client, (1,))
    client.get_many_into = lambda keys, outs, *, request: [BLOCK_BYTES - 1]  # type: ignore[method-assign]
    assert run(client, (1,)).wrong_bytes == BLOCK_BYTES


def test_replay_damaged_record_is_counted_and_lost_not_read() -> None:
    client = FakeClient()
    client.forgotten.add(block_key(2))
    report = run(client, (1, 2, 3), (1, 2, 3))
    assert (report.blocks_hit, report.blocks_lost, report.corrupt_records, report.wrong_bytes) == (3, 1, 1, 0)
    assert report.bytes_read == 2 * BLOCK_BYTES


def test_replay_throttled_puts_are_counted_and_not_tried_again() -> None:
    client = FakeClient(max_blocks=2)
    report = run(client, (1, 2, 3, 4))
    assert report.puts == {"stored": 2, "exists": 0, "throttled": 2, "rejected": 0}
    assert report.bytes_written == 2 * BLOCK_BYTES
    assert [name for name, _ in client.calls].count("put") == 1


def test_replay_reports_progress_for_each_request() -> None:
    requests = synthetic_requests(40)
    done: list[None] = []
    replay_trace(
        FakeClient(),  # type: ignore[arg-type]
        requests,
        trace="t",
        block_bytes=8,
        on_request=lambda: done.append(None),
    )
    assert len(done) == 40


@pytest.mark.parametrize(("payload", "slot"), [(1, 4096), (3840, 4096), (3841, 8192), (4096, 8192), (65536, 69632)])
def test_slot_bytes_hold_header_and_payload(payload: int, slot: int) -> None:
    assert slot_bytes(payload) == slot


def test_replay_namespace_differs_by_payload_size() -> None:
    digests = {replay_namespace("replay", size).digest(0) for size in (4096, 65536)}
    assert len(digests) == 2
    assert block_key(0) != ROOT_KEY
