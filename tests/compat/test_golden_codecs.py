"""Released bytes of the codecs: golden blocks give them, they decode to what they always meant, digests stand."""

from __future__ import annotations

import pytest
from golden_codecs import BLOCKS, FOLDER, golden, golden_block, golden_names, input_sha256, sha256_of

from kvstore_kernels.codecs import CODECS, get_codec

DIGESTS = {
    "raw": "00000000000000000000000000000000",
    "lossless": "5db9ef2a450772b9cd03e46140da3302",
    "lossless-zstd": "c9a711f4a15608ef7d687c60b350f596",
    "fp8": "50b5fd5ec08d55438f86d4fb647c6084",
    "int8": "a15d8966a8d6a02f7ba164f0b9ebaf43",
    "int4": "197c78bec57d66ef1be486f4a42701be",
    "kivi4": "54189f3f72b0782d0f253736756b9da7",
    "kivi2": "03189f62dba3f4e4819ad388a50f5342",
    "turbo4": "8e80cf9a199fed0a1e2a285c94ce9728",
    "turbo3": "aea33ad4a7205185560fdd8fecc13b98",
    "turbo2": "c711b8b1e16dafabbe6c9d80cd22b872",
    "turbo4-3": "00db1ce087d2454ee321f9d55160b76d",
    "turbo3-2": "e802e64b3472ffd7d066d4c63579369b",
    "centred4": "f3e94a9b88f2c5b790c6b76688c66f15",
    "centred3": "8506e169b416caa9912c0891a218f8c5",
    "centred2": "68433e2383c780feccd6650498e9ca73",
    "centred4-3": "749fcaabc126703a2370f72375ba6a0a",
    "centred4-2": "21b882ed3f3b07ee04f821b41f3da4a6",
    "centred3-2": "9128e576936c6734c9f3cbba0778d48c",
}
"""``codec_parameters`` of records: a codec whose digest changes cannot read what it stored."""

FIXED = [name for name in golden_names() if not get_codec(name[1]).whole]
"""All but the lossless codecs: what a compressor gives is its own business."""


def test_digests_are_those_of_version_1() -> None:
    assert {name: codec.digest.hex() for name, codec in CODECS.items()} == DIGESTS


def test_ids_are_those_of_version_1() -> None:
    assert [codec.id for codec in CODECS.values()] == list(range(1, 20))


def test_every_codec_has_golden_files() -> None:
    names = golden_names()
    assert {codec for _, codec in names} == set(CODECS) - {"raw"}
    assert {block for block, _ in names} == set(BLOCKS)
    assert {f"{path.parent.name}/{path.stem}" for path in FOLDER.rglob("*.bin")} == {"/".join(name) for name in names}


@pytest.mark.parametrize("block", BLOCKS)
def test_golden_inputs_are_made_as_they_were(block: str) -> None:
    assert sha256_of(golden_block(block)) == input_sha256(block)


@pytest.mark.parametrize(("block", "codec"), FIXED)
def test_golden_block_encodes_to_its_golden_bytes(block: str, codec: str) -> None:
    expected = golden(block, codec)
    encoded = get_codec(codec).encode(golden_block(block), expected.layout)
    assert encoded.sections == expected.sections
    assert encoded.void_groups == expected.void_groups


@pytest.mark.parametrize(("block", "codec"), golden_names())
def test_golden_bytes_decode_to_what_they_always_meant(block: str, codec: str) -> None:
    expected = golden(block, codec)
    decoded = get_codec(codec).decode(expected.sections, expected.layout)
    assert sha256_of(decoded) == expected.decoded_sha256
