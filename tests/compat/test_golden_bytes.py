"""Released bytes: each golden file decodes to what it always meant, and that encodes to the same bytes.

The messages tell one story: a client greets, joins a namespace, stores two blocks, and reads them. A message whose
fields grew in a later version has a file of its own there; the file of the earlier version must still decode, to the
same message with defaults.
"""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from golden_files import golden, golden_names, parse_hex

from kvstore.errors import ErrorCode
from kvstore.format.constants import RECORD_HEADER_BYTES, CodecId
from kvstore.format.record import RecordHeader, decode_header, decode_record, encode_header
from kvstore.protocol.framing import decode_reply, decode_request, encode
from kvstore.protocol.keys import ROOT_KEY, chain_keys
from kvstore.protocol.messages import (
    AnyReply,
    AnyRequest,
    Attach,
    Attached,
    Bye,
    Chains,
    ChainsReply,
    Clear,
    Configure,
    Configured,
    CountReply,
    Done,
    ErrorReply,
    Exists,
    ExistsReply,
    Flush,
    Get,
    GetReply,
    GetStatus,
    Hello,
    Hint,
    Invalidate,
    Match,
    MatchReply,
    Persist,
    Persisted,
    Ping,
    Prefetch,
    Put,
    PutReply,
    PutStatus,
    Reason,
    Record,
    Recorded,
    Release,
    Remove,
    ReportPrefill,
    Reserve,
    Reserved,
    Retain,
    Retained,
    Stats,
    StatsReply,
    TierId,
    Verify,
    VerifyReply,
    Warm,
    Warmed,
    Welcome,
    Why,
    WhyReply,
)
from kvstore.protocol.namespace import Namespace
from kvstore.protocol.statistics import (
    DaemonStats,
    DramStats,
    EvictionStats,
    LookupStats,
    NamespaceStats,
    PutStats,
    RecordStats,
    RetentionStats,
    ServerStats,
    SessionStats,
    SlotClassStats,
    SsdStats,
    TenantStats,
)
from kvstore.protocol.stories import ChapterStory, GhostStory, KeyStory

SESSION, INCARNATION = 0x0807060504030201, 0x1817161514131211
BOOT_ID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
NAMESPACE = Namespace(name="chat", model="llama", revision="r1", dtype="bfloat16", block_tokens=4, tenant_salt=b"acme")
DIGEST = NAMESPACE.digest(0)
FIRST, SECOND = chain_keys(range(8), 4, salt=b"golden")
PAYLOADS = [bytes(range(64)), bytes(range(64, 160))]


def request(
    number: int, namespace_id: int = 1, access: int = 0, ring_head: int = 0
) -> tuple[int, int, int, int, int, int, int]:
    """The envelope: asked a second after boot, with five seconds of patience."""
    return number, SESSION, namespace_id, 1_000_000_000 + number, 5000, ring_head, access


def reply(number: int) -> tuple[int, int]:
    return number, INCARNATION


def header(key: bytes, parent: bytes, payload: bytes, checksum: int) -> RecordHeader:
    return RecordHeader(
        key=key,
        parent_key=parent,
        namespace_digest=DIGEST,
        part=0,
        codec=CodecId.RAW,
        codec_parameters=bytes(16),
        fidelity=255,
        dtype="uint8",
        shape=(len(payload),),
        token_count=0,
        section_bytes=(len(payload),),
        payload_checksum=checksum,
    )


HEADERS = [
    header(FIRST, ROOT_KEY, PAYLOADS[0], 0x6187EB9089B0ED55),
    header(SECOND, FIRST, PAYLOADS[1], 0xCC0A3D421743D962),
]
TYPED = RecordHeader(
    key=SECOND,
    parent_key=FIRST,
    namespace_digest=DIGEST,
    part=5,
    codec=CodecId.RAW,
    codec_parameters=bytes(16),
    fidelity=255,
    dtype="bfloat16",
    shape=(2, 3, 4, 2),
    token_count=4,
    section_bytes=(96,),
    payload_checksum=0xCC0A3D421743D962,
)

