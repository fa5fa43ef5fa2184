"""Records that a codec made: what their headers may say, and how near they are to the original."""

from __future__ import annotations

import struct
from math import prod

import pytest
import xxhash
from doc_tables import tables
from msgspec.structs import replace

from kvstore.errors import CorruptRecord, InvalidArgument
from kvstore.format.constants import (
    CODEC_FIDELITY,
    CODECS_BY_NAME,
    DTYPE_SIZES,
    EXACT_CODECS,
    FIDELITY_EXACT,
    MAX_RECORD_BYTES,
    CodecId,
)
from kvstore.format.record import RecordHeader, checksum, decode_header, decode_record, encode_header, record_header

KEY, PARENT, DIGEST, PARAMETERS = b"k" * 32, b"p" * 32, b"d" * 32, b"c" * 16
SHAPE = (4, 2, 64, 2, 128)
LOGICAL_BYTES = 2 * prod(SHAPE)
LOSSLESS = CodecId.LOSSLESS
LOSSY_CODECS = sorted(set(CodecId) - EXACT_CODECS)


def header(codec: CodecId = CodecId.KIVI4, **changes: object) -> RecordHeader:
    """A header that the decoder accepts, for any codec, unless ``changes`` make it another one."""
    exact = codec in EXACT_CODECS
    made = record_header(
        key=KEY,
        parent_key=PARENT,
        namespace_digest=DIGEST,
        part=0,
        codec=codec,
        codec_parameters=bytes(16) if codec is CodecId.RAW else PARAMETERS,
        fidelity=CODEC_FIDELITY[codec],
        dtype="bfloat16",
        shape=SHAPE,
        section_bytes=(LOGICAL_BYTES,) if exact else (LOGICAL_BYTES // 8, LOGICAL_BYTES // 8),
        payload_checksum=7,
        token_count=64,
    )
    return replace(made, **changes)


def table_bytes(values: int, element_bytes: int) -> int:
    """Of a lossless record: a length for each byte plane of each chunk."""
    return -(-values // 65_536) * element_bytes * 4


@pytest.mark.parametrize("codec", list(CodecId))
def test_codec_record_header_written_and_read_is_the_same(codec):
    made = header(codec, lineage=85)
    encoded = encode_header(made)
    assert decode_header(encoded) == made
    assert struct.unpack_from("<H", encoded, 14) == (codec,)
    assert encoded[191] == 255 - 85


@pytest.mark.parametrize("codec", list(CodecId))
def test_codec_record_digest_of_parameters_is_zero_for_raw_alone(codec):
    wrong = PARAMETERS if codec is CodecId.RAW else bytes(16)
    with pytest.raises(InvalidArgument, match=f"the digest of parameters is not one of {codec.text}"):
        encode_header(header(codec, codec_parameters=wrong))


@pytest.mark.parametrize("codec", list(CodecId))
def test_codec_record_fidelity_is_255_with_exact_codecs_alone(codec):
    for fidelity in (0, 85, 254, 255):
        made = header(codec, fidelity=fidelity)
        if (codec in EXACT_CODECS) == (fidelity == FIDELITY_EXACT):
            assert decode_header(encode_header(made)).fidelity == fidelity
        else:
            with pytest.raises(InvalidArgument, match=f"fidelity {fidelity} is not that of {codec.text}"):
                encode_header(made)


@pytest.mark.parametrize(
    ("fidelity", "lineage", "effective"), [(255, 255, 255), (255, 85, 85), (85, 255, 85), (85, 36, 36), (85, 0, 0)]
)
def test_codec_record_is_no_better_than_what_it_was_computed_on(fidelity, lineage, effective):
    codec = CodecId.RAW if fidelity == 255 else CodecId.KIVI4
    made = header(codec, fidelity=fidelity, lineage=lineage)
    assert decode_header(encode_header(made)).effective_fidelity == effective


@pytest.mark.parametrize("codec", LOSSY_CODECS)
@pytest.mark.parametrize("dtype", sorted(DTYPE_SIZES))
def test_codec_record_lossy_of_an_engine_s_own_quantised_cache_is_refused(codec, dtype):
    made = header(codec, dtype=dtype)
    if DTYPE_SIZES[dtype] > 1:
        assert decode_header(encode_header(made)).dtype == dtype
    else:
        with pytest.raises(InvalidArgument, match=f"a lossy codec makes no record of {dtype}"):
            encode_header(made)


SOME = LOGICAL_BYTES // 4


@pytest.mark.parametrize(
    ("codec", "section_bytes", "good"),
    [
        (CodecId.KIVI4, (SOME, SOME), True),
        (CodecId.KIVI4, (1, LOGICAL_BYTES - 1), True),
        (CodecId.KIVI4, (1, LOGICAL_BYTES), False),
        (CodecId.TURBO2, (LOGICAL_BYTES // 32, LOGICAL_BYTES // 32), True),
        (CodecId.TURBO2, (LOGICAL_BYTES // 32, LOGICAL_BYTES // 32 - 1), False),
        (CodecId.KIVI4, (SOME,), False),
        (CodecId.KIVI4, (SOME, SOME, SOME), False),
        (CodecId.KIVI4, (SOME,) * 4, False),
        (CodecId.RAW, (SOME, LOGICAL_BYTES - SOME), False),
        (LOSSLESS, (SOME, SOME), False),
        (LOSSLESS, (LOGICAL_BYTES + table_bytes(prod(SHAPE), 2),), True),
        (LOSSLESS, (LOGICAL_BYTES + table_bytes(prod(SHAPE), 2) + 1,), False),
        (CodecId.LOSSLESS_ZSTD, (table_bytes(prod(SHAPE), 2) * 5 // 4,), True),
        (CodecId.LOSSLESS_ZSTD, (table_bytes(prod(SHAPE), 2) * 5 // 4 - 1,), False),
    ],
)
def test_codec_record_sections_must_be_of_a_possible_number_and_size(codec, section_bytes, good):
    made = header(codec, section_bytes=section_bytes)
    if good:
        assert decode_header(encode_header(made)).section_bytes == section_bytes
    else:
        with pytest.raises(InvalidArgument, match="no record can hold this header"):
            encode_header(made)


@pytest.mark.parametrize("values", [1, 65_535, 65_536, 65_537, 10 * 65_536 + 1])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_codec_record_lossless_bounds_go_by_chunks_and_byte_planes(values, dtype):
    element_bytes = DTYPE_SIZES[dtype]
    table = table_bytes(values, element_bytes)
    least, most = table * 5 // 4, table + values * element_bytes
    for length, good in [(least, True), (least - 1, False), (most, True), (most + 1, False)]:
        made = header(LOSSLESS, dtype=dtype, shape=(values,), section_bytes=(length,))
        if good:
            assert decode_header(encode_header(made)) == made
        else:
            with pytest.raises(InvalidArgument):
                encode_header(made)


@pytest.mark.parametrize("codec", [codec for codec in CodecId if codec is not CodecId.RAW])
def test_codec_record_block_larger_than_a_record_is_refused(codec):
    """Who trusts a header allocates what it says of the block."""
    sections = 1 if codec in EXACT_CODECS else 2
    most = header(codec, dtype="float32", shape=(1 << 30,), section_bytes=(MAX_RECORD_BYTES // 8,) * sections)
    assert 4 * prod(most.shape) == MAX_RECORD_BYTES
    assert decode_header(encode_header(most)).shape == (1 << 30,)
    for shape in [((1 << 30) + 1,), (1 << 15, 1 << 16), (2**32 - 1,) * 6]:
        with pytest.raises(InvalidArgument, match="larger than a record may be"):
            encode_header(replace(most, shape=shape))


def test_codec_record_whole_is_decoded_and_its_sections_are_checked():
    payload = bytes(range(256)) * (SOME // 128)
    made = header(section_bytes=(SOME, SOME), payload_checksum=checksum(payload[:SOME], payload[SOME:]))
    record = encode_header(made) + payload
    assert decode_record(record)[0] == made
    for at in (256, 256 + SOME - 1, 256 + SOME, len(record) - 1):
        damaged = bytearray(record)
        damaged[at] ^= 1
        with pytest.raises(CorruptRecord, match="payload's checksum"):
            decode_record(damaged)
    assert made.payload_checksum == xxhash.xxh3_64_intdigest(payload)


def test_codec_names_are_those_of_the_page():
    (codecs,) = [one for one in tables("codecs.md") if "id" in one.columns]
    assert [int(identity) for identity in codecs.column("id")] == list(CodecId)
    assert codecs.column("codec") == [codec.text for codec in CodecId]
    assert [int(fidelity) for fidelity in codecs.column("fidelity")] == [CODEC_FIDELITY[codec] for codec in CodecId]
    assert [CODECS_BY_NAME[name] for name in codecs.column("codec")] == list(CodecId)
