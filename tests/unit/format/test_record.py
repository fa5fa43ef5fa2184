"""The record's header and payload: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import random
import struct
from collections import Counter
from math import prod

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvstore.errors import CorruptRecord, InvalidArgument
from kvstore.format.constants import (
    DTYPE_SIZES,
    FIDELITY_EXACT,
    MAX_RECORD_BYTES,
    PAGE_BYTES,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    CodecId,
)
from kvstore.format.record import (
    RecordHeader,
    checksum,
    decode_header,
    decode_record,
    encode_header,
    padded_bytes,
    padding_is_zero,
    raw_header,
)

# Byte offsets of the header's fields and their struct codes, written down apart from the code under test.
FIELDS = {
    "magic": (0, "8s"),
    "version": (8, "H"),
    "header_bytes": (10, "H"),
    "part": (12, "H"),
    "codec": (14, "H"),
    "record_bytes": (16, "Q"),
    "key": (24, "32s"),
    "parent_key": (56, "32s"),
    "namespace_digest": (88, "32s"),
    "codec_parameters": (120, "16s"),
    "dtype": (136, "24s"),
    "shape": (160, "6I"),
    "token_count": (184, "I"),
    "dimensions": (188, "B"),
    "sections": (189, "B"),
    "fidelity": (190, "B"),
    "lineage_loss": (191, "B"),
    "section_bytes": (192, "4Q"),
    "payload_checksum": (224, "Q"),
    "reserved_tail": (232, "16s"),
    "header_checksum": (248, "Q"),
}

KEY, PARENT, DIGEST = b"k" * 32, b"p" * 32, b"d" * 32
PAYLOAD = bytes(range(256)) * 3
HEADER = raw_header(key=KEY, parent_key=PARENT, namespace_digest=DIGEST, part=3, payload=PAYLOAD, token_count=64)
ENCODED = encode_header(HEADER)
RECORD = ENCODED + PAYLOAD


def sealed(header: bytes | bytearray) -> bytes:
    """The header with its checksum made right again."""
    body = bytes(header[:248])
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def with_fields(**values: object) -> bytes:
    """A valid header with fields replaced and the checksum made right."""
    header = bytearray(ENCODED)
    for name, value in values.items():
        offset, code = FIELDS[name]
        struct.pack_into(f"<{code}", header, offset, *(value if isinstance(value, tuple) else (value,)))
    return sealed(header)


BYTES32 = st.binary(min_size=32, max_size=32)


@st.composite
def raw_headers(draw: st.DrawFn) -> RecordHeader:
    key = draw(BYTES32.filter(any))
    dtype = draw(st.sampled_from(sorted(DTYPE_SIZES)))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)))
    return RecordHeader(
        key=key,
        parent_key=draw((BYTES32 | st.just(bytes(32))).filter(lambda parent: parent != key)),
        namespace_digest=draw(BYTES32),
        part=draw(st.integers(0, 65_535)),
        codec=CodecId.RAW,
        codec_parameters=bytes(16),
        fidelity=FIDELITY_EXACT,
        dtype=dtype,
        shape=shape,
        token_count=draw(st.integers(0, 2**32 - 1)),
        section_bytes=(prod(shape) * DTYPE_SIZES[dtype],),
        payload_checksum=draw(st.integers(0, 2**64 - 1)),
        lineage=draw(st.just(FIDELITY_EXACT) | st.integers(0, 255)),
    )


@given(raw_headers())
def test_header_encoded_and_decoded_is_the_same(header):
    encoded = encode_header(header)
    assert len(encoded) == RECORD_HEADER_BYTES
    assert decode_header(encoded) == header
    assert decode_header(encoded + b"payload behind it") == header
    assert encode_header(decode_header(encoded)) == encoded


@given(raw_headers())
def test_header_fields_lie_at_the_documented_offsets(header):
    encoded = encode_header(header)
    fields = {name: struct.unpack_from(f"<{code}", encoded, at) for name, (at, code) in FIELDS.items()}
    padding = 6 - len(header.shape)
    assert fields == {
        "magic": (RECORD_MAGIC,),
        "version": (1,),
        "header_bytes": (256,),
        "part": (header.part,),
        "codec": (1,),
        "record_bytes": (256 + header.section_bytes[0],),
        "key": (header.key,),
        "parent_key": (header.parent_key,),
        "namespace_digest": (header.namespace_digest,),
        "codec_parameters": (bytes(16),),
        "dtype": (header.dtype.encode().ljust(24, b"\0"),),
        "shape": (*header.shape, *(0,) * padding),
        "token_count": (header.token_count,),
        "dimensions": (len(header.shape),),
        "sections": (1,),
        "fidelity": (255,),
        "lineage_loss": (255 - header.lineage,),
        "section_bytes": (*header.section_bytes, 0, 0, 0),
        "payload_checksum": (header.payload_checksum,),
        "reserved_tail": (bytes(16),),
        "header_checksum": (xxhash.xxh3_64_intdigest(encoded[:248]),),
    }


def test_header_fields_cover_256_bytes_without_gaps():
    ends = [at + struct.calcsize(f"<{code}") for at, code in FIELDS.values()]
    assert [at for at, _ in FIELDS.values()] == [0, *ends[:-1]]
    assert ends[-1] == RECORD_HEADER_BYTES


@given(st.binary(min_size=1, max_size=2000), st.sampled_from([bytes, bytearray, memoryview]))
def test_record_written_and_read_gives_header_and_payload(payload, kind):
    header = raw_header(key=KEY, parent_key=bytes(32), namespace_digest=DIGEST, part=0, payload=payload)
    decoded, view = decode_record(kind(encode_header(header) + payload))
    assert decoded == header
    assert view == payload
    assert decoded.record_bytes == 256 + len(payload)


@pytest.mark.parametrize("dtype", sorted(DTYPE_SIZES))
def test_raw_header_typed_payload_keeps_dtype_and_shape(dtype):
    payload = bytes(2 * 3 * 4 * DTYPE_SIZES[dtype])
    header = raw_header(
        key=KEY, parent_key=PARENT, namespace_digest=DIGEST, part=0, payload=payload, dtype=dtype, shape=[2, 3, 4]
    )
    assert (decode_header(encode_header(header)).dtype, header.shape) == (dtype, (2, 3, 4))


def test_raw_header_numpy_payload_counts_bytes_not_elements():
    payload = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = raw_header(
        key=KEY, parent_key=PARENT, namespace_digest=DIGEST, part=0, payload=payload.data, dtype="float32", shape=(3, 4)
    )
    assert header.section_bytes == (48,)
    assert decode_record(encode_header(header) + payload.tobytes())[0] == header


def test_checksum_of_pieces_is_that_of_the_whole():
    assert checksum(PAYLOAD) == checksum(PAYLOAD[:100], PAYLOAD[100:]) == xxhash.xxh3_64_intdigest(PAYLOAD)
    assert checksum(b"", PAYLOAD, b"") == checksum(PAYLOAD)


# ------------------------------------------------------------ damage that the checksums find


def test_header_every_single_bit_flip_is_refused():
    refused = 0
    for at in range(256):
        for bit in range(8):
            damaged = bytearray(ENCODED)
            damaged[at] ^= 1 << bit
            with pytest.raises(CorruptRecord):
                decode_header(damaged)
            refused += 1
    assert refused == 2048


def test_payload_every_single_byte_flip_is_refused():
    for at in range(RECORD_HEADER_BYTES, len(RECORD)):
        damaged = bytearray(RECORD)
        damaged[at] ^= 0xFF
        with pytest.raises(CorruptRecord, match="the payload's checksum is wrong"):
            decode_record(damaged)


def test_payload_every_single_bit_flip_is_refused():
    for at in range(RECORD_HEADER_BYTES, len(RECORD)):
        for bit in range(8):
            damaged = bytearray(RECORD)
            damaged[at] ^= 1 << bit
            with pytest.raises(CorruptRecord, match="the payload's checksum is wrong"):
                decode_record(damaged)


def test_record_cut_anywhere_is_refused():
    for length in range(len(RECORD)):
        message = "256 bytes of header" if length < 256 else f"{length} bytes given for a record of {len(RECORD)}"
        with pytest.raises(CorruptRecord, match=message):
            decode_record(RECORD[:length])


def test_record_with_bytes_behind_it_is_refused():
    with pytest.raises(CorruptRecord, match="bytes given for a record of"):
        decode_record(RECORD + b"\0")


def test_record_of_another_key_put_in_place_is_seen_by_the_header():
    other = encode_header(replace(HEADER, key=b"o" * 32))
    decoded, _ = decode_record(other + PAYLOAD)
    assert decoded.key != KEY


@pytest.mark.parametrize("empty", [b"", bytes(256), bytes(4096), b"\xff" * 256])
def test_header_preallocated_memory_is_no_record(empty):
    with pytest.raises(CorruptRecord):
        decode_header(empty)


# ------------------------------------------------------------ fields that are impossible, under a right checksum

MANY = 2**32 - 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"magic": b"KVRECORE"}, "wrong magic"),
        ({"magic": bytes(8)}, "wrong magic"),
        *[({"version": version}, "is not known to this version") for version in (0, 2, 65_535)],
        *[({"header_bytes": size}, "is not known to this version") for size in (0, 255, 257, 512)],
        *[
            ({"reserved_tail": bytes(at) + b"\1" + bytes(15 - at)}, "reserved header bytes are not zero")
            for at in range(16)
        ],
        ({"key": bytes(32)}, "the record's key is the root"),
        ({"parent_key": KEY}, "its own parent"),
        *[({"codec": codec}, f"unknown codec id {codec}") for codec in (0, 20, 65_535)],
        *[
            ({"dtype": dtype}, "unknown logical dtype")
            for dtype in (bytes(24), b"uint9", b"UINT8", b"uint8\0x", b"\0uint8", b"uint8 ", b"\xff" * 24, b"u" * 24)
        ],
        *[({"dimensions": count}, "impossible shape") for count in (0, 2, 6, 7, 255)],
        ({"dimensions": 0, "shape": (0,) * 6}, "impossible shape"),
        ({"dimensions": 7, "shape": (1, 2, 3, 4, 4, 8)}, "impossible shape"),
        ({"dimensions": 1, "shape": (768, 1, 0, 0, 0, 0)}, "impossible shape"),
        ({"dimensions": 1, "shape": (768, 0, 0, 0, 0, 1)}, "impossible shape"),
        ({"dimensions": 2, "shape": (768, 0, 0, 0, 0, 0)}, "impossible shape"),
        ({"dimensions": 1, "shape": (0, 0, 0, 0, 0, 0)}, "impossible shape"),
        ({"dimensions": 3, "shape": (1, 0, 768, 0, 0, 0)}, "impossible shape"),
        *[({"sections": count}, "impossible sections") for count in (0, 2, 4, 5, 255)],
        ({"sections": 0, "section_bytes": (0,) * 4, "record_bytes": 256}, "impossible sections"),
        ({"sections": 5, "section_bytes": (192,) * 4}, "impossible sections"),
        ({"section_bytes": (768, 1, 0, 0), "record_bytes": 1025}, "impossible sections"),
        ({"section_bytes": (768, 0, 0, 1)}, "impossible sections"),
        ({"section_bytes": (0, 0, 0, 0), "record_bytes": 256}, "impossible sections"),
        ({"sections": 2, "section_bytes": (0, 768, 0, 0)}, "impossible sections"),
        ({"sections": 3, "section_bytes": (384, 0, 384, 0)}, "impossible sections"),
        *[
            ({"record_bytes": size}, "are not its header and sections")
            for size in (0, 255, 256, 1023, 1025, MAX_RECORD_BYTES, MAX_RECORD_BYTES + 1, 2**64 - 1)
        ],
        ({"section_bytes": (767, 0, 0, 0)}, "are not its header and sections"),
        ({"sections": 2, "section_bytes": (2**64 - 1, 769, 0, 0)}, "are not its header and sections"),
        (
            {"section_bytes": (MAX_RECORD_BYTES, 0, 0, 0), "record_bytes": MAX_RECORD_BYTES + 256},
            "are not its header and sections",
        ),
        ({"sections": 2, "section_bytes": (384, 384, 0, 0)}, "not its dtype times its shape"),
        (
            {"sections": 2, "section_bytes": (768, 256, 0, 0), "record_bytes": 1280},
            "not its dtype times its shape",
        ),
        ({"shape": (767, 0, 0, 0, 0, 0)}, "not its dtype times its shape"),
        ({"dimensions": 6, "shape": (MANY,) * 6}, "not its dtype times its shape"),
        ({"dtype": b"float16"}, "not its dtype times its shape"),
        *[({"fidelity": fidelity}, f"fidelity {fidelity} is not that of raw") for fidelity in (0, 1, 254)],
        ({"codec_parameters": bytes(15) + b"\1"}, "the digest of parameters is not one of raw"),
    ],
)
def test_header_impossible_field_under_a_right_checksum_is_refused(values, message):
    with pytest.raises(CorruptRecord, match=message):
        decode_header(with_fields(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"part": 65_535},
        {"token_count": MANY},
        {"parent_key": bytes(32)},
        {"namespace_digest": bytes(32)},
        {"payload_checksum": 2**64 - 1},
        *[{"lineage_loss": loss} for loss in (1, 221, 255)],
        {"dimensions": 6, "shape": (1, 2, 3, 4, 4, 8)},
        {"dtype": b"float32", "shape": (192, 0, 0, 0, 0, 0)},
        {"shape": (MANY - 255, 0, 0, 0, 0, 0), "section_bytes": (MANY - 255, 0, 0, 0), "record_bytes": MANY + 1},
    ],
)
def test_header_extreme_but_possible_field_is_accepted(values):
    encoded = with_fields(**values)
    assert encode_header(decode_header(encoded)) == encoded


@pytest.mark.parametrize(
    "changes",
    [
        {"key": b"short"},
        {"key": b"k" * 33},
        {"key": bytes(32)},
        {"key": PARENT},
        {"parent_key": b""},
        {"namespace_digest": b"d" * 31},
        {"codec_parameters": b"x" * 15},
        {"codec_parameters": b"x" * 16},
        {"part": -1},
        {"part": 65_536},
        {"part": 1.5},
        {"fidelity": 256},
        {"fidelity": 254},
        {"lineage": 256},
        {"lineage": -1},
        {"codec": 0},
        {"codec": CodecId.KIVI4},
        {"dtype": "int4"},
        {"dtype": "uint8" + "x" * 20},
        {"dtype": "ünt8"},
        {"shape": ()},
        {"shape": (1,) * 7},
        {"shape": (768, 1, 1, 1, 1, 1, 1)},
        {"shape": (2**32,)},
        {"shape": (-768,)},
        {"shape": (767,)},
        {"section_bytes": ()},
        {"section_bytes": (384, 384)},
        {"section_bytes": (192,) * 5},
        {"section_bytes": (-1,)},
        {"token_count": 2**32},
        {"token_count": -1},
        {"payload_checksum": 2**64},
        {"payload_checksum": -1},
    ],
)
def test_encode_header_what_no_record_can_hold_is_refused(changes):
    with pytest.raises(InvalidArgument, match="no record can hold this header"):
        encode_header(replace(HEADER, **changes))


# ------------------------------------------------------------ fuzzing

INTERESTING = [0, 1, 2, 4, 6, 255, 256, 257, 768, 1024, 4096, 2**16 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
DTYPES = [name.encode().ljust(24, b"\0") for name in DTYPE_SIZES]


def random_field(rng: random.Random, code: str) -> tuple[object, ...]:
    """A value of the field's width: a small, an extreme or any one."""
    if code.endswith("s"):
        size = int(code[:-1])
        return (
            rng.choice(
                [
                    bytes(size),
                    rng.randbytes(size),
                    b"\1" + bytes(size - 1),
                    rng.choice(DTYPES)[:size].ljust(size, b"\0"),
                ]
            ),
        )
    bits = 8 * struct.calcsize(f"<{code[-1]}")
    choices = [number for number in INTERESTING if number < 1 << bits]
    return tuple(
        rng.choice([rng.choice(choices), rng.choice(choices), rng.getrandbits(bits), rng.randrange(12)])
        for _ in range(int(code[:-1] or 1))
    )