STATS = DaemonStats(
    version="0.1.0",
    pid=4242,
    incarnation="1817161514131211",
    uptime_s=12.5,
    endpoint="ipc:///run/user/1000/kvstore/default.sock",
    dram=DramStats(
        capacity_bytes=1 << 30,
        arena_bytes=1 << 31,
        populated_bytes=1 << 29,
        resident_bytes=8192,
        record_bytes=672,
        granted_bytes=4096,
        limbo_bytes=0,
        blocks=2,
        records=2,
        slab_bytes=1 << 22,
        free_slabs=100,
        problem="",
        classes=[SlotClassStats(slot_bytes=4096, slabs=1, used_slots=3, free_slots=1021)],
    ),
    lookups=LookupStats(
        matches=1, match_keys=3, match_hits=2, gets=1, get_keys=3, get_hits=2, get_throttled=0, bytes_out=160
    ),
    puts=PutStats(stored=2, exists=1, throttled=0, rejected=1, bytes_in=160, reasons={"too_large": 1}),
    eviction=EvictionStats(
        policy="lru", evicted_blocks=3, evicted_bytes=12288, removed_blocks=1, moved_records=0, corrupt_records=0
    ),
    server=ServerStats(
        requests=9,
        bad_requests=1,
        overloaded=0,
        replies_dropped=0,
        sessions_opened=1,
        sessions_died=0,
        sessions_expired=0,
        outbound_bytes=0,
        queue_delay_ms=0.25,
    ),
    namespaces=[NamespaceStats(name="chat", generation=0, blocks=2, slot_bytes=8192)],
    sessions=[
        SessionStats(
            session=SESSION,
            pid=4711,
            idle_s=0.5,
            requests=9,
            leases=1,
            granted_bytes=0,
            outbound_bytes=0,
            version="0.1.0",
        )
    ],
    leases=1,
)

REQUESTS: dict[str, AnyRequest] = {
    "hello": Hello(1, 0, 0, 0, 5000, 0, 0, 1, 1, "0.1.0", 4711, BOOT_ID),
    "attach": Attach(*request(2, 0), NAMESPACE, (64, 96), True, -1),
    "put": Put(*request(3, access=1), 2),
    "match": Match(*request(4, access=2), FIRST + SECOND + bytes([7] * 32), 1500),
    "get": Get(*request(5, access=2), FIRST + bytes([7] * 32) + SECOND, 0),
    "exists": Exists(*request(6), FIRST + bytes([7] * 32)),
    "prefetch": Prefetch(*request(7), FIRST + SECOND, TierId.DRAM),
    "release": Release(*request(8), 9),
    "remove": Remove(*request(9), SECOND),
    "flush": Flush(*request(10)),
    "clear": Clear(*request(11)),
    "invalidate": Invalidate(*request(12), 0),
    "stats": Stats(*request(13, 0)),
    "verify": Verify(*request(14, 0)),
    "ping": Ping(*request(15, 0)),
    "bye": Bye(*request(16, 0)),
}
REPLIES: dict[str, AnyReply] = {
    "error-reply": ErrorReply(*reply(4), ErrorCode.UNKNOWN_SESSION, "greet again"),
    "welcome": Welcome(
        *reply(1),
        1,
        SESSION,
        "0.1.0",
        4 << 20,
        "/dev/shm/kvstore-1000-0123456789ab/client-0807060504030201",
        True,
        4242,
    ),
    "attached": Attached(*reply(2), 1, 0, DIGEST),
    "put-reply": PutReply(
        *reply(3), bytes([PutStatus.STORED, PutStatus.THROTTLED]), bytes([Reason.NONE, Reason.ALL_HELD]), 20
    ),
    "match-reply": MatchReply(*reply(4), 2, ((TierId.DRAM, 2),), 9),
    "get-reply": GetReply(*reply(5), bytes([GetStatus.HIT, GetStatus.MISS, GetStatus.HIT])),
    "exists-reply": ExistsReply(*reply(6), bytes([TierId.DRAM, TierId.NONE])),
    "count-reply": CountReply(*reply(9), 1),
    "done": Done(*reply(10)),
    "stats-reply": StatsReply(*reply(13), STATS),
    "verify-reply": VerifyReply(*reply(14), 2, 672, 0.5, ["slot 17: the payload's checksum is wrong"]),
}

MAPPED_STATS = msgspec.structs.replace(
    STATS,
    dram=msgspec.structs.replace(STATS.dram, index_bytes=13_785_600, max_records=65_536),
    lookups=msgspec.structs.replace(STATS.lookups, mapped_reads=2, dropped_reports=0),
    sessions=[msgspec.structs.replace(STATS.sessions[0], mapped=True)],
)
DIRECTORY = "/dev/shm/kvstore-1000-0123456789ab"

