"""``docs/ssd-format.md`` and the golden bytes of format 1 against the code that reads and writes the SSD's files.

The golden files tell one story: two blocks of a namespace are written, one is replaced by a better record, the other is
used, the namespace is cleared; and a checkpoint after the second group.
"""

from __future__ import annotations

import struct

import pytest
import xxhash
from doc_tables import DOCS, Table, examples, tables
from golden_files import golden, golden_names

from kvstore.core.ssd_replay import Replayed
from kvstore.format.constants import PAGE_BYTES
from kvstore.format.ssd_files import (
    CHECKPOINT_MAGIC,
    FILE_HEADER_BYTES,
    FIRST_SSD_PAGE,
    LOG_MAGIC,
    SLABS_MAGIC,
    SLABS_NAME,
    SSD_FORMAT_VERSION,
    NumberedHeader,
    SlabsHeader,
    checkpoint_name,
    decode_numbered_header,
    decode_slabs_header,
    encode_numbered_header,
    encode_slabs_header,
    log_name,
    parse_name,
)
from kvstore.format.ssd_log import (
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    PUT_BYTES,
    EmptyEntry,
    EndEntry,
    Entry,
    EntryKind,
    Frames,
    FreeEntry,
    NamespaceEntry,
    PutEntry,
    TouchEntry,
    decode_entries,
    encode_entry,
    encode_frame,
    frame_seed,
)
from kvstore.protocol.keys import ROOT_KEY, chain_keys
from kvstore.protocol.namespace import Namespace
from kvstore.tiers.disk import LOCK_NAME, TEMPORARY_SUFFIX

PAGE = "ssd-format.md"
TEXT = " ".join((DOCS / PAGE).read_text(encoding="utf-8").split())
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
STORE_ID = bytes(range(16))
NUMBER = 3
SLABS = SlabsHeader(64 << 10, STORE_ID)
DESCRIPTION = Namespace(name="chat", model="llama", revision="r1", codec="kivi4").canonical()
FIRST, SECOND = chain_keys(range(128), 64, salt=b"golden")

NAMESPACE = NamespaceEntry(1, 0, DESCRIPTION)
FIRST_PUT = PutEntry(85, 7, 0, 1, 2, 64, 3, 1, 6000, 0x1122334455667788, 9, FIRST, ROOT_KEY)
SECOND_PUT = FIRST_PUT._replace(slot=3, record_bytes=8192, access=10, key=SECOND, parent_key=FIRST)
BETTER_CHECKSUM = 0x99AABBCCDDEEFF00
BETTER_PUT = FIRST_PUT._replace(slot=5, record_bytes=8000, fidelity=255, codec=2, checksum=BETTER_CHECKSUM, access=12)
LOG: list[list[Entry]] = [
    [NAMESPACE, FIRST_PUT, SECOND_PUT],
    [BETTER_PUT, TouchEntry(3, 12)],
    [FreeEntry(1), EmptyEntry(1)],
]
CHECKPOINT: list[list[Entry]] = [[NAMESPACE], [SECOND_PUT._replace(access=12), BETTER_PUT], [EndEntry(2)]]


def written(name: str) -> list[bytes]:
    """What the code writes today where the golden file has what it wrote when the format was released."""
    if name == "slabs":
        return [encode_slabs_header(SLABS)[:FILE_HEADER_BYTES]]
    magic, frames = (LOG_MAGIC, LOG) if name == "log" else (CHECKPOINT_MAGIC, CHECKPOINT)
    header = encode_numbered_header(NumberedHeader(magic, NUMBER, STORE_ID))
    seed = frame_seed(header)
    encoded = [encode_frame(seed, number, list(map(encode_entry, entries))) for number, entries in enumerate(frames)]
    return [header, *encoded]


NAMES = ["slabs", "log", "checkpoint"]


# ---------------------------------------------------------------- reading the page


def under(heading: str) -> Table:
    """The table of offsets under a heading."""
    (found,) = [one for one in tables(PAGE) if one.heading == heading and "offset" in one.columns]
    return found


