from __future__ import annotations

import hashlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_strategies import NAMESPACES

from kvstore.errors import InvalidArgument
from kvstore.protocol.namespace import MAX_PARTS, Namespace

FULL = Namespace(
    name="chat",
    model="meta-llama/Llama-3.1-8B",
    revision="0e9e39f",
    layout="gqa layers=32 kv_heads=8 head_dim=128",
    dtype="bfloat16",
    block_tokens=64,
    parts=2,
    tenant_salt=b"acme",
    fidelity="exact",
)
FULL_CANONICAL = (
    '{"block_tokens":64,"codec":"raw","dtype":"bfloat16","fidelity":"exact",'
    '"layout":"gqa layers=32 kv_heads=8 head_dim=128","model":"meta-llama/Llama-3.1-8B","name":"chat",'
    '"parts":2,"revision":"0e9e39f",'
    '"tenant_salt":"822b33ad87c148a0a20a5ba7cd5ebcaa68d36a18e7aad165554903f52ca82757"}'
)
DEFAULT_CANONICAL = (
    '{"block_tokens":0,"codec":"raw","dtype":"","fidelity":"any","layout":"","model":"","name":"default",'
    '"parts":1,"revision":"","tenant_salt":""}'
)


@pytest.mark.parametrize(
    ("namespace", "canonical", "generation", "digest"),
    [
        (Namespace(), DEFAULT_CANONICAL, 0, "28d1e58c8c17524e47ba7b5994a06fcf7fd88aba2f989607788b6173ff5abacb"),
        (Namespace(), DEFAULT_CANONICAL, 1, "91513844c252a23e7b29f2cc352e361f1746e9f1cc0a84fc56b83f974dd804a9"),
        (FULL, FULL_CANONICAL, 0, "acea556e6508f0a3b856c5f53d0f77ad021cccf70279be518ce17fae795ba8b5"),
        (FULL, FULL_CANONICAL, 2**62, "bdff6ffe6f979d0606473b62ed2c48c7202377ef69e38f059b5bb8bb5f213afb"),
    ],
)
def test_namespace_released_descriptions_keep_text_and_digest(namespace, canonical, generation, digest):
    assert namespace.canonical().decode() == canonical
    assert namespace.digest(generation).hex() == digest
    plain = b"kvstore namespace 1\0" + canonical.encode() + generation.to_bytes(8, "little")
    assert hashlib.sha256(plain).hexdigest() == digest


def test_namespace_text_outside_ascii_is_escaped_as_json():
    namespace = Namespace(name='é\x7f\n"\\\U0001f600')
    canonical = namespace.canonical()
    assert b'"name":"\\u00e9\\u007f\\n\\"\\\\\\ud83d\\ude00"' in canonical
    assert json.loads(canonical)["name"] == namespace.name


@given(NAMESPACES)
def test_namespace_canonical_is_printable_ascii_json_of_all_fields(namespace):
    canonical = namespace.canonical()
    assert all(0x20 <= byte < 0x7F for byte in canonical)
    fields = json.loads(canonical)
    assert list(fields) == sorted(Namespace.__struct_fields__)
    salt = fields.pop("tenant_salt")
    assert salt == (hashlib.sha256(namespace.tenant_salt).hexdigest() if namespace.tenant_salt else "")
    assert all(getattr(namespace, name) == value for name, value in fields.items())


@given(NAMESPACES, NAMESPACES, st.integers(0, 3), st.integers(0, 3))
def test_namespace_digests_are_equal_exactly_when_description_and_generation_are(one, two, first, second):
    assert (one.digest(first) == two.digest(second)) == (one == two and first == second)


@given(NAMESPACES, st.sampled_from(Namespace.__struct_fields__), st.data())
def test_namespace_one_field_changed_changes_the_digest(namespace, field, data):
    other = data.draw(NAMESPACES.map(lambda drawn: getattr(drawn, field)))
    changed = msgspec.structs.replace(namespace, **{field: other})
    assert (changed.digest(0) == namespace.digest(0)) == (other == getattr(namespace, field))


@pytest.mark.parametrize(("one", "two"), [("a", "a\0"), ("\\u00e9", "é"), ('"', '\\"'), ("é", "e\u0301")])
def test_namespace_names_that_look_alike_keep_different_digests(one, two):
    assert Namespace(name=one).digest(0) != Namespace(name=two).digest(0)


LONG = "x" * 513


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *[
            (field, value, f"namespace {field} must be text of at most 512 characters")
            for field in ("name", "model", "revision", "layout", "dtype", "codec", "fidelity")
            for value in (LONG, 5, None, b"bytes")
        ],
        *[(field, "\ud800", f"namespace {field} must be valid Unicode") for field in ("name", "model", "revision")],
        ("name", "", "namespace name must not be empty"),
        ("codec", "zip", "unknown codec 'zip'"),
        ("fidelity", "some", "fidelity must be 'any' or 'exact', got 'some'"),
        *[("parts", value, "parts must be 1 to 4096") for value in (0, -1, MAX_PARTS + 1, 1.0, "2", None, True)],
        *[
            ("block_tokens", value, r"block_tokens must be 0 \(unknown\) to 2\*\*31 - 1")
            for value in (-1, 1 << 31, 16.0, "16", None, False)
        ],
        *[("tenant_salt", value, "tenant_salt must be bytes, got ") for value in ("text", None, bytearray(1))],
        ("tenant_salt", bytes(513), "tenant_salt must be at most 512 bytes, got 513"),
    ],
)
def test_namespace_bad_value_of_each_option_is_named(option, value, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        Namespace.parse({option: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("options", [{"colour": "red"}, {"Name": "x"}, {"parts": 1, "part": 2}])
def test_namespace_unknown_option_is_named_beside_the_known(options):
    with pytest.raises(InvalidArgument, match="unknown namespace option") as caught:
        Namespace.parse(options)
    assert repr(next(name for name in options if name != "parts")) in str(caught.value)
    assert all(field in str(caught.value) for field in Namespace.__struct_fields__)


def test_namespace_unknown_options_of_any_type_are_named():
    with pytest.raises(InvalidArgument, match="unknown namespace option 5, 'x'"):
        Namespace.parse({5: 1, "x": 2})


@pytest.mark.parametrize("value", [None, 5, b"name", ["name"]])
def test_namespace_parse_other_types_refused(value):
    with pytest.raises(InvalidArgument, match="must be a name, a dict or a Namespace"):
        Namespace.parse(value)


@given(NAMESPACES)
def test_namespace_parse_accepts_itself_and_its_fields(namespace):
    assert Namespace.parse(namespace) is namespace
    assert Namespace.parse(msgspec.structs.asdict(namespace)) == namespace
    assert Namespace.parse(namespace.name) == Namespace(name=namespace.name)


def test_namespace_every_option_is_in_the_table_of_bad_values():
    marks = test_namespace_bad_value_of_each_option_is_named.pytestmark
    tested = {row[0] for mark in marks for row in mark.args[1]}
    assert tested == set(Namespace.__struct_fields__)