# What changed in version 2, or is new there: clients that map the daemon's memory.
REQUESTS_2: dict[str, AnyRequest] = {
    "hello": Hello(1, 0, 0, 0, 5000, 0, 0, 1, 2, "0.2.0", 4711, BOOT_ID, 1),
    "reserve": Reserve(*request(17, ring_head=40), 320, 0),
}
REPLIES_2: dict[str, AnyReply] = {
    "welcome": Welcome(
        *reply(1),
        2,
        SESSION,
        "0.2.0",
        4 << 20,
        f"{DIRECTORY}/client-0807060504030201",
        True,
        4242,
        f"{DIRECTORY}/arena-1817161514131211",
        f"{DIRECTORY}/index-1817161514131211",
        f"{DIRECTORY}/doorbell-1817161514131211",
        "",
    ),
    "reserved": Reserved(*reply(17), 4096, 256, Reason.NONE),
    "stats-reply": StatsReply(*reply(13), MAPPED_STATS),
}

# What changed in version 3: records of codecs, which are lossy and may replace each other; what a slot is wanted for.
REQUESTS_3: dict[str, AnyRequest] = {
    "reserve": Reserve(*request(17, access=3, ring_head=40), 320, 0, bytes([7] * 32)),
}
REPLIES_3: dict[str, AnyReply] = {
    "match-reply": MatchReply(*reply(4), 2, ((TierId.DRAM, 2),), 9, 85),
    "exists-reply": ExistsReply(*reply(6), bytes([TierId.DRAM, TierId.NONE]), bytes([85, 0])),
    "stats-reply": StatsReply(
        *reply(13),
        msgspec.structs.replace(
            MAPPED_STATS,
            puts=msgspec.structs.replace(MAPPED_STATS.puts, replaced=1),
            namespaces=[
                msgspec.structs.replace(MAPPED_STATS.namespaces[0], model="llama", codec="raw", digest=DIGEST.hex()[:8])
            ],
        ),
    ),
}