def values(heading: str, data: bytes) -> dict[str, object]:
    """Every field of a structure, read only with what the page says of it."""
    found: dict[str, object] = {}
    end = 0
    for row in under(heading).rows:
        offset, size = int(row["offset"]), int(row["bytes"])
        assert offset == end, f"{row} leaves a gap"
        end = offset + size
        piece = data[offset:end]
        assert len(piece) == size, row
        if row["type"] in CODES:
            assert struct.calcsize(CODES[row["type"]]) == size, row
            (found[row["field"]],) = struct.unpack(f"<{CODES[row['type']]}", piece)
        else:
            found[row["field"]] = piece
    return found


def size_of(heading: str) -> int:
    return sum(int(size) for size in under(heading).column("bytes"))


# ---------------------------------------------------------------- golden bytes


@pytest.mark.parametrize("name", NAMES)
def test_ssd_golden_bytes_are_what_is_written_today(name: str):
    assert written(name) == golden(f"ssd-1/{name}")


def test_ssd_golden_files_are_all_tested_and_shown():
    assert golden_names("ssd-1") == {f"ssd-1/{name}" for name in NAMES}
    assert examples(PAGE) == {f"ssd-1/{name}": b"".join(golden(f"ssd-1/{name}")) for name in NAMES}


def test_ssd_golden_files_are_read_as_they_were_meant():
    (page,) = golden("ssd-1/slabs")
    assert decode_slabs_header(page.ljust(PAGE_BYTES, b"\0")) == SLABS
    states = []
    for name, magic, expected in (("checkpoint", CHECKPOINT_MAGIC, CHECKPOINT), ("log", LOG_MAGIC, LOG)):
        data = b"".join(golden(f"ssd-1/{name}"))
        assert decode_numbered_header(data, magic) == NumberedHeader(magic, NUMBER, STORE_ID)
        frames = Frames(data, FILE_HEADER_BYTES)
        state = Replayed()
        states.append(state)
        for entries, wanted in zip(frames, expected, strict=True):
            assert entries == wanted
            state.take(entries)
        assert (frames.problem, frames.end) == ("", len(data))
    checkpoint, log = states
    assert checkpoint.complete
    assert checkpoint.settle(SLABS.slab_bytes, FIRST_SSD_PAGE, 1) == CHECKPOINT[1]
    assert log.settle(SLABS.slab_bytes, FIRST_SSD_PAGE, 1) == []


# ---------------------------------------------------------------- the tables


def test_ssd_doc_slab_header_is_the_codes():
    page = encode_slabs_header(SLABS)
    assert values("The slab file", page) == {
        "magic": SLABS_MAGIC,
        "version": SSD_FORMAT_VERSION,
        "header_bytes": FILE_HEADER_BYTES,
        "page_bytes": PAGE_BYTES,
        "slab_bytes": SLABS.slab_bytes,
        "store_id": STORE_ID,
        "reserved": bytes(16),
        "checksum": xxhash.xxh3_64_intdigest(page[:56]),
        "rest": bytes(PAGE_BYTES - FILE_HEADER_BYTES),
    }
    assert size_of("The slab file") == PAGE_BYTES
    assert f"Slabs follow from page {FIRST_SSD_PAGE} on" in TEXT
    assert f"`offset = slot * {PAGE_BYTES}`" in TEXT


@pytest.mark.parametrize(("name", "magic"), [("log", LOG_MAGIC), ("checkpoint", CHECKPOINT_MAGIC)])
def test_ssd_doc_numbered_header_is_the_codes(name: str, magic: bytes):
    header = golden(f"ssd-1/{name}")[0]
    assert values("Logs and checkpoints", header) == {
        "magic": magic,
        "version": SSD_FORMAT_VERSION,
        "header_bytes": FILE_HEADER_BYTES,
        "reserved": 0,
        "number": NUMBER,
        "store_id": STORE_ID,
        "reserved_tail": bytes(16),
        "checksum": xxhash.xxh3_64_intdigest(header[:56]),
    }
    assert size_of("Logs and checkpoints") == FILE_HEADER_BYTES
    magics = under("Logs and checkpoints").rows[0]["meaning"]
    assert all(f"`{magic.decode()}`" in magics for magic in (LOG_MAGIC, CHECKPOINT_MAGIC))


