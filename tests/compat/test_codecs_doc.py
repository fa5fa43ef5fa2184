"""``docs/codecs.md``, implemented a second time from the page alone, against the reference: bytes and values."""

from __future__ import annotations

import codec_oracle as oracle
import numpy as np
import pytest
import torch
from doc_tables import table
from golden_codecs import BLOCKS, golden_block, golden_names

from kvstore_kernels.codecs import CODECS, get_codec
from kvstore_kernels.codecs.turbo import LEVELS, THRESHOLDS, hadamard, sum_of_squares
from kvstore_kernels.layout import KVLayout, Rule

LOSSY = [(block, codec) for block, codec in golden_names() if not get_codec(codec).exact]
TABLE = table("codecs.md", "Codecs")


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("block", "codec"), LOSSY)
def test_reference_gives_the_bytes_that_the_page_describes(block: str, codec: str) -> None:
    layout, x = BLOCKS[block], golden_block(block)
    encoded = get_codec(codec).encode(x, layout)
    sections, void_groups = oracle.encode(codec, layout, x.float().numpy())
    for planes, ours, theirs in zip(layout.planes, encoded.sections, sections, strict=True):
        if planes.rule is not Rule.EXACT:
            assert ours == theirs, planes
    assert encoded.void_groups == void_groups


@pytest.mark.parametrize(("block", "codec"), LOSSY)
def test_reference_decodes_to_the_values_that_the_page_describes(block: str, codec: str) -> None:
    layout = BLOCKS[block]
    encoded = get_codec(codec).encode(golden_block(block), layout)
    decoded = layout.split(get_codec(codec).decode(encoded.sections, layout))
    expected = oracle.decode(codec, layout, encoded.sections)
    for planes, ours, theirs in zip(layout.planes, decoded, expected, strict=True):
        if planes.rule is not Rule.EXACT:
            assert bits_of(ours) == bits_of(torch.from_numpy(theirs).to(ours.dtype)), planes


@pytest.mark.parametrize("elements", [16, 32, 64, 128])
def test_squares_are_summed_up_and_vectors_turned_as_the_page_says(elements: int) -> None:
    vectors = torch.randn(50, elements, generator=torch.Generator().manual_seed(elements))
    sums, turned = sum_of_squares(vectors)[:, 0], hadamard(vectors)
    assert sums.tolist() == [float(oracle.sum_of_squares(vector)) for vector in vectors.numpy()]
    assert turned.tolist() == [oracle.butterfly(vector).tolist() for vector in vectors.numpy()]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_scales_of_many_turbo_vectors_are_rounded_where_the_page_says(bits: int) -> None:
    """Rounding once more or less changes one float16 scale in some thousands: 40,000 vectors show it."""
    layout = KVLayout(1, 1, 32, "float32", 20_000)
    block = torch.randn(layout.shape, generator=torch.Generator().manual_seed(bits))
    sections = get_codec(f"turbo{bits}").encode(block, layout).sections
    for x, section in zip(layout.split(block), sections, strict=True):
        vectors = x.reshape(-1, 32)
        norm = np.sqrt(sum_of_squares(vectors).numpy())
        signs = torch.tensor([-1.0 if oracle.sign(i) else 1.0 for i in range(32)])
        whole = np.rint(hadamard(vectors * signs).numpy() * (np.float32(2048) / norm)).astype(np.int64)
        index = np.searchsorted(oracle.THRESHOLDS[bits], np.abs(whole), side="left")
        dot = (np.abs(whole) * np.array(oracle.LEVELS[bits])[index]).sum(-1, keepdims=True)
        scales = ((norm * np.float32(np.sqrt(32) * 2**22)) / dot.astype(np.float32)).astype(np.float16)
        assert section[-2 * len(scales) :] == scales.tobytes()


def test_every_fp8_code_decodes_as_the_oracle_says_and_encodes_to_itself() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    for code, value in enumerate(values):
        if code & 127 == 127:
            assert np.isnan(value)
        else:
            assert abs(value) == oracle.E4M3[code & 127]
            assert oracle.e4m3_code(value) == code


def test_levels_and_thresholds_are_those_of_the_page() -> None:
    rows = table("codecs.md", "Arithmetic").rows
    assert {int(row["b"]): tuple(map(int, row["levels"].split())) for row in rows} == LEVELS
    assert {int(row["b"]): tuple(map(int, row["thresholds"].split())) for row in rows} == THRESHOLDS


def test_codecs_are_those_of_the_page() -> None:
    assert TABLE.column("codec") == list(CODECS)
    for row in TABLE.rows:
        codec = get_codec(row["codec"])
        assert codec.id == int(row["id"])
        assert codec.fidelity == int(row["fidelity"])


def test_digests_are_those_of_the_page() -> None:
    rows = table("codecs.md", "Parameters").rows
    assert {row["codec"]: row["digest"] for row in rows} == {name: codec.digest.hex() for name, codec in CODECS.items()}


@pytest.mark.parametrize("dim", [128, 64])
def test_bits_a_value_are_those_of_the_page(dim: int) -> None:
    layout = KVLayout(2, 3, dim, "bfloat16", 64)
    for row in TABLE.rows:
        bits = get_codec(row["codec"]).bits_per_value(layout)
        cell = row[f"bits a value (D {dim})"]
        if bits is None:
            assert "about" in cell or not cell
        else:
            assert round(bits, 3) == float(cell), row["codec"]


@pytest.mark.parametrize("codec", ["kivi4", "kivi2"])
def test_tokens_are_multiples_as_on_the_page(codec: str) -> None:
    (cell,) = [row["T a multiple of"] for row in TABLE.rows if row["codec"] == codec]
    multiple = int(cell)
    get_codec(codec).check(KVLayout(1, 1, 128, "bfloat16", multiple))
    with pytest.raises(ValueError, match=f"multiple of {multiple} tokens"):
        get_codec(codec).check(KVLayout(1, 1, 128, "bfloat16", multiple // 2))