RECORDING = RecordStats(
    state="on",
    directory="/var/lib/kvstore/recordings",
    max_bytes=1 << 28,
    file="0123456789ab-000002.lookups",
    started_unix_s=1764144000.5,
    requests=12031,
    blocks=276491,
    bytes_written=778293,
    open_requests=3,
    dropped_requests=1,
)
# What changed in version 4, or is new there: a tier below DRAM, which outlives the daemon.
REQUESTS_5: dict[str, AnyRequest] = {
    "configure": Configure(*request(20), "adaptive", "lru", "predicted"),
    "why": Why(*request(21), FIRST + SECOND, False, ("0f1e2d3c",), DIGEST.hex()[:8]),
    "record": Record(*request(23), "start"),
    "retain": Retain(*request(22), FIRST + SECOND, 80, 60_000, True),
    "match": Match(*request(4, access=2), FIRST + SECOND + bytes([7] * 32), 1500, True, 2500),
    "prefetch": Prefetch(*request(7), FIRST + SECOND, TierId.DRAM, False, 10_000),
    "hint": Hint(*request(19), FIRST + SECOND, True, 60_000),
    "report-prefill": ReportPrefill(*request(21), 48_000, 6_500_000),
    "warm": Warm(*request(22), FIRST + SECOND, bytes([9] * 32), True, 1 << 30),
    "chains": Chains(*request(23), TierId.SSD, 4 << 30),
}
REQUESTS_4: dict[str, AnyRequest] = {
    "match": Match(*request(4, access=2), FIRST + SECOND + bytes([7] * 32), 1500, True),
    "prefetch": Prefetch(*request(7), FIRST + SECOND, TierId.DRAM, True),
    "persist": Persist(*request(18), FIRST + SECOND + bytes([7] * 32)),
    "hint": Hint(*request(19), FIRST + SECOND, False),
}
WELCOME_2 = REPLIES_2["welcome"]
SSD_STATS = SsdStats(
    directory="/var/lib/kvstore",
    state="read-only",
    problem="no space left on the device",
    direct=True,
    capacity_bytes=1 << 38,
    file_bytes=1 << 30,
    formatted_bytes=1 << 29,
    resident_bytes=12_288,
    record_bytes=9000,
    writing_bytes=4096,
    leaving_bytes=8192,
    blocks=3,
    records=4,
    free_bytes=(1 << 29) - 24_576,
    demoted_blocks=5,
    demoted_bytes=20_480,
    dropped_blocks=6,
    promoted_blocks=7,
    promoted_bytes=28_672,
    evicted_blocks=8,
    evicted_bytes=32_768,
    removed_blocks=9,
    hits=10,
    refused_loads=11,
    not_admitted_blocks=12,
    corrupt_records=13,
    read_errors=14,
    write_errors=15,
    groups=16,
    log_bytes=17_408,
    checkpoints=18,
    recovered_records=19,
    recovery_s=0.5,
    read_bytes_per_s=2.5e9,
    write_bytes_per_s=1.25e9,
    waiting_blocks=20,
    retired_bytes=86_016,
    clean_bytes=45_056,
)
STATS_3 = REPLIES_3["stats-reply"]
assert isinstance(STATS_3, StatsReply)
REPLIES_4: dict[str, AnyReply] = {
    "welcome": msgspec.structs.replace(WELCOME_2, protocol=4, daemon_version="0.4.0", lower_tiers=1 << TierId.SSD),
    "persisted": Persisted(
        *reply(18),
        bytes([PutStatus.STORED, PutStatus.THROTTLED, PutStatus.REJECTED]),
        bytes([Reason.NONE, Reason.DEMOTING, Reason.MISSING]),
    ),
    "stats-reply": StatsReply(*reply(13), msgspec.structs.replace(STATS_3.stats, ssd=SSD_STATS)),
    "count-reply": CountReply(*reply(9), 1, 2),
}
STATS_4 = REPLIES_4["stats-reply"]
assert isinstance(STATS_4, StatsReply)
REPLIES_5: dict[str, AnyReply] = {
    "configured": Configured(*reply(20), "adaptive", "lru", "predicted"),
    "recorded": Recorded(*reply(23), RECORDING),
    "retained": Retained(*reply(22), 1, 1),
    "why-reply": WhyReply(
        *reply(21),
        "chat",
        DIGEST.hex(),
        0,
        64,
        1,
        [
            KeyStory(
                key=FIRST,
                state="resident",
                tiers=["dram"],
                depth=0,
                parent="root",
                children=1,
                branched=True,
                parts=1,
                used_ago=3,
                slot_bytes=4096,
                codec="raw",
                chapters=[
                    ChapterStory(ago_s=12.5, part=0, before="granted", after="resident", cause="committed"),
                ],
            ),
            KeyStory(
                key=SECOND,
                state="gone",
                cause="evicted",
                depth=1,
                ghost=GhostStory(cause="evicted", ago_s=2.5, tier="dram", policy="lru", extra_bytes=8192),
            ),
        ],
    ),
    "match-reply": MatchReply(*reply(4), 2, ((2, 1), (3, 1)), 9, 85, 3),
    "warmed": Warmed(*reply(22), 2, 20_480, 1, 3, 4, 5),
    "chains-reply": ChainsReply(*reply(23), (bytes([9] * 32),), ("chat",), 20_480),
    "stats-reply": StatsReply(
        *reply(13),
        msgspec.structs.replace(
            STATS_4.stats,
            eviction=msgspec.structs.replace(
                STATS_4.stats.eviction, ssd_policy="lru", admission="all", ghost_bytes=1 << 20, switched=2
            ),
            retention=RetentionStats(
                budget_bytes=1 << 28,
                retained_blocks=1,
                retained_bytes=4096,
                low_blocks=2,
                waiting_blocks=3,
                over_budget_blocks=4,
                gave_way_blocks=5,
                ended_blocks=6,
                dropped_blocks=7,
                lease_limit_bytes=1 << 29,
                leased_bytes=8192,
                leases_cut=8,
                leases_refused=9,
            ),
            tenants=[
                TenantStats(
                    name="chat",
                    used_bytes=8192,
                    limit_bytes=1 << 20,
                    evicted_blocks=1,
                    refused_puts=2,
                    ssd_used_bytes=4096,
                    ssd_limit_bytes=1 << 30,
                    ssd_evicted_blocks=3,
                )
            ],
        ),
    ),
}
PAYLOAD_FRAMES = {
    "chains-reply": [FIRST + SECOND, bytes([1, 0, 0, 0, 1, 0, 0, 0]), bytes(8)],
    "put": [encode_header(HEADERS[0]), PAYLOADS[0], encode_header(HEADERS[1]), PAYLOADS[1]],
    "get-reply": [encode_header(HEADERS[0]) + PAYLOADS[0], encode_header(HEADERS[1]) + PAYLOADS[1]],
}
RECORDS = {
    "raw-opaque": (HEADERS[0], PAYLOADS[0]),
    "raw-bfloat16": (TYPED, PAYLOADS[1]),
    "raw-lineage": (msgspec.structs.replace(HEADERS[0], lineage=85), PAYLOADS[0]),
}


def decode(frame: bytes, message: msgspec.Struct) -> msgspec.Struct:
    return decode_request(frame) if type(message) in get_args(AnyRequest) else decode_reply(frame)


