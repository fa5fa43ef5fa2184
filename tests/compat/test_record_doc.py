"""``docs/record.md`` against the code: the table of offsets and the example are decoded as they stand there."""

from __future__ import annotations

import struct

import pytest
import xxhash
from doc_tables import DOCS, examples, table, tables
from golden_files import golden, golden_names

from kvstore.format.constants import (
    CODEC_FIDELITY,
    DTYPE_BYTES,
    DTYPE_SIZES,
    EXACT_CODECS,
    FIDELITY_EXACT,
    MAX_DIMENSIONS,
    MAX_RECORD_BYTES,
    MAX_SECTIONS,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    RECORD_VERSION,
    CodecId,
)
from kvstore.format.record import decode_record

PAGE = "record.md"
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "6 x u32": "6I", "4 x u64": "4Q"}
HEADER = next(one for one in tables(PAGE) if "offset" in one.columns)


def field(record: bytes, name: str) -> object:
    """A header's field, read only with what the page says of it."""
    (row,) = [row for row in HEADER.rows if row["field"] == name]
    offset, size = int(row["offset"]), int(row["bytes"])
    piece = record[offset : offset + size]
    if row["type"] == "bytes":
        return piece
    if row["type"] == "text":
        return piece.rstrip(b"\0").decode("ascii")
    values = struct.unpack(f"<{CODES[row['type']]}", piece)
    return values if len(values) > 1 else values[0]


def test_record_doc_offsets_cover_the_header_without_gaps():
    offsets = [int(offset) for offset in HEADER.column("offset")]
    sizes = [int(size) for size in HEADER.column("bytes")]
    assert offsets == [sum(sizes[:index]) for index in range(len(sizes))]
    assert sum(sizes) == RECORD_HEADER_BYTES
    for row in HEADER.rows:
        if row["type"] in CODES:
            assert struct.calcsize(f"<{CODES[row['type']]}") == int(row["bytes"]), row


@pytest.mark.parametrize("name", sorted(golden_names("record-1")))
def test_record_doc_fields_at_their_offsets_are_what_the_decoder_reads(name: str):
    (record,) = golden(name)
    header, payload = decode_record(record)
    dimensions, sections = len(header.shape), len(header.section_bytes)
    expected = {
        "magic": RECORD_MAGIC,
        "version": RECORD_VERSION,
        "header_bytes": RECORD_HEADER_BYTES,
        "part": header.part,
        "codec": header.codec,
        "record_bytes": header.record_bytes,
        "key": header.key,
        "parent_key": header.parent_key,
        "namespace_digest": header.namespace_digest,
        "codec_parameters": header.codec_parameters,
        "dtype": header.dtype,
        "shape": (*header.shape, *(0,) * (MAX_DIMENSIONS - dimensions)),
        "token_count": header.token_count,
        "dimensions": dimensions,
        "sections": sections,
        "fidelity": header.fidelity,
        "lineage_loss": 255 - header.lineage,
        "section_bytes": (*header.section_bytes, *(0,) * (MAX_SECTIONS - sections)),
        "payload_checksum": header.payload_checksum,
        "reserved_tail": bytes(16),
        "header_checksum": xxhash.xxh3_64_intdigest(record[:248]),
    }
    assert HEADER.column("field") == list(expected)
    assert {name: field(record, name) for name in expected} == expected
    assert field(record, "payload_checksum") == xxhash.xxh3_64_intdigest(payload)


def test_record_doc_golden_records_have_fidelity_and_lineage_as_named():
    found = {name: decode_record(golden(name)[0])[0] for name in golden_names("record-1")}
    assert {name: header.lineage for name, header in found.items() if header.lineage != FIDELITY_EXACT} == {
        "record-1/raw-lineage": 85
    }
    assert found["record-1/raw-lineage"].effective_fidelity == 85


def test_record_doc_example_is_the_golden_record():
    assert examples(PAGE) == {"record-1/raw-opaque": golden("record-1/raw-opaque")[0]}
    header, _ = decode_record(examples(PAGE)["record-1/raw-opaque"])
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    assert f"0x{header.payload_checksum:016x}" in text
    assert f"0x{field(golden('record-1/raw-opaque')[0], 'header_checksum'):016x}" in text


def test_record_doc_dtypes_are_the_codes():
    (dtypes,) = [one for one in tables(PAGE) if one.columns == ("dtype", "bytes")]
    assert dict(zip(dtypes.column("dtype"), map(int, dtypes.column("bytes")), strict=True)) == DTYPE_SIZES
    assert max(map(len, DTYPE_SIZES)) <= DTYPE_BYTES


def test_record_doc_constants_and_version_are_the_codes():
    text = " ".join((DOCS / PAGE).read_text(encoding="utf-8").split())
    assert f"Version {RECORD_VERSION}. This page is normative" in text
    assert table(PAGE, "History").column("version")[-1] == str(RECORD_VERSION)
    assert f"at most {MAX_RECORD_BYTES:,}" in text
    assert f"`dimensions` is 1 to {MAX_DIMENSIONS};" in text
    assert f"`sections` is 1 to {MAX_SECTIONS};" in text
    assert f"{FIDELITY_EXACT} exact" in text


def test_record_doc_codecs_are_the_codes():
    codecs = table(PAGE, "Codecs")
    assert [int(identity) for identity in codecs.column("id")] == list(CodecId)
    assert codecs.column("codec") == [codec.text for codec in CodecId]
    assert [int(sections) for sections in codecs.column("sections")] == [
        1 if codec in EXACT_CODECS else 2 for codec in CodecId
    ]
    assert [int(fidelity) for fidelity in codecs.column("fidelity")] == [CODEC_FIDELITY[codec] for codec in CodecId]
