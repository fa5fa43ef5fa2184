"""``docs/mapped.md`` and the golden bytes of layout 1 against the code that reads and writes shared memory.

The golden files are what the compiled functions themselves write: a client puts a block into a lent slot and commits
it, the daemon publishes it, the client matches four keys of which it is the first.
"""

from __future__ import annotations

import re
import struct
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from doc_tables import DOCS, Table, examples, table, tables
from golden_files import golden, golden_names
from mapped_memory import MappedMemory

from kvstore.format.constants import PAGE_BYTES, RECORD_HEADER_BYTES, CodecId
from kvstore.mapped import arena, bucket, client_file, grants, index_file, index_reader, index_writer, ring
from kvstore.mapped import context as fields
from kvstore.mapped.arena import ArenaHeader, ArenaState
from kvstore.mapped.client_file import ClientFlag, ClientState, RingKind
from kvstore.mapped.grants import offer
from kvstore.mapped.index_file import EntryState, IndexHeader, IndexState, NamespaceWord
from kvstore.mapped.reads import match
from kvstore.mapped.session_file import (
    MAPPED_SESSION_VERSION,
    SESSION_FILE_BYTES,
    SESSION_VERSION,
    SessionHeader,
    decode_session_header,
    encode_session_header,
)
from kvstore.mapped.writes import put_one
from kvstore.protocol.keys import ROOT_KEY, chain_keys
from kvstore.protocol.messages import Hello, Welcome
from kvstore.server import doorbell, mapping, rings
from kvstore_client import mapped_session, mapped_watch, shared_memory

PAGE = "mapped.md"
TEXT = " ".join((DOCS / PAGE).read_text(encoding="utf-8").split())
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}

INCARNATION, SESSION = 0x1817161514131211, 0x0807060504030201
SEED = 0x0123456789ABCDEF
BUCKETS, NAMESPACE, SLOT = 18725, 3, 7
KEYS = chain_keys(range(16), 4, salt=b"golden")
PAYLOAD = bytes(range(64))
RECORD_BYTES = RECORD_HEADER_BYTES + len(PAYLOAD)
CHECKSUM = 0x6187EB9089B0ED55
TAG = 0x5E3AACBC60BDDEB5
ACCESS, TIME_NS = 5, 1_000_000_009
HEADER = IndexHeader(INCARNATION, BUCKETS, SEED, (2 << 20) + (17 << 26), 64, 64 << 20)


# ---------------------------------------------------------------- reading the page


def under(heading: str, *columns: str) -> list[Table]:
    """The tables of a section that have these columns, in order."""
    return [one for one in tables(PAGE) if one.heading == heading and one.columns == columns]


STRUCT = ("offset", "bytes", "type", "field", "meaning")
OWNED = ("offset", "bytes", "type", "field", "written by", "meaning")
BITS = ("first bit", "bits", "field")
(ARENA,) = under("The arena file", *STRUCT)
INDEX, NAMESPACE_ENTRY, ENTRY = under("The index file", *STRUCT)
REGIONS, BUCKET = under("The index file", "offset", "bytes", "what")
(WORDS,) = under("The index file", "word", *BITS)
CLIENT, LANE = under("The client's file", *OWNED)
(RECORD,) = under("The client's file", *STRUCT)
(GRANT,) = under("The client's file", *BITS)
(KINDS,) = under("The client's file", "kind", "name", "says", "fields that count")


def values(one: Table, data: bytes) -> dict[str, object]:
    """Every field of a structure, read only with what the page says of it."""
    found: dict[str, object] = {}
    for row in one.rows:
        offset, size = int(row["offset"]), int(row["bytes"])
        piece = data[offset : offset + size]
        assert len(piece) == size, row
        if row["type"] in CODES:
            assert struct.calcsize(CODES[row["type"]]) == size, row
            (found[row["field"]],) = struct.unpack(f"<{CODES[row['type']]}", piece)
        else:
            found[row["field"]] = piece
    return found


