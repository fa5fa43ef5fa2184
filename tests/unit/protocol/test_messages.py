"""Messages as such: tags, field order and enums are frozen, and messages of other versions still decode."""

from __future__ import annotations

from enum import IntEnum

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_strategies import MESSAGES, REPLIES, REQUESTS, messages

from kvstore.errors import ErrorCode, InvalidArgument
from kvstore.protocol.framing import decode_reply, decode_request, encode
from kvstore.protocol.messages import (
    Attach,
    GetStatus,
    Hello,
    Ping,
    Prefetch,
    PutStatus,
    Reason,
    Stats,
    TierId,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.version import (
    MAX_DECLARED_SIZES,
    MAX_GENERATION,
    MAX_HEADER_FRAME_BYTES,
    MAX_IDENT_CHARACTERS,
    MAX_KEYS_PER_REQUEST,
    PROTOCOL_VERSION,
    negotiate,
)

REQUEST_FIELDS = "id session namespace_id sent_ns timeout_ms ring_head access"
REPLY_FIELDS = "id incarnation"

# Released tags and fields. Rows and fields are only ever added at the end; nothing here is changed or removed.
RELEASED = {
    1: ("Hello", f"{REQUEST_FIELDS} protocol_oldest protocol_newest client_version pid boot_id mapped_layout"),
    2: ("Attach", f"{REQUEST_FIELDS} namespace payload_bytes locked generation"),
    3: ("Put", f"{REQUEST_FIELDS} count"),
    4: ("Get", f"{REQUEST_FIELDS} keys part"),
    5: ("Match", f"{REQUEST_FIELDS} keys lease_ms prefetch prefetch_ms"),
    6: ("Exists", f"{REQUEST_FIELDS} keys"),
    7: ("Remove", f"{REQUEST_FIELDS} keys"),
    8: ("Clear", REQUEST_FIELDS),
    9: ("Flush", REQUEST_FIELDS),
    10: ("Invalidate", f"{REQUEST_FIELDS} generation"),
    11: ("Prefetch", f"{REQUEST_FIELDS} keys tier wait within_ms"),
    12: ("Release", f"{REQUEST_FIELDS} lease"),
    13: ("Stats", REQUEST_FIELDS),
    14: ("Verify", REQUEST_FIELDS),
    15: ("Ping", REQUEST_FIELDS),
    16: ("Bye", REQUEST_FIELDS),
    17: ("Reserve", f"{REQUEST_FIELDS} record_bytes lane parent"),
    18: ("Persist", f"{REQUEST_FIELDS} keys"),
    19: ("Hint", f"{REQUEST_FIELDS} keys soon within_ms"),
    20: ("Configure", f"{REQUEST_FIELDS} policy ssd_policy admission"),
    21: ("Why", f"{REQUEST_FIELDS} keys chained prefixes namespace"),
    23: ("Record", f"{REQUEST_FIELDS} action"),
    22: ("Retain", f"{REQUEST_FIELDS} keys priority ttl_ms drop"),
    30: ("ReportPrefill", f"{REQUEST_FIELDS} tokens micros"),
    31: ("Warm", f"{REQUEST_FIELDS} keys digest evict budget_bytes"),
    32: ("Chains", f"{REQUEST_FIELDS} tier budget_bytes"),
    101: ("ErrorReply", f"{REPLY_FIELDS} code message"),
    102: (
        "Welcome",
        f"{REPLY_FIELDS} protocol session daemon_version max_record_bytes session_file same_host pid "
        "arena_file index_file doorbell unmapped lower_tiers",
    ),
    103: ("Attached", f"{REPLY_FIELDS} namespace_id generation digest"),
    104: ("PutReply", f"{REPLY_FIELDS} statuses reasons retry_after_ms"),
    105: ("GetReply", f"{REPLY_FIELDS} statuses"),
    106: ("MatchReply", f"{REPLY_FIELDS} hits tiers lease fidelity recompute"),
    107: ("ExistsReply", f"{REPLY_FIELDS} tiers fidelities"),
    108: ("CountReply", f"{REPLY_FIELDS} count below"),
    109: ("Done", REPLY_FIELDS),
    110: ("StatsReply", f"{REPLY_FIELDS} stats"),
    111: ("VerifyReply", f"{REPLY_FIELDS} records bytes seconds problems"),
    112: ("Reserved", f"{REPLY_FIELDS} slot_bytes slots reason"),
    113: ("Persisted", f"{REPLY_FIELDS} statuses reasons"),
    114: ("Configured", f"{REPLY_FIELDS} policy ssd_policy admission"),
    115: ("WhyReply", f"{REPLY_FIELDS} namespace digest generation block_tokens parts stories"),
    117: ("Recorded", f"{REPLY_FIELDS} recording"),
    116: ("Retained", f"{REPLY_FIELDS} count waiting"),
    130: ("Warmed", f"{REPLY_FIELDS} brought brought_bytes there unknown no_room failed"),
    131: ("ChainsReply", f"{REPLY_FIELDS} digests names slot_bytes"),
}

RELEASED_ENUMS = {
    PutStatus: "STORED=1 EXISTS=2 THROTTLED=3 REJECTED=4 PENDING=5",
    GetStatus: "MISS=0 HIT=1 THROTTLED=2",
    TierId: "NONE=0 HBM=1 DRAM=2 SSD=3 REMOTE=4",
    Reason: "NONE=0 TOO_LARGE=1 NO_ROOM=2 ALL_HELD=3 POPULATING=4 OVERLOADED=5 STALE_NAMESPACE=6 BAD_RECORD=7 "
    "BAD_PARENT=8 BAD_PART=9 GRANT_LIMIT=10 MEMORY_LIMIT=11 NOT_EXACT=12 OTHER_CODEC=13 "
    "DEMOTING=14 NOT_DURABLE=15 MISSING=16 QUOTA=17",
    ErrorCode: "BAD_REQUEST=1 PROTOCOL_MISMATCH=2 UNKNOWN_SESSION=3 UNKNOWN_NAMESPACE=4 THROTTLED=5 "
    "SHUTTING_DOWN=6 LIMIT=7 INTERNAL=8",
}


def decode(frame: bytes, struct: type[msgspec.Struct]) -> msgspec.Struct:
    return decode_request(frame) if struct in REQUESTS else decode_reply(frame)


def elements(message: msgspec.Struct) -> list[object]:
    """The array that a message is on the wire."""
    listed = msgspec.msgpack.decode(encode(message))
    assert isinstance(listed, list)
    return listed


by_struct = pytest.mark.parametrize("struct", MESSAGES, ids=lambda struct: struct.__name__)


@by_struct
@given(data=st.data())
def test_message_encoded_and_decoded_is_the_same(struct, data):
    message = data.draw(messages(struct))
    frame = encode(message)
    assert decode(frame, struct) == message
    assert decode(memoryview(frame), struct) == message
    assert encode(decode(frame, struct)) == frame


@by_struct
@given(data=st.data(), extra=st.lists(st.none() | st.integers(0, 9) | st.binary(max_size=9), min_size=1))
def test_message_extra_trailing_elements_of_a_later_version_are_ignored(struct, data, extra):
    message = data.draw(messages(struct))
    assert decode(encode([*elements(message), *extra]), struct) == message


@by_struct
@given(data=st.data())
def test_message_missing_trailing_defaults_of_an_earlier_version_are_filled(struct, data):
    message = data.draw(messages(struct))
    listed = elements(message)
    defaults = len(struct.__struct_defaults__)
    for missing in range(1, defaults + 1):
        shorter = decode(encode(listed[:-missing]), struct)
        given = struct.__struct_fields__[: len(struct.__struct_fields__) - missing]
        assert all(getattr(shorter, name) == getattr(message, name) for name in given)
        filled = struct.__struct_fields__[-missing:]
        assert tuple(getattr(shorter, name) for name in filled) == struct.__struct_defaults__[-missing:]
    with pytest.raises(InvalidArgument, match="malformed"):
        decode(encode(listed[: len(listed) - defaults - 1]), struct)


def test_messages_tags_and_fields_are_those_released():
    now = {struct.__struct_config__.tag: (struct.__name__, " ".join(struct.__struct_fields__)) for struct in MESSAGES}
    assert len(now) == len(MESSAGES), "two messages share a tag"
    assert now == RELEASED
    assert all(struct.__struct_config__.tag < 100 for struct in REQUESTS)
    assert all(struct.__struct_config__.tag > 100 for struct in REPLIES)
    assert all(struct.__struct_config__.array_like for struct in MESSAGES)


@pytest.mark.parametrize("enum", RELEASED_ENUMS, ids=lambda enum: enum.__name__)
def test_enums_values_are_those_released(enum: type[IntEnum]):
    assert " ".join(f"{member.name}={member.value}" for member in enum) == RELEASED_ENUMS[enum]


def test_message_first_element_is_the_tag_and_second_the_id():
    assert elements(Ping(7, 1, 0, 0, 0, 0, 0))[:2] == [15, 7]


ENVELOPE = [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("listed", "where"),
    [
        *[([15, *ENVELOPE[:at], -1, *ENVELOPE[at + 1 :]], f"`$[{at + 1}]`") for at in range(7)],
        *[([15, *ENVELOPE[:at], bad, *ENVELOPE[at + 1 :]], f"`$[{at + 1}]`")
          for at in range(7) for bad in (None, True, 1.0, "1", b"1", [1], {})],
        ([0, *ENVELOPE], "`$[0]`"),
        ([99, *ENVELOPE], "`$[0]`"),
        ([20, *ENVELOPE, "n" * (MAX_IDENT_CHARACTERS + 1)], "`$[8]`"),
        ([101, *ENVELOPE], "`$[0]`"),
        (["15", *ENVELOPE], "`$[0]`"),
        ([15, *ENVELOPE[:6]], "length 8, got 7"),
        ([], "length 1, got 0"),
        ([4, *ENVELOPE, "text"], "`$[8]`"),
        ([4, *ENVELOPE, bytes(32 * MAX_KEYS_PER_REQUEST + 1)], "`$[8]`"),
        ([4, *ENVELOPE, b"", -1], "`$[9]`"),
        ([11, *ENVELOPE, b"", 9], "`$[9]`"),
        ([5, *ENVELOPE, b"", 0, 1], "`$[10]`"),
        ([11, *ENVELOPE, b"", 2, 1], "`$[10]`"),
        ([18, *ENVELOPE], "length 9, got 8"),
        ([18, *ENVELOPE, bytes(32 * MAX_KEYS_PER_REQUEST + 1)], "`$[8]`"),
        ([19, *ENVELOPE, b"", 1], "`$[9]`"),
        ([1, *ENVELOPE, 1, 1, "v" * (MAX_IDENT_CHARACTERS + 1)], "`$[10]`"),
        ([1, *ENVELOPE, 1, 1, "v", 2, "b", -1], "`$[13]`"),
        ([17, *ENVELOPE, 4096], "length 10, got 9"),
        ([17, *ENVELOPE, -1, 0], "`$[8]`"),
        ([17, *ENVELOPE, 4096, "0"], "`$[9]`"),
        ([2, *ENVELOPE, []], "`$[8]`"),
        ([2, *ENVELOPE, {"parts": 0}], "parts must be 1 to 4096"),
        ([2, *ENVELOPE, {"colour": "red"}], "unknown field `colour`"),
        ([2, *ENVELOPE, {"parts": True}], "`$[8].parts`"),
        ([2, *ENVELOPE, {}, [1] * (MAX_DECLARED_SIZES + 1)], "`$[9]`"),
        ([2, *ENVELOPE, {}, [-1]], "`$[9][0]`"),
        ([2, *ENVELOPE, {}, [], 1], "`$[10]`"),
        ([2, *ENVELOPE, {}, [], False, -2], "`$[11]`"),
        ([2, *ENVELOPE, {}, [], False, MAX_GENERATION + 1], "`$[11]`"),
    ],
)  # fmt: skip
def test_request_bad_field_is_refused_by_position(listed, where):
    with pytest.raises(InvalidArgument, match="malformed request: ") as caught:
        decode_request(encode(listed))
    assert where in str(caught.value)


def test_request_complaint_about_a_long_value_is_cut():
    with pytest.raises(InvalidArgument) as caught:
        decode_request(encode([2, *ENVELOPE, {"x" * 1_000_000: 1}]))
    assert len(str(caught.value)) < 400


def test_request_namespace_defaults_are_filled_and_order_is_free():
    fields = {"parts": 2, "name": "n"}
    assert decode_request(encode([2, *ENVELOPE, fields])) == Attach(*ENVELOPE, Namespace(name="n", parts=2))
    assert decode_request(encode([2, *ENVELOPE, {}])) == Attach(*ENVELOPE, Namespace())


def test_request_largest_legal_fits_the_header_frame():
    frame = encode(Prefetch(*[(1 << 64) - 1] * 7, keys=bytes(32 * MAX_KEYS_PER_REQUEST), tier=TierId.SSD))
    assert len(frame) <= MAX_HEADER_FRAME_BYTES
    assert isinstance(decode_request(frame), Prefetch)


def test_reply_with_statuses_of_a_later_version_still_decodes():
    """Statuses and codes are plain numbers on the wire, so that a new one does not break an old client."""
    assert decode_reply(encode([104, 1, 2, bytes([77]), bytes([99])]))
    assert decode_reply(encode([101, 1, 2, 99, "a cause not known yet"]))


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (1, [11, 7, 7, 3, 7, 7]),
        (2, [11, 7, 7, 3, 7, 7]),
        (3, [11, 12, 13, 3, 7, 7]),
        (4, [11, 12, 13, 14, 15, 16]),
    ],
)
def test_reason_of_a_later_version_is_told_as_one_that_the_peer_knows(version, told):
    assert [Reason(value).known_in(version) for value in range(11, 17)] == told
    assert all(Reason(value).known_in(version) == value for value in range(11))


@pytest.mark.parametrize(
    ("oldest", "newest", "agreed"),
    [
        (1, 1, 1),
        (0, 1, 1),
        (1, 2, 2),
        (2, 2, 2),
        (1, 9, PROTOCOL_VERSION),
        (2, 9, PROTOCOL_VERSION),
        (3, 3, 3),
        (4, 9, PROTOCOL_VERSION),
        (5, 9, PROTOCOL_VERSION),
        (6, 9, None),
        (0, 0, None),
        (0, 5, PROTOCOL_VERSION),
        (5, 1, None),
    ],
)
def test_negotiate_highest_common_version_or_none(oldest, newest, agreed):
    assert negotiate(oldest, newest) == agreed


def test_stats_and_hello_are_what_a_first_client_sends():
    first = bytes.fromhex("9d0101000000cd138800000101a000a0")
    hello = decode_request(first)
    assert hello == Hello(1, 0, 0, 0, 5000, 0, 0, 1, 1)
    # The array is one longer now: what a client would map, which one of version 1 does not say.
    assert encode(hello) == b"\x9e" + first[1:] + b"\0"
    assert encode(Stats(2, 3, 0, 0, 0, 0, 0)).hex() == "980d02030000000000"