@pytest.mark.parametrize("name", ["log", "checkpoint"])
def test_ssd_doc_frames_are_the_codes(name: str):
    header, *frames = golden(f"ssd-1/{name}")
    seed = xxhash.xxh3_64_intdigest(header)
    for number, frame in enumerate(frames):
        payload = frame[FRAME_HEADER_BYTES:]
        assert values("Frames", frame) == {
            "magic": FRAME_MAGIC,
            "payload_bytes": len(payload),
            "sequence": number,
            "entries": len((LOG if name == "log" else CHECKPOINT)[number]),
            "check": xxhash.xxh3_64_intdigest(frame[:20], seed) & 0xFFFFFFFF,
            "checksum": xxhash.xxh3_64_intdigest(frame[:24] + payload, seed),
        }
        assert len(payload) % 8 == 0
    assert size_of("Frames") == FRAME_HEADER_BYTES
    assert f"0x{FRAME_MAGIC:08X}, ASCII `{FRAME_MAGIC.to_bytes(4, 'little').decode()}`" in TEXT


EACH: dict[str, tuple[Entry, dict[str, object]]] = {
    "Namespace": (
        NAMESPACE,
        {"kind": 1, "zero": 0, "description_bytes": len(DESCRIPTION), "namespace": 1, "generation": 0},
    ),
    "Put": (
        BETTER_PUT._replace(part=6),
        {
            "kind": 2,
            "fidelity": 255,
            "codec": 2,
            "part": 6,
            "zero": 0,
            "namespace": 1,
            "slot_pages": 2,
            "token_count": 64,
            "home_pages": 3,
            "slot": 5,
            "record_bytes": 8000,
            "checksum": BETTER_CHECKSUM,
            "access": 12,
            "key": FIRST,
            "parent_key": ROOT_KEY,
        },
    ),
    "Free": (FreeEntry(5), {"kind": 3, "zero": bytes(7), "slot": 5}),
    "Touch": (TouchEntry(5, 13), {"kind": 4, "zero": bytes(7), "slot": 5, "access": 13}),
    "Empty": (EmptyEntry(9), {"kind": 5, "zero": bytes(3), "namespace": 9}),
    "End": (EndEntry(77), {"kind": 6, "zero": bytes(7), "puts": 77}),
}


@pytest.mark.parametrize("name", EACH)
def test_ssd_doc_entries_are_the_codes(name: str):
    entry, expected = EACH[name]
    data = encode_entry(entry)
    assert values(name, data) == expected
    (kinds,) = [one for one in tables(PAGE) if one.columns == ("kind", "name", "bytes", "says")]
    (row,) = [row for row in kinds.rows if row["name"] == name.lower()]
    assert int(row["kind"]) == EntryKind[name.upper()]
    if name == "Namespace":
        assert row["bytes"] == f"{size_of(name)} + description"
        assert len(data) == size_of(name) + len(DESCRIPTION) + -len(DESCRIPTION) % 8
        assert data[size_of(name) :].rstrip(b"\0") == DESCRIPTION
    else:
        assert int(row["bytes"]) == size_of(name) == len(data)
    assert decode_entries(memoryview(data)) == [entry]


def test_ssd_doc_kinds_and_sizes_are_the_codes():
    (kinds,) = [one for one in tables(PAGE) if one.columns == ("kind", "name", "bytes", "says")]
    assert {int(row["kind"]): row["name"] for row in kinds.rows} == {kind: kind.name.lower() for kind in EntryKind}
    assert size_of("Put") == PUT_BYTES


def test_ssd_doc_names_version_and_history_are_the_codes():
    (names,) = [one for one in tables(PAGE) if one.columns == ("name", "what")]
    assert names.column("name") == [
        LOCK_NAME,
        SLABS_NAME,
        log_name(0).partition("-")[0] + "-N",
        checkpoint_name(0).partition("-")[0] + "-N",
        f"*{TEMPORARY_SUFFIX}",
    ]
    assert f"`N` is a number of {len(log_name(0).partition('-')[2])} hexadecimal digits in lower case" in TEXT
    assert parse_name(log_name(0xABC)) == ("log", 0xABC)
    assert f"Version {SSD_FORMAT_VERSION}. This page is normative" in TEXT
    (history,) = [one for one in tables(PAGE) if one.heading == "History"]
    assert history.column("version")[-1] == str(SSD_FORMAT_VERSION)
