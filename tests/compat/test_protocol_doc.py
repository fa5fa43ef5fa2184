"""``docs/protocol.md`` against the code, table by table; its examples against the golden files."""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from pathlib import Path

import msgspec
import pytest
from doc_tables import DOCS, examples, table, tables
from doc_types import default_text, fields, type_text
from golden_files import golden, golden_names
from wire_strategies import MESSAGES, REPLIES, REQUESTS

from kvstore.errors import ErrorCode
from kvstore.format.constants import MAX_RECORD_BYTES, RECORD_HEADER_BYTES
from kvstore.mapped.client_file import CLIENT_FILE_BYTES, LANE_COUNT
from kvstore.mapped.session_file import (
    MAPPED_SESSION_VERSION,
    SESSION_FILE_BYTES,
    SESSION_VERSION,
    SessionHeader,
    encode_session_header,
)
from kvstore.protocol import messages, version
from kvstore.protocol.endpoint import IPC_PATH_BYTES
from kvstore.protocol.messages import GetStatus, PutStatus, Reason, Reply, Request, TierId
from kvstore.protocol.namespace import _MAX_TEXT, MAX_PARTS, Namespace
from kvstore.protocol.statistics import DaemonStats
from kvstore.protocol.stories import KeyStory
from kvstore.settings import LimitSettings

PAGE = "protocol.md"
TEXT = (DOCS / PAGE).read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())
SECTION = re.compile(r"^### (\w+) \((\d+)\)\n(.*?)(?=^##)", re.MULTILINE | re.DOTALL)
SECTIONS = {name: (int(tag), body) for name, tag, body in SECTION.findall(TEXT)}
ENVELOPES = {Request: "Envelope of requests", Reply: "Envelope of replies"}


def row_of(number: int, field: msgspec.inspect.Field) -> dict[str, str]:
    return {"#": str(number), "field": field.name, "type": type_text(field.type), "default": default_text(field)}


def documented(heading: str) -> list[dict[str, str]]:
    """Rows of a field table without their meaning, which nothing but a reader can check."""
    rows = [dict(row) for row in table(PAGE, heading).rows]
    assert all(row["meaning"] or row["field"] == "stats" for row in rows)
    return [{name: cell.strip("`") for name, cell in row.items() if name != "meaning"} for row in rows]


@pytest.mark.parametrize("base", ENVELOPES, ids=lambda base: base.__name__)
def test_protocol_doc_envelope_is_the_codes(base: type[msgspec.Struct]):
    assert documented(ENVELOPES[base]) == [row_of(at, one) for at, one in enumerate(fields(base), 1)]


def test_protocol_doc_has_every_message_under_its_tag_and_no_other():
    assert {name: tag for name, (tag, _) in SECTIONS.items()} == {
        struct.__name__: struct.__struct_config__.tag for struct in MESSAGES
    }


@pytest.mark.parametrize("struct", MESSAGES, ids=lambda struct: struct.__name__)
def test_protocol_doc_fields_of_each_message_are_the_codes(struct: type[msgspec.Struct]):
    tag, body = SECTIONS[struct.__name__]
    own = len(fields(Request if struct in REQUESTS else Reply))
    expected = [row_of(at, one) for at, one in enumerate(fields(struct)[own:], own + 1)]
    if expected:
        assert documented(f"{struct.__name__} ({tag})") == expected
    else:
        assert "No fields of its own." in body
        assert "\n|" not in body


@pytest.mark.parametrize("struct", REQUESTS, ids=lambda struct: struct.__name__)
def test_protocol_doc_each_request_names_its_reply(struct: type[msgspec.Struct]):
    _, body = SECTIONS[struct.__name__]
    if struct is messages.Bye:
        assert "There is no reply." in body
        return
    (named,) = re.findall(r"Reply:\s+`(\w+)`", body)
    assert named in {reply.__name__ for reply in REPLIES}


@pytest.mark.parametrize("enum", [PutStatus, Reason, GetStatus, TierId, ErrorCode], ids=lambda enum: enum.__name__)
def test_protocol_doc_enumerations_are_the_codes(enum: type[IntEnum]):
    documented_values = table(PAGE, enum.__name__)
    assert list(map(int, documented_values.column("value"))) == [member.value for member in enum]
    assert documented_values.column("name") == [member.name for member in enum]


def test_protocol_doc_every_reason_comes_with_a_status_it_explains():
    statuses = dict(zip(table(PAGE, "Reason").column("name"), table(PAGE, "Reason").column("comes with"), strict=True))
    assert statuses.pop("NONE") == "STORED, EXISTS"
    assert set(statuses.values()) == {"THROTTLED", "REJECTED"}


