"""Bytes of KV events: what consumers in the field read. See ``docs/events.md``."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from golden_files import golden, golden_names
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import chain_keys
from kvstore.protocol.kv_events import (
    END_OF_REPLAY,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    SnapshotPage,
    decode_batch,
    decode_number,
    decode_request,
    decode_snapshot_reply,
    encode_batch,
    encode_number,
    heartbeat_topic,
    incarnation_of,
    replay_request,
    snapshot_reply,
    snapshot_request,
)
from kvstore.protocol.namespace import Namespace

INCARNATION = 0x1817161514131211
DIGEST = Namespace(name="chat", model="llama", revision="r1", dtype="bfloat16", block_tokens=4).digest(0)
FIRST, SECOND, THIRD = chain_keys(range(12), 4, salt=b"golden")
TOPIC = b"kv@here"
TOLD = {"namespace": DIGEST, "incarnation": INCARNATION}
BATCHES = {
    "stored": [
        BlockStored([FIRST, SECOND], None, block_size=4, **TOLD),
        BlockStored([THIRD], SECOND, block_size=4, **TOLD),
    ],
    "removed": [BlockRemoved([SECOND, THIRD], **TOLD)],
    "cleared": [AllBlocksCleared(INCARNATION)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_golden_frames(name: str) -> None:
    topic, number, payload = golden(f"events-1/{name}")
    assert topic == TOPIC
    assert number == encode_number(list(BATCHES).index(name) + 41)
    assert encode_batch(1700000000.25, BATCHES[name]) == payload
    batch = decode_batch(payload)
    assert batch == EventBatch(1700000000.25, BATCHES[name])
    assert incarnation_of(topic, batch) == INCARNATION


def test_heartbeat_golden_frames() -> None:
    topic, number, payload = golden("events-1/heartbeat")
    assert topic == heartbeat_topic(TOPIC, INCARNATION)
    assert decode_number(number) == 44
    assert payload == encode_batch(1700000000.25, [])
    assert incarnation_of(topic, decode_batch(payload)) == INCARNATION


def test_request_golden_frames() -> None:
    frames = golden("events-1/replay-request")
    # The empty frame has no digits.
    assert [b"", *frames] == replay_request(41)
    assert decode_request([b"", *frames]) == (False, 41)
    frames = golden("events-1/snapshot-request")
    assert [b"", *frames] == snapshot_request(512)
    assert decode_request([b"", *frames]) == (True, 512)


def test_snapshot_golden_frames() -> None:
    frames = [b"", *golden("events-1/snapshot-reply")]
    payload = encode_batch(1700000000.25, BATCHES["stored"])
    assert snapshot_reply(44, payload, 1024, INCARNATION) == frames
    batch = EventBatch(1700000000.25, BATCHES["stored"])
    assert decode_snapshot_reply(frames) == SnapshotPage(44, batch, 1024, INCARNATION)


def test_events_are_maps_in_an_array_with_everything_that_vllm_requires() -> None:
    timestamp, (stored, _), rank = msgspec.msgpack.decode(golden("events-1/stored")[2])
    assert (timestamp, rank) == (1700000000.25, None)
    required = {
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
    }
    assert set(stored) == required | {"namespace", "incarnation"}
    assert (stored["type"], stored["medium"], stored["token_ids"]) == ("BlockStored", "CPU", [])
    _, (removed,), _ = msgspec.msgpack.decode(golden("events-1/removed")[2])
    assert set(removed) == {"type", "block_hashes", "medium", "namespace", "incarnation"}
    _, (cleared,), _ = msgspec.msgpack.decode(golden("events-1/cleared")[2])
    assert cleared == {"type": "AllBlocksCleared", "incarnation": INCARNATION}


def test_golden_files_of_events_are_all_tested() -> None:
    others = ("heartbeat", "replay-request", "snapshot-request", "snapshot-reply")
    assert golden_names("events-1") == {f"events-1/{name}" for name in (*BATCHES, *others)}


@pytest.mark.parametrize(
    "frames",
    [[], [b""], [b"", b""], [b"x", bytes(8)], [b"", bytes(7)], [b"", b"snapshot", bytes(7)], [b"", b"snap", bytes(8)]],
)
def test_requests_that_are_none_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(InvalidArgument):
        decode_request(frames)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\x90",
        msgspec.msgpack.encode([1.0, [{"type": "Other"}]]),
        msgspec.msgpack.encode([1.0, [{}], None]),
    ],
)
def test_payloads_that_are_none_are_refused(payload: bytes) -> None:
    with pytest.raises(InvalidArgument, match="no batch of KV events"):
        decode_batch(payload)


@given(noise=st.binary(min_size=1, max_size=6), at=st.integers(0, 500))
def test_damaged_payloads_are_refused_or_read(noise: bytes, at: int) -> None:
    """Also text that is no UTF-8, where a key or a type stands."""
    payload = bytearray(encode_batch(1.5, BATCHES["stored"]))
    payload[at % len(payload) : at % len(payload) + len(noise)] = noise
    with contextlib.suppress(InvalidArgument):
        assert isinstance(decode_batch(bytes(payload)), EventBatch)


def test_batches_of_engines_are_read() -> None:
    """Integers for keys, fields that nobody knows, defaults left out."""
    event = {"type": "BlockStored", "block_hashes": [-5, 2**63], "parent_block_hash": 3, "token_ids": [1, 2]}
    event |= {"block_size": 1, "lora_id": None, "medium": "GPU", "lora_name": "a", "extra_keys": [["a"]], "new": {}}
    batch = decode_batch(msgspec.msgpack.encode([1.0, [event], 3, "more"]))
    assert batch.data_parallel_rank == 3
    (stored,) = batch.events
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.parent_block_hash, stored.medium) == ([-5, 2**63], 3, "GPU")
    assert incarnation_of(b"", batch) == 0
    assert decode_batch(msgspec.msgpack.encode([1.0, []])).events == []


def test_topics_that_are_no_heartbeat_say_no_incarnation() -> None:
    batch = decode_batch(encode_batch(0.0, []))
    for topic in (b"", b"kv", b"kvstore.heartbeat.", b"kvstore.heartbeat." + b"x" * 16, b"kvstore.heartbeat.12"):
        assert incarnation_of(topic, batch) == 0
    assert encode_number(-1) == END_OF_REPLAY