def places(one: Table, what: str = "field") -> dict[str, tuple[int, int]]:
    """Offset and size of each row."""
    return {row[what]: (int(row["offset"]), int(row["bytes"])) for row in one.rows}


def numbered(text: str) -> dict[int, str]:
    """The values in a text like "0 none, 1 current"; what stands behind a ";" is none of them."""
    found = re.findall(r"(\d+) ([a-z]+)", text.partition(";")[0])
    return {int(number): name for number, name in found}


def meaning(one: Table, field: str) -> str:
    (row,) = [row for row in one.rows if row["field"] == field]
    return row["meaning"]


def lower(members: type[ArenaState | IndexState | NamespaceWord | ClientState]) -> dict[int, str]:
    return {member.value: member.name.lower() for member in members}


# ---------------------------------------------------------------- what the functions write


class Story:
    """A put, its publication and a match, in plain memory."""

    def __init__(self) -> None:
        self.memory = memory = MappedMemory(buckets=BUCKETS)
        memory.seed = SEED
        memory.set(fields.SEED, SEED)
        assert memory.namespace == NAMESPACE
        slots = np.array([SLOT], np.int64)
        assert offer(memory.file_at, 0, 0, PAGE_BYTES, int(slots.ctypes.data), 1) == 1
        self.grant = int(memory.file[client_file.GRANT_OFFSET // 8])
        memory.set(fields.LANE_PAGES, 1)
        assert put_one(memory.context, id(KEYS[0]), id(ROOT_KEY), id(PAYLOAD), 0, ACCESS) == 0
        assert memory.publish(SLOT, KEYS[0], len(PAYLOAD), CHECKSUM)
        assert match(memory.context, id(KEYS), len(KEYS), ACCESS, 0) == 1

    def ring_records(self, number: int, count: int) -> bytes:
        """Records of the ring; the time of the first is a fixed one."""
        begin = client_file.RING_OFFSET + 64 * number
        data = bytearray(self.memory.file.data.cast("B")[begin : begin + 64 * count])
        assert struct.unpack_from("<Q", data, 40)[0] > 0
        struct.pack_into("<Q", data, 40, TIME_NS)
        return bytes(data)

    @property
    def entry(self) -> list[bytes]:
        """The tags of the bucket that the record went into, and its entry."""
        index = self.memory.index.data.cast("B")
        number = int(self.memory.entries[SLOT])
        begin = index_file.BUCKET_OFFSET + number // 8 * 512
        at = index_file.BUCKET_OFFSET + number * 64
        return [bytes(index[begin : begin + 64]), bytes(index[at : at + 64])]


@cache
def story() -> Story:
    return Story()


def written(name: str) -> list[bytes]:
    """What the code writes today where the golden file has what it wrote when the layout was released."""
    if name == "index-header":
        return [index_file.encode_index_header(HEADER).ljust(128, b"\0") + struct.pack("<Q", IndexState.LIVE)]
    if name == "client-header":
        header = encode_session_header(SessionHeader(INCARNATION, SESSION, mapped=True))
        return [header.ljust(128, b"\0") + struct.pack("<Q", ClientState.LIVE)]
    if name == "entry":
        return story().entry
    return [story().ring_records(*{"commit": (0, 1), "report": (1, 3)}[name])]


NAMES = ["index-header", "entry", "client-header", "commit", "report"]


@pytest.mark.parametrize("name", NAMES)
def test_mapped_golden_bytes_are_what_the_compiled_functions_write(name: str):
    assert written(name) == golden(f"mapped-1/{name}")


def test_mapped_golden_files_are_all_tested_and_shown():
    assert golden_names("mapped-1") == {f"mapped-1/{name}" for name in NAMES}
    assert examples(PAGE) == {f"mapped-1/{name}": b"".join(golden(f"mapped-1/{name}")) for name in NAMES}


# ---------------------------------------------------------------- the files


def test_mapped_doc_arena_header_is_the_codes():
    header = ArenaHeader(INCARNATION, 1 << 26, 17, 4242, ArenaState.DEAD)
    assert values(ARENA, arena.encode_arena_header(header)) == {
        "magic": arena.ARENA_MAGIC,
        "version": arena.ARENA_VERSION,
        "state": ArenaState.DEAD,
        "incarnation": INCARNATION,
        "slab_bytes": 1 << 26,
        "slab_count": 17,
        "pid": 4242,
    }
    assert places(ARENA)["state"] == (arena.STATE_OFFSET, 4)
    assert numbered(meaning(ARENA, "state")) == lower(ArenaState)
    assert header.arena_bytes == (2 << 20) + (17 << 26)
    assert arena.ARENA_HEADER_BYTES == 2 << 20


def test_mapped_doc_index_header_is_the_codes():
    (data,) = golden("mapped-1/index-header")
    assert index_file.decode_index_header(data, HEADER.index_bytes) == HEADER
    assert values(INDEX, data) == {
        "magic": index_file.INDEX_MAGIC,
        "layout": index_file.MAPPED_LAYOUT,
        "reserved": 0,
        "incarnation": INCARNATION,
        "bucket_count": BUCKETS,
        "namespace_count": index_file.NAMESPACE_COUNT,
        "hash_seed": SEED,
        "arena_bytes": HEADER.arena_bytes,
        "verify_every": 64,
        "hazard_bytes": 64 << 20,
        "state": IndexState.LIVE,
    }
    assert places(INDEX)["state"] == (index_file.STATE_OFFSET, 8)
    assert numbered(meaning(INDEX, "state")) == lower(IndexState)
    assert int(meaning(INDEX, "namespace_count")) == index_file.NAMESPACE_COUNT
    assert index_file.bucket_count_for(65536) == BUCKETS


def test_mapped_doc_index_regions_are_the_codes():
    assert [(row["offset"], row["bytes"]) for row in REGIONS.rows] == [
        ("0", str(PAGE_BYTES)),
        (str(index_file.NAMESPACE_OFFSET), str(index_file.NAMESPACE_COUNT * index_file.NAMESPACE_ENTRY_BYTES)),
        (str(index_file.BUCKET_OFFSET), f"{index_file.BUCKET_BYTES} * buckets"),
    ]
    tags = 8 * index_file.BUCKET_ENTRIES
    assert list(places(BUCKET, "what").values()) == [
        (0, tags),
        (tags, index_file.ENTRY_BYTES - tags),
        (index_file.ENTRY_BYTES, index_file.BUCKET_ENTRIES * index_file.ENTRY_BYTES),
    ]
    assert HEADER.index_bytes == index_file.BUCKET_OFFSET + index_file.BUCKET_BYTES * BUCKETS


def test_mapped_doc_namespace_entry_is_the_codes():
    data = index_file.NAMESPACE_LAYOUT.pack(NamespaceWord.OVER, 9, 4, 0, bytes(range(32)))
    assert len(data) == index_file.NAMESPACE_ENTRY_BYTES
    assert values(NAMESPACE_ENTRY, data) == {
        "state": 2,
        "generation": 9,
        "parts": 4,
        "reserved": 0,
        "digest": bytes(range(32)),
    }
    assert numbered(meaning(NAMESPACE_ENTRY, "state")) == lower(NamespaceWord)


def test_mapped_doc_entry_is_the_codes():
    tags, entry = golden("mapped-1/entry")
    found = values(ENTRY, entry)
    assert found == {
        "sequence": 2,
        "key": KEYS[0],
        "place": SLOT | RECORD_BYTES << 32,
        "identity": NAMESPACE | CodecId.RAW << 32 | EntryState.LIVE << 48 | 255 << 56,
        "checksum": CHECKSUM,
    }
    assert struct.unpack("<8Q", tags) == (0, 0, 0, 0, 0, 0, TAG, 0)
    assert places(ENTRY) == {
        "sequence": (index_file.ENTRY_SEQUENCE, 8),
        "key": (index_file.ENTRY_KEY, 32),
        "place": (index_file.ENTRY_PLACE, 8),
        "identity": (index_file.ENTRY_IDENTITY, 8),
        "checksum": (index_file.ENTRY_CHECKSUM, 8),
    }


def test_mapped_doc_bits_are_the_codes():
    bits = {(row["word"], int(row["first bit"])): (int(row["bits"]), row["field"]) for row in WORDS.rows}
    shifts = (index_file.PART_SHIFT, index_file.CODEC_SHIFT, index_file.STATE_SHIFT, index_file.FIDELITY_SHIFT)
    assert [key for key in bits if key[0] == "identity"] == [("identity", 0), *(("identity", bit) for bit in shifts)]
    for word in ("place", "identity"):
        ends = [first + size for (name, first), (size, _) in bits.items() if name == word]
        assert [first for name, first in bits if name == word] == [0, *ends[:-1]]
        assert ends[-1] == 64
    assert bits["place", 0][1] == "slot"
    assert (1 << bits["identity", 0][0] + bits["identity", 16][0]) - 1 == index_file.WHO_MASK
    assert numbered(bits["identity", 48][1]) == {member.value: member.name.lower() for member in EntryState}
    assert [(int(row["first bit"]), int(row["bits"]), row["field"]) for row in GRANT.rows] == [
        (0, grants.GRANT_PAGES_SHIFT, "slot"),
        (grants.GRANT_PAGES_SHIFT, 64 - grants.GRANT_PAGES_SHIFT, "pages of the slot"),
    ]
    assert story().grant == SLOT | 1 << 32


def test_mapped_doc_client_file_is_the_codes():
    code = client_file
    assert places(CLIENT) == {
        "magic": (0, 8),
        "version": (8, 4),
        "reserved": (12, 4),
        "incarnation": (16, 8),
        "session": (24, 8),
        "state": (code.STATE_OFFSET, 8),
        "awake": (code.AWAKE_OFFSET, 8),
        "consumed": (code.CONSUMED_OFFSET, 8),
        "head": (code.HEAD_OFFSET, 8),
        "flags": (code.FLAGS_OFFSET, 8),
        "dropped_reports": (code.DROPPED_REPORTS_OFFSET, 8),
        "hazards": (code.HAZARD_OFFSET, 8 * index_writer.HAZARD_WORDS),
        "lanes": (code.LANE_OFFSET, code.LANE_COUNT * code.LANE_BYTES),
        "answers": (code.ANSWER_OFFSET, 2 * code.RING_RECORDS),
        "grants": (code.GRANT_OFFSET, 8 * code.LANE_GRANTS * code.LANE_COUNT),
        "ring": (code.RING_OFFSET, code.RING_RECORDS * code.RING_RECORD_BYTES),
    }
    ordered = list(places(CLIENT).values())
    assert all(left[0] + left[1] <= right[0] for left, right in pairwise(ordered))
    assert sum(ordered[-1]) == code.CLIENT_FILE_BYTES
    for row in CLIENT.rows:
        count, _, kind = row["type"].rpartition(" x ")
        if count:
            size = struct.calcsize(CODES[kind]) if kind in CODES else int(kind.removesuffix(" bytes"))
            assert int(count) * size == int(row["bytes"]), row
    assert f"{code.CLIENT_FILE_BYTES} bytes, made by the daemon" in TEXT
    assert f"other clients get one of {SESSION_FILE_BYTES} bytes with version {SESSION_VERSION}" in TEXT
    assert numbered(meaning(CLIENT, "state")) == lower(ClientState)
    assert f"bit {ClientFlag.DEVICE.bit_length() - 1}: it has a device context" in meaning(CLIENT, "flags")
    assert places(LANE) == {
        "head": (code.LANE_HEAD, 8),
        "slot_bytes": (code.LANE_SLOT_BYTES, 8),
        "tail": (code.LANE_TAIL, 8),
    }


def test_mapped_doc_client_header_is_the_codes():
    (data,) = golden("mapped-1/client-header")
    assert decode_session_header(data) == SessionHeader(INCARNATION, SESSION, mapped=True)
    header = Table(CLIENT.heading, CLIENT.columns, CLIENT.rows[:6])
    assert values(header, data) == {
        "magic": b"KVCLIENT",
        "version": MAPPED_SESSION_VERSION,
        "reserved": 0,
        "incarnation": INCARNATION,
        "session": SESSION,
        "state": ClientState.LIVE,
    }


# ---------------------------------------------------------------- the ring


def test_mapped_doc_ring_records_are_the_codes():
    commit = values(RECORD, golden("mapped-1/commit")[0])
    nothing = dict.fromkeys(RECORD.column("field"), 0)
    told = {"namespace": NAMESPACE, "slot": SLOT, "access": ACCESS, "time": TIME_NS}
    assert commit == {**nothing, **told, "kind": RingKind.COMMIT, "asked": RECORD_BYTES}
    (data,) = golden("mapped-1/report")
    assert values(RECORD, data) == {
        **nothing,
        **told,
        "kind": RingKind.MATCH,
        "continuations": 2,
        "named": 3,
        "asked": 4,
        "hits": 1,
        "sequence": 2,
    }
    assert data[64:] == b"".join(KEYS[1:]) + bytes(32)


def test_mapped_doc_ring_fields_are_where_daemon_and_client_look():
    found = places(RECORD)
    assert [size for _, size in found.values()] == [1, 1, 1, 1, 2, 2, 4, 4, *[8] * 6]
    assert list(found.values()) == sorted(found.values())
    # The daemon's own reading of it, without the byte that it skips.
    names = [name for name in found if name != "reserved"]
    sample = bytes(range(1, 65))
    assert tuple(values(RECORD, sample)[name] for name in names) == rings._RECORD.unpack(sample)
    assert found["kind"][0] == client_file.WORD_KIND
    for name, offset in {
        "asked": client_file.WORD_COUNTS,
        "slot": client_file.WORD_SLOT,
        "sequence": client_file.WORD_SEQUENCE,
        "access": client_file.WORD_ACCESS,
        "time": client_file.WORD_TIME,
        "payload_bytes": client_file.WORD_BYTES,
        "later": client_file.WORD_RUNS,
    }.items():
        assert found[name][0] == offset, name


def test_mapped_doc_kinds_are_the_codes():
    kinds = {int(row["kind"]): row["name"] for row in KINDS.rows}
    assert kinds == {kind.value: kind.name for kind in RingKind}
    done = under("From commit to answer", "kind", "daemon")[0].column("kind")
    assert sorted(name for cell in done for name in cell.split(", ")) == sorted(kinds.values())
    assert f"at most {client_file.MAX_MISSING // 2}" in meaning(RECORD, "continuations")
    assert f"at most {client_file.MAX_MISSING}" in meaning(RECORD, "named")


# ---------------------------------------------------------------- numbers and the hash


def test_mapped_doc_hash_of_the_page_finds_the_golden_entry():
    """The page's pseudo code, in Python, with the page's constants."""
    constants = [int(text, 16) for text in re.findall(r"C\d = 0x([0-9a-f]{16})", TEXT)]
    assert constants == [bucket._C1, bucket._C2, bucket._C3, bucket._C4]
    c1, c2, c3, c4 = constants

    def fold(left: int, right: int) -> int:
        product = left * right
        return (product ^ product >> 64) & (1 << 64) - 1

    w0, w1, w2, w3 = struct.unpack("<4Q", KEYS[0])
    left, right = fold(w0 ^ SEED, w1 ^ c1), fold(w2 ^ SEED ^ c2, w3 ^ c3)
    tag = fold(left ^ NAMESPACE ^ c4, right ^ SEED)
    buckets = [((tag & 0xFFFFFFFF) * BUCKETS) >> 32, ((tag >> 32) * BUCKETS) >> 32]
    assert tag == TAG
    assert int(story().memory.entries[SLOT]) // 8 == buckets[0]
    assert f"the tag is 0x{tag:016x}, the buckets are {buckets[0]} and {buckets[1]}" in TEXT
    assert f"`hash_seed` is 0x{SEED:016x}, there are {BUCKETS} buckets" in TEXT


def test_mapped_doc_limits_are_the_codes():
    limits = {row["limit"]: row["value"] for row in table(PAGE, "Limits").rows}
    assert limits == {
        "hazard words a client": str(index_writer.HAZARD_WORDS),
        "payload bytes read in place a client": "`hazard_bytes`",
        "lanes a client": str(client_file.LANE_COUNT),
        "grants in a lane": str(client_file.LANE_GRANTS),
        "ring records": str(client_file.RING_RECORDS),
        "ring places kept for commits": str(ring._KEPT_FOR_COMMITS),
        "ring records taken of one client at a time": str(rings._BATCH),
        "missing keys named in a report": str(client_file.MAX_MISSING),
        "namespace ids of an incarnation": str(index_file.NAMESPACE_COUNT - 1),
        "looks at an entry that is being written": str(bucket._SPINS),
        "tries of a read": str(index_reader._TRIES),
        "suspects verified a client and second": str(rings._SUSPECTS),
    }
    assert f"After {bucket._SPINS} looks the answer is busy" in TEXT
    assert f"it could not be read once in {bucket._SPINS} looks" in TEXT
    assert TEXT.count(f"at most {index_reader._TRIES} times:") == 2
    assert f"at most {bucket._SPINS} times:" in TEXT
    assert doorbell._POLL_S == 0.001
    assert doorbell._QUIET_POLLS == 4
    assert "once a millisecond while there is something in them, and sleeps after four looks in vain" in TEXT
    assert f"copy up to {rings._BATCH} records out" in TEXT
    assert TEXT.count(f"takes {rings._BATCH} records of each ring") == 2
    assert rings._COMMITS == 64
    assert "carried out together, at most 64 of them" in TEXT
    assert f"`max_records / {index_file.BUCKET_ENTRIES * index_file.LOAD_FACTOR}`" in TEXT


def test_mapped_doc_times_of_looking_at_locks_are_the_codes():
    assert mapping._RETIRED_POLL_S == 0.01
    assert "every 10 ms for half a second after its session is over" in TEXT
    assert mapping._RETIRED_POLLS * mapping._RETIRED_POLL_S == 0.5
    assert "within 10 ms its slots go back" in TEXT
    assert f"at least every {shared_memory._LOOK_EVERY_NS // 1_000_000} ms while it is used" in TEXT
    assert f"in the SDK a thread looks every {int(mapped_watch._LOOK_S * 1000)} ms" in TEXT
    assert mapped_session._MOST_UNTAKEN == client_file.RING_RECORDS - 64
    assert "The SDK stops 64 records earlier" in TEXT


def test_mapped_doc_negotiation_is_the_protocols():
    (told,) = under("Who may map", "message", "#", "field", "meaning")
    for row in told.rows:
        names = {"Hello": Hello, "Welcome": Welcome}[row["message"]].__struct_fields__
        assert names[int(row["#"]) - 1] == row["field"], row


def test_mapped_doc_versions_are_the_codes():
    assert f"Layout {index_file.MAPPED_LAYOUT}. This page is normative" in TEXT
    assert table(PAGE, "History").column("layout")[-1] == str(index_file.MAPPED_LAYOUT)
    assert f"the client's file version {SESSION_VERSION} (only locked) and version {MAPPED_SESSION_VERSION}" in TEXT
    assert f"Version {arena.ARENA_VERSION}. The first page:" in TEXT
