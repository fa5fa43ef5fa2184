"""The decoder of header frames against hostile bytes: a refusal or a whole message, and nothing else."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections import Counter
from typing import get_args

import msgspec
import pytest
from malformed_frames import REPLIES, REQUESTS, frames

from kvstore.errors import InvalidArgument
from kvstore.protocol.framing import decode_reply, decode_request, encode, request_id
from kvstore.protocol.messages import AnyReply, AnyRequest, StatsReply
from kvstore.protocol.version import MAX_HEADER_FRAME_BYTES

FRAMES = 400_000


def refusal_of(decode: object, frame: bytes) -> tuple[msgspec.Struct | None, str]:
    """The message, or why it was refused; any other exception fails the test."""
    assert callable(decode)
    try:
        return decode(frame), ""
    except InvalidArgument as refusal:
        return None, str(refusal)


def in_bounds(message: msgspec.Struct) -> bool:
    """Whether all whole numbers of a request are such as the protocol has (-1 is a generation's)."""
    return all(
        not isinstance(number, int) or isinstance(number, bool) or -1 <= number < 1 << 64
        for number in msgspec.structs.astuple(message)
    )


@pytest.mark.timeout(150)
def test_decode_request_malformed_frames_refused_or_whole():
    samples = [encode(request) for request in REQUESTS]
    allowed = get_args(AnyRequest)
    outcomes: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    for kind, frame in frames(1, samples, [*range(1, 20)], FRAMES):
        begun = time.perf_counter()
        request, refusal = refusal_of(decode_request, frame)
        identity = request_id(frame)
        slowest = max(slowest, time.perf_counter() - begun)
        if request is None:
            assert refusal.startswith("malformed request: "), frame.hex()
            assert len(refusal) < 400, frame.hex()
        else:
            assert isinstance(request, allowed), frame.hex()
            assert in_bounds(request), frame.hex()
            assert decode_request(encode(request)) == request, frame.hex()
            assert identity == request.id, frame.hex()
        assert identity is None or 0 <= identity < 1 << 64, frame.hex()
        outcomes[kind, "refused" if request is None else "whole"] += 1
    refused = sum(count for (_, outcome), count in outcomes.items() if outcome == "refused")
    assert refused >= FRAMES // 2, outcomes
    assert outcomes["truncated", "whole"] == 0, outcomes
    assert outcomes["nested", "refused"] > 1000, outcomes
    assert outcomes["mutated", "whole"] > 0, "no mutated frame was valid: the mutations are too coarse"
    assert slowest < 2.0


@pytest.mark.timeout(100)
def test_decode_reply_malformed_frames_refused_or_whole():
    samples = [encode(reply) for reply in REPLIES]
    allowed = get_args(AnyReply)
    for _, frame in frames(2, samples, [*range(101, 114)], FRAMES // 4):
        reply, refusal = refusal_of(decode_reply, frame)
        assert refusal.startswith("malformed reply: ") if reply is None else isinstance(reply, allowed), frame.hex()


ENVELOPE = b"\x07\x03\x01\x00\x00\x00\x00"
LARGEST = MAX_HEADER_FRAME_BYTES


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("elements", b"\xdd" + struct.pack(">I", LARGEST - 5) + b"\x0f" + b"\x01" * (LARGEST - 6)),
        ("claimed elements", b"\xdd\xff\xff\xff\xff\x0f" + ENVELOPE),
        ("claimed sizes", b"\x9b\x02" + ENVELOPE + b"\x80\xdd\xff\xff\xff\xff\x01"),
        ("sizes", b"\x9b\x02" + ENVELOPE + b"\x80\xdd" + struct.pack(">I", LARGEST - 20) + b"\x01" * (LARGEST - 20)),
        ("claimed keys", b"\x99\x04" + ENVELOPE + b"\xc6\xff\xff\xff\xff"),
        ("claimed fields", b"\x99\x02" + ENVELOPE + b"\xdf\xff\xff\xff\xff\xa4name\xa1n"),
        ("depth of arrays", b"\x99\x0f" + ENVELOPE + b"\x91" * (LARGEST - 9)),
        ("depth of maps", b"\x99\x0f" + ENVELOPE + b"\x81\x01" * ((LARGEST - 9) // 2)),
        (
            "name",
            b"\x99\x02" + ENVELOPE + b"\x81\xa4name\xdb" + struct.pack(">I", LARGEST - 20) + b"n" * (LARGEST - 20),
        ),
    ],
)
def test_request_large_frame_costs_no_more_memory_than_itself(name, frame):
    assert len(frame) <= LARGEST
    tracemalloc.start()
    try:
        begun = time.perf_counter()
        _, refusal = refusal_of(decode_request, frame)
        request_id(frame)
        elapsed = time.perf_counter() - begun
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(refusal) < 400
    assert peak <= 3 * len(frame) + (1 << 20), f"{name}: {peak} bytes for a frame of {len(frame)}"
    assert elapsed < 2.0


@pytest.mark.parametrize("decode", [decode_request, decode_reply])
def test_frame_over_the_limit_is_refused_unread(decode):
    frame = encode(REQUESTS[-2]) + bytes(MAX_HEADER_FRAME_BYTES)
    with pytest.raises(InvalidArgument, match=f"has {len(frame)} bytes, over {MAX_HEADER_FRAME_BYTES}"):
        decode(frame)
    assert request_id(frame) is None


@pytest.mark.parametrize(
    ("frame", "identity"),
    [
        (encode([99, 7]), 7),
        (encode(["no tag", (1 << 64) - 1, None, {}]), (1 << 64) - 1),
        (encode([{"a": [1]}, 0]), 0),
        (encode([15, 7, "wrong"]), 7),
        (encode([15, -1]), None),
        (encode([15, 1.0]), None),
        (encode([15, "7"]), None),
        (encode([15]), None),
        (encode([]), None),
        (encode({"id": 7}), None),
        (encode(7), None),
        (encode([15, 7]) + b"\x00", None),
        (encode([15, 7, b"cut"])[:-1], None),
        (b"", None),
        (b"\xc1", None),
    ],
)
def test_request_id_found_wherever_the_first_two_fields_are_right(frame, identity):
    assert request_id(frame) == identity
    assert request_id(memoryview(frame)) == identity


def test_request_ids_of_valid_frames_are_theirs():
    assert all(request_id(encode(request)) == request.id for request in REQUESTS)


def test_requests_are_no_replies_and_replies_no_requests():
    for request in REQUESTS:
        with pytest.raises(InvalidArgument, match="malformed reply"):
            decode_reply(encode(request))
    for reply in REPLIES:
        with pytest.raises(InvalidArgument, match="malformed request"):
            decode_request(encode(reply))


def test_samples_cover_every_request_and_all_replies_but_one():
    assert {type(request) for request in REQUESTS} == set(get_args(AnyRequest))
    assert {type(reply) for reply in REPLIES} == set(get_args(AnyReply)) - {StatsReply}