@pytest.mark.timeout(120)
def test_header_random_fields_under_a_right_checksum_refused_or_canonical():
    rng = random.Random(3)
    outcomes: Counter[str] = Counter()
    for _ in range(60_000):
        header = bytearray(ENCODED)
        for name in rng.sample([*FIELDS], rng.choice([1, 1, 1, 2, 2, 3, len(FIELDS)])):
            at, code = FIELDS[name]
            struct.pack_into(f"<{code}", header, at, *random_field(rng, code))
        if rng.random() < 0.3:  # lengths that agree, so that deeper checks are reached
            (sections,) = struct.unpack_from("<B", header, 189)
            lengths = struct.unpack_from("<4Q", header, 192)[: min(sections, 4)]
            struct.pack_into("<Q", header, 16, (256 + sum(lengths)) & (2**64 - 1))
        encoded = sealed(header)
        try:
            decoded = decode_header(encoded)
        except CorruptRecord as refusal:
            outcomes[str(refusal).split(" ")[0]] += 1
            continue
        assert encode_header(decoded) == encoded, encoded.hex()
        assert decoded.record_bytes <= MAX_RECORD_BYTES
        outcomes["accepted"] += 1
    assert outcomes["accepted"] > 1000, outcomes
    assert outcomes.total() - outcomes["accepted"] > 30_000, outcomes


