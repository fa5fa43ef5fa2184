"""KV events as bytes: batches in the format of vLLM's publisher, and how missed ones are asked for.

Covers: batches, topics and sequence numbers, requests for a replay and for a snapshot, their replies. Does not cover:
sockets, and what is published when (``kvstore.server.events``). Every byte stands in ``docs/events.md``.

Source: ``vllm/distributed/kv_events.py`` of vLLM 0.33 (batches, replay); the heartbeat's topic and the snapshot are
kvstore's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvstore.errors import InvalidArgument

MEDIUM: Final = "CPU"
"""What the format calls memory of the host."""

SEQUENCE_BYTES: Final = 8
END_OF_REPLAY: Final = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
SNAPSHOT: Final = b"snapshot"
NO_CURSOR: Final = -1
"""Cursor behind the last page of a snapshot."""

_HEARTBEAT: Final = b"kvstore.heartbeat."
_INCARNATION_DIGITS: Final = 16

BlockHash = bytes | int
"""A block's key. kvstore's are 32 bytes; engines may have others, or integers."""


class BlockStored(msgspec.Struct, frozen=True, tag="BlockStored", tag_field="type"):
    """Blocks are complete, each the child of the one before.

    Attributes:
        block_hashes: their keys.
        parent_block_hash: parent of the first one, None for the root.
        token_ids: of all of them; kvstore knows none.
        block_size: tokens a block, 0 where it is not known.
        namespace: digest of their namespace, empty from publishers that have none. Not in vLLM's format.
        incarnation: of the daemon that has them, 0 from other publishers. Not in vLLM's format.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int] = []
    block_size: int = 0
    lora_id: int | None = None
    medium: str | None = MEDIUM
    lora_name: str | None = None
    namespace: bytes = b""
    incarnation: int = 0


class BlockRemoved(msgspec.Struct, frozen=True, tag="BlockRemoved", tag_field="type"):
    """Blocks are no longer complete. Fields as of ``BlockStored``."""

    block_hashes: list[BlockHash]
    medium: str | None = MEDIUM
    namespace: bytes = b""
    incarnation: int = 0


class AllBlocksCleared(msgspec.Struct, frozen=True, tag="AllBlocksCleared", tag_field="type"):
    """Nothing is left of what the publisher told of before."""

    incarnation: int = 0


BlockEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events in their order; ``timestamp`` in seconds since 1970. Always three elements on the wire."""

    timestamp: float
    events: list[BlockEvent]
    data_parallel_rank: int | None = None


_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(EventBatch)


def encode_batch(timestamp: float, events: Sequence[BlockEvent]) -> bytes:
    """The payload frame of a batch."""
    return _ENCODER.encode(EventBatch(timestamp, list(events)))


def decode_batch(payload: bytes) -> EventBatch:
    """The batch in a payload frame, of kvstore or of an engine; keys of maps that nobody knows are skipped.

    Raises:
        InvalidArgument: it is no batch.
    """
    try:
        return _DECODER.decode(payload)
    except _UNDECODABLE as error:
        raise InvalidArgument(f"{len(payload)} bytes are no batch of KV events: {error}") from None


def encode_number(number: int) -> bytes:
    """A sequence number, cursor or incarnation as a frame; -1 is what ends a replay or a snapshot."""
    return number.to_bytes(SEQUENCE_BYTES, "big", signed=True)


def decode_number(frame: bytes) -> int:
    """Inverse of ``encode_number``.

    Raises:
        InvalidArgument: another length.
    """
    if len(frame) != SEQUENCE_BYTES:
        raise InvalidArgument(f"a number of KV events has {SEQUENCE_BYTES} bytes, got {len(frame)}")
    return int.from_bytes(frame, "big", signed=True)


def heartbeat_topic(topic: bytes, incarnation: int) -> bytes:
    """Topic frame of a batch without events: whoever subscribed to the topic gets it, and sees whose it is."""
    return topic + _HEARTBEAT + b"%016x" % incarnation


def incarnation_of(topic: bytes, batch: EventBatch) -> int:
    """Incarnation of the daemon that published a batch; 0: it does not say."""
    for event in batch.events:
        return event.incarnation
    _, heartbeat, digits = topic.rpartition(_HEARTBEAT)
    if not heartbeat or len(digits) != _INCARNATION_DIGITS:
        return 0
    try:
        return int(digits, 16)
    except ValueError:
        return 0


def replay_request(sequence: int) -> list[bytes]:
    """Frames that ask for all batches from ``sequence`` on."""
    return [b"", encode_number(sequence)]


def snapshot_request(cursor: int) -> list[bytes]:
    """Frames that ask for a page of the blocks that are there; the first cursor is 0."""
    return [b"", SNAPSHOT, encode_number(cursor)]


def decode_request(frames: Sequence[bytes]) -> tuple[bool, int]:
    """Whether a snapshot is wanted, and from which cursor, or else from which sequence number on batches are.

    Raises:
        InvalidArgument: it is neither.
    """
    if len(frames) == 2 and not frames[0]:
        # The format has sequence numbers without a sign: those above 2**63 are later than all there will be.
        return False, decode_number(frames[1]) % (1 << 64)
    if len(frames) == 3 and not frames[0] and frames[1] == SNAPSHOT:
        return True, decode_number(frames[2])
    raise InvalidArgument(
        f"{len(frames)} frames are no request of KV events: send an empty frame and 8 bytes of sequence number, or an "
        "empty frame, 'snapshot' and 8 bytes of cursor"
    )


class SnapshotPage(msgspec.Struct, frozen=True):
    """Some of the blocks that were complete when the batch ``sequence`` was the last one (-1: none was yet).

    Attributes:
        cursor: of the next page, -1 behind the last one.
    """

    sequence: int
    batch: EventBatch
    cursor: int
    incarnation: int


def snapshot_reply(sequence: int, payload: bytes, cursor: int, incarnation: int) -> list[bytes]:
    """Frames of a page; ``payload`` is a batch of ``BlockStored``."""
    return [
        b"",
        SNAPSHOT,
        encode_number(sequence),
        payload,
        encode_number(cursor),
        encode_number(incarnation),
    ]


def decode_snapshot_reply(frames: Sequence[bytes]) -> SnapshotPage:
    """Inverse of ``snapshot_reply``.

    Raises:
        InvalidArgument: it is no page.
    """
    if len(frames) != 6 or frames[0] or frames[1] != SNAPSHOT:
        raise InvalidArgument(f"{len(frames)} frames are no page of a snapshot; does a kvstore daemon answer there?")
    return SnapshotPage(
        decode_number(frames[2]), decode_batch(frames[3]), decode_number(frames[4]), decode_number(frames[5])
    )
