"""Released records of each codec: a golden header, then the golden sections of its block (``golden_codecs``).

``<codec>.hex`` is of the block of grouped-query attention; the others are named after what is different about them.
"""

from __future__ import annotations

import golden_codecs
import pytest
from golden_files import golden, golden_names

from kvstore.errors import CorruptRecord
from kvstore.format.constants import CODEC_FIDELITY, FIDELITY_EXACT, CodecId
from kvstore.format.record import checksum, decode_record, encode_header, record_header
from kvstore.protocol.keys import ROOT_KEY, chain_keys
from kvstore.protocol.namespace import Namespace
from kvstore_kernels.codecs import CODECS, codec_of_id, get_codec

FOLDER = "record-1-codecs"
FIRST, SECOND = chain_keys(range(128), 64, salt=b"golden")
DIGEST = Namespace(name="chat", model="llama", revision="r1", codec="kivi2").digest(0)
RECORDS = {
    **{name: ("gqa128-bfloat16", name, ROOT_KEY, FIDELITY_EXACT) for name in CODECS if name != "raw"},
    "kivi4-latent": ("mla128-bfloat16", "kivi4", ROOT_KEY, FIDELITY_EXACT),
    "kivi4-lineage": ("gqa128-bfloat16", "kivi4", FIRST, 59),
    "lossless-lineage": ("gqa128-bfloat16", "lossless", FIRST, 85),
}
"""Block, codec, parent and lineage by golden file."""


def record_of(name: str) -> bytes:
    """The record that is written today."""
    block, codec_name, parent, lineage = RECORDS[name]
    codec, made = get_codec(codec_name), golden_codecs.golden(block, codec_name)
    header = record_header(
        key=FIRST if parent == ROOT_KEY else SECOND,
        parent_key=parent,
        namespace_digest=DIGEST,
        part=0,
        codec=CodecId(codec.id),
        codec_parameters=codec.digest,
        fidelity=codec.fidelity,
        dtype=made.layout.dtype,
        shape=made.layout.shape,
        section_bytes=[len(section) for section in made.sections],
        payload_checksum=checksum(*made.sections),
        token_count=made.layout.block_tokens,
        lineage=lineage,
    )
    return encode_header(header) + b"".join(made.sections)


@pytest.mark.parametrize("name", RECORDS)
def test_golden_record_of_a_codec_is_what_is_written_today(name: str):
    (header,) = golden(f"{FOLDER}/{name}")
    assert record_of(name)[:256] == header


@pytest.mark.parametrize("name", RECORDS)
def test_golden_record_of_a_codec_says_all_that_decoding_needs(name: str):
    block, codec_name, _, lineage = RECORDS[name]
    (encoded,) = golden(f"{FOLDER}/{name}")
    made = golden_codecs.golden(block, codec_name)
    header, payload = decode_record(encoded + b"".join(made.sections))
    codec = codec_of_id(header.codec)
    assert (codec.name, codec.digest) == (codec_name, header.codec_parameters)
    assert (header.shape, header.dtype) == (made.layout.shape, made.layout.dtype)
    assert header.effective_fidelity == min(codec.fidelity, lineage)
    sections, at = [], 0
    for length in header.section_bytes:
        sections.append(bytes(payload[at : at + length]))
        at += length
    decoded = codec.decode(sections, made.layout)
    assert golden_codecs.sha256_of(decoded) == made.decoded_sha256
    with pytest.raises(CorruptRecord, match="payload's checksum"):
        decode_record(encoded + b"".join(reversed(made.sections)) if len(sections) > 1 else encoded + bytes(at))


def test_golden_records_each_codec_has_one():
    assert golden_names(FOLDER) == {f"{FOLDER}/{name}" for name in RECORDS}


def test_codecs_are_the_same_to_records_and_kernels():
    assert {codec.text: int(codec) for codec in CodecId} == {name: codec.id for name, codec in CODECS.items()}
    assert {codec.text: fidelity for codec, fidelity in CODEC_FIDELITY.items()} == {
        name: codec.fidelity for name, codec in CODECS.items()
    }
    assert [name for name, codec in CODECS.items() if codec.digest == bytes(16)] == ["raw"]