def test_record_random_bytes_and_random_wounds_are_refused():
    rng = random.Random(4)
    for _ in range(20_000):
        damaged = bytearray(RECORD)
        match rng.randrange(4):
            case 0:
                damaged[:] = rng.randbytes(rng.randrange(1200))
            case 1:
                del damaged[rng.randrange(len(damaged)) :]
            case 2:
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.randint(1, 64)] = rng.randbytes(rng.randrange(64))
            case _:
                one, two = rng.randrange(len(damaged)), rng.randrange(len(damaged))
                damaged[one], damaged[two] = damaged[two], damaged[one]
        if damaged != RECORD:
            with pytest.raises(CorruptRecord):
                decode_record(damaged)


# ------------------------------------------------------------ slots


@pytest.mark.parametrize(
    ("record_bytes", "slot_bytes"), [(257, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20)]
)
def test_padded_bytes_is_the_next_page(record_bytes, slot_bytes):
    assert padded_bytes(record_bytes) == slot_bytes


@pytest.mark.parametrize("length", [257, 1024, 4095, 4096, 4097, 65_536, 100_000, 3 * 65_536 - 1])
def test_padding_is_zero_finds_any_byte_behind_the_record(length):
    slot = bytearray(padded_bytes(length) + 2 * PAGE_BYTES)
    slot[:length] = b"\xee" * length
    assert padding_is_zero(slot, length)
    assert padding_is_zero(memoryview(slot), length)
    for at in {length, length + 1, len(slot) // 2, len(slot) - 1, min(length + 65_536, len(slot) - 1)}:
        if at >= length:
            slot[at] = 1
            assert not padding_is_zero(slot, length)
            slot[at] = 0


def test_padding_is_zero_full_slot_has_no_padding():
    assert padding_is_zero(b"\xff" * PAGE_BYTES, PAGE_BYTES)