ALL = {
    "protocol-1": REQUESTS | REPLIES,
    "protocol-2": REQUESTS_2 | REPLIES_2,
    "protocol-3": REQUESTS_3 | REPLIES_3,
    "protocol-4": REQUESTS_4 | REPLIES_4,
    "protocol-5": REQUESTS_5 | REPLIES_5,
}
NOW = {name: f"{folder}/{name}" for folder, messages in ALL.items() for name in messages}
"""The golden file of each message as it is sent today: the last one."""

CURRENT = {f"{folder}/{name}": told for folder, messages in ALL.items() for name, told in messages.items()}
SAME = {"protocol-3/stats-reply", "protocol-4/stats-reply"}
"""Files of messages that got fields that are left out where there is nothing to say: what they say is today's still."""

GROWN = {file: CURRENT.pop(file) for file in list(CURRENT) if file not in {*NOW.values(), *SAME}}
"""Files of messages whose fields grew since."""


@pytest.mark.parametrize(("file", "message"), CURRENT.items(), ids=CURRENT)
def test_message_golden_bytes_decode_and_encode_identically(file: str, message: msgspec.Struct):
    frame, *payloads = golden(file)
    decoded = decode(frame, message)
    assert decoded == message
    assert encode(decoded) == encode(message)
    if file in SAME:
        assert msgspec.msgpack.decode(encode(message)) == msgspec.msgpack.decode(frame)
    else:
        assert encode(message) == frame
    assert payloads == PAYLOAD_FRAMES.get(file.partition("/")[2], [])


def is_grown(now: object, before: object) -> bool:
    """Whether a value is an earlier one with elements behind it, or with fields beside it, at any depth."""
    if isinstance(now, dict) and isinstance(before, dict):
        return all(name in now and is_grown(now[name], value) for name, value in before.items())
    if isinstance(now, list) and isinstance(before, list):
        return len(now) >= len(before) and all(map(is_grown, now, before))
    return type(now) is type(before) and now == before


@pytest.mark.parametrize(("file", "message"), GROWN.items(), ids=GROWN)
def test_message_golden_bytes_of_an_earlier_version_decode_with_defaults(file: str, message: msgspec.Struct):
    (frame,) = golden(file)
    decoded = decode(frame, message)
    assert decoded == message
    # An earlier peer that is sent the message as it is now finds its fields where they were.
    now, before = msgspec.msgpack.decode(encode(decoded)), msgspec.msgpack.decode(frame)
    assert now != before
    assert is_grown(now, before)


def test_put_golden_frames_are_headers_and_payloads_of_records():
    _, *frames = golden("protocol-1/put")
    for expected, encoded, payload in zip(HEADERS, frames[::2], frames[1::2], strict=True):
        assert len(encoded) == RECORD_HEADER_BYTES
        assert decode_header(encoded) == expected
        assert decode_record(encoded + payload) == (expected, payload)


def test_get_reply_golden_frames_are_whole_records():
    _, *frames = golden("protocol-1/get-reply")
    assert [decode_record(frame)[0] for frame in frames] == HEADERS


@pytest.mark.parametrize("name", RECORDS)
def test_record_golden_bytes_decode_and_encode_identically(name: str):
    (record,) = golden(f"record-1/{name}")
    expected, payload = RECORDS[name]
    decoded, view = decode_record(record)
    assert decoded == expected
    assert view == payload
    assert encode_header(decoded) + bytes(view) == record


def test_golden_files_every_message_type_has_one_and_each_is_tested():
    assert set.union(*map(golden_names, ALL)) == set(CURRENT | GROWN)
    assert set(GROWN) == {
        "protocol-1/hello",
        "protocol-1/match",
        "protocol-1/prefetch",
        "protocol-1/welcome",
        "protocol-1/count-reply",
        "protocol-1/match-reply",
        "protocol-1/exists-reply",
        "protocol-1/stats-reply",
        "protocol-2/reserve",
        "protocol-2/welcome",
        "protocol-2/stats-reply",
        "protocol-3/match-reply",
        "protocol-4/hint",
        "protocol-4/match",
        "protocol-4/prefetch",
    }
    assert golden_names("record-1") == {f"record-1/{name}" for name in RECORDS}
    assert {type(message) for message in (REQUESTS | REQUESTS_2 | REQUESTS_4 | REQUESTS_5).values()} == set(
        get_args(AnyRequest)
    )
    assert {type(message) for message in (REPLIES | REPLIES_2 | REPLIES_4 | REPLIES_5).values()} == set(
        get_args(AnyReply)
    )


def test_parse_hex_frames_are_parted_by_blank_lines_only():
    assert parse_hex("# a\n0102 03\n# inside\n04 # behind\n\n# b\n05\n\n\n# c\n06\n") == [b"\1\2\3\4", b"\5", b"\6"]