def test_protocol_doc_limits_are_the_codes():
    limits = table(PAGE, "Limits")
    values = {
        name: int(value.replace(",", ""))
        for name, value in zip(limits.column("name"), limits.column("value"), strict=True)
    }
    assert values == {name: getattr(version, name) for name in vars(version) if name.startswith("MAX_")}
    assert f"longer than {version.MAX_HEADER_FRAME_BYTES:,} bytes" in WORDS
    assert f"at most {version.MAX_KEYS_PER_REQUEST:,} of them" in WORDS
    assert f"records, 1 to {version.MAX_PAYLOAD_FRAMES // 2} |" in TEXT
    assert f"UTF-8, at most {version.MAX_IDENT_CHARACTERS} characters" in TEXT
    assert f"at most {version.MAX_DECLARED_SIZES}, each above 0" in TEXT
    assert f"at most 2^{version.MAX_GENERATION.bit_length() - 1} |" in TEXT
    assert f"of at most {IPC_PATH_BYTES} bytes" in WORDS


def test_protocol_doc_namespace_fields_are_the_codes():
    found = next(one for one in tables(PAGE) if one.heading == "Namespaces")
    assert [(row["field"], row["type"], row["default"].strip("`")) for row in found.rows] == [
        (one.name, type_text(one.type), default_text(one)) for one in fields(Namespace)
    ]
    assert f"Texts have at most {_MAX_TEXT} characters, the salt at most {_MAX_TEXT} bytes." in WORDS
    assert f"1 to {MAX_PARTS} |" in TEXT


def structures(struct: type[msgspec.Struct]) -> set[type[msgspec.Struct]]:
    """A structure and all structures inside it."""
    found = {struct}
    for one in fields(struct):
        kind = one.type.item_type if isinstance(one.type, msgspec.inspect.ListType) else one.type
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = kind.types[0]
        if isinstance(kind, msgspec.inspect.StructType):
            found |= structures(kind.cls)
    return found


@pytest.mark.parametrize(
    "struct",
    sorted(structures(DaemonStats) | structures(KeyStory), key=lambda one: one.__name__),
    ids=lambda one: one.__name__,
)
def test_protocol_doc_statistics_are_the_codes(struct: type[msgspec.Struct]):
    rows = table(PAGE, struct.__name__).rows
    assert [(row["field"], row["type"]) for row in rows] == [(one.name, type_text(one.type)) for one in fields(struct)]


def test_protocol_doc_session_file_is_the_codes():
    found = next(one for one in tables(PAGE) if one.heading == "Sessions" and "offset" in one.columns)
    encoded = encode_session_header(SessionHeader(incarnation=0x1817161514131211, session=0x0807060504030201))
    codes = {"bytes": "8s", "u32": "I", "u64": "Q"}
    read = {
        row["field"]: struct.unpack_from(f"<{codes[row['type']]}", encoded, int(row["offset"]))[0] for row in found.rows
    }
    assert read == {
        "magic": b"KVCLIENT",
        "version": 1,
        "reserved": 0,
        "incarnation": 0x1817161514131211,
        "session": 0x0807060504030201,
    }
    assert sum(int(row["bytes"]) for row in found.rows) == len(encoded)
    assert f"It has {SESSION_FILE_BYTES} bytes in version {SESSION_VERSION}" in WORDS
    assert f"Version {MAPPED_SESSION_VERSION} is given" in WORDS
    assert f"it has {CLIENT_FILE_BYTES:,} bytes" in WORDS


def test_protocol_doc_reservations_are_the_codes():
    assert f"header included: above {RECORD_HEADER_BYTES}, at most 2^{MAX_RECORD_BYTES.bit_length() - 1} |" in TEXT
    assert f"| 0 to {LANE_COUNT - 1}; slots" in TEXT
    assert f"{LimitSettings().reclaim_grace_s:g} s by default" in WORDS


def test_protocol_doc_version_is_the_codes():
    assert f"Version {version.PROTOCOL_VERSION}. This page is normative" in WORDS
    assert table(PAGE, "History").column("version") == [
        str(number) for number in range(1, version.PROTOCOL_VERSION + 1)
    ]


def test_protocol_doc_examples_are_the_latest_golden_header_frames():
    shown = examples(PAGE)
    latest: dict[str, str] = {}
    for number in range(1, version.PROTOCOL_VERSION + 1):
        latest |= {name.partition("/")[2]: name for name in golden_names(f"protocol-{number}")}
    assert set(shown) == set(latest.values())
    assert shown == {name: golden(name)[0] for name in shown}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def test_protocol_doc_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            page = DOCS / (path or PAGE)
            assert page.is_file(), target
            assert not anchor or anchor in anchors(page), target
