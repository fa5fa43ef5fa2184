"""Keys less their mean on the CPU: bytes, void vectors and values of the reference, in every form of pages."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from codec_blocks import CENTRED, any_bits, layout_id, normal_block, same_bits
from cpu_blocks import Guarded, decoded_by_cpu, encoded_by_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.kernels.cpu.codec_checks import (
    AXES,
    check_form,
    check_like_reference,
    extreme_block,
    few_void_bits,
    one_sign_block,
    run_without_avx2,
)

from kvstore_kernels import cpu
from kvstore_kernels.codecs.method import REGION_BYTES
from kvstore_kernels.layout import KVLayout, Layout, MLALayout
from kvstore_kernels.paged import PagedKV

CASES: tuple[tuple[str, Layout], ...] = (
    ("centred4", KVLayout(2, 3, 128, "bfloat16", 64)),
    ("centred3", KVLayout(2, 2, 128, "bfloat16", 128)),
    ("centred2", KVLayout(1, 2, 128, "bfloat16", 192)),
    ("centred4-3", KVLayout(1, 2, 64, "bfloat16", 256)),
    ("centred4-2", KVLayout(1, 2, 80, "bfloat16", 192)),
    ("centred3-2", KVLayout(1, 1, 256, "bfloat16", 256)),
    ("centred4", MLALayout(1, 192, 64, "float16", 128)),
    ("centred3", MLALayout(2, 256, 64, "float16", 64)),
    ("centred2", KVLayout(1, 2, 96, "float16", 128)),
    ("centred4", MLALayout(1, 384, 64, "float32", 128)),
    ("centred3", KVLayout(1, 2, 32, "float32", 64)),
    ("centred4-3", KVLayout(1, 2, 192, "bfloat16", 64)),
)
"""Every codec, dtype, size of groups and of vectors, tokens of one vector and of several."""

each_case = pytest.mark.parametrize(("codec", "layout"), CASES, ids=[f"{c}-{layout_id(x)}" for c, x in CASES])


def keys_like_a_models(layout: Layout, seed: int = 0) -> torch.Tensor:
    """A mean of twice the rest, in which channels stand out; vectors far from it, empty and void ones."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(layout.shape, generator=generator)
    for section in layout.split(block):
        section += 2 * torch.randn(section[:, :, :1].shape, generator=generator)
        section[..., 3] *= 16
        section[..., 11] /= 1000
        section[:, :, 0] *= 0.1
        section[:, :, 41::64] *= -0.2
        section[:, :1, 7] = 0
        section[:, :1, 9, 5] = torch.nan
        section[:, :1, -1, -2] = 1e4
    return block.to(getattr(torch, layout.dtype))


@each_case
def test_any_numbers_give_the_bytes_and_values_of_the_reference(codec: str, layout: Layout) -> None:
    for block in (
        keys_like_a_models(layout),
        normal_block(layout, seed=1, outliers=True),
        extreme_block(layout, seed=2),
        few_void_bits(layout, seed=3),
        any_bits(layout, seed=4),
        one_sign_block(layout, seed=5),
    ):
        check_like_reference(CENTRED[codec], block, layout)


@each_case
def test_numbers_of_any_size_give_the_bytes_and_values_of_the_reference(codec: str, layout: Layout) -> None:
    """Of few bits, so that sums of squares tie; exponents at their bounds; squares that are denormal; void in all."""
    tied = torch.randint(-2, 3, layout.shape, generator=torch.Generator().manual_seed(6))
    nearly_void = tied * 0
    for section in layout.split(nearly_void):
        section[:, :, 5:7, 2] = 8192
        section[:, :, 6, 3] = 64
    for block in (tied, 700 * tied, 5000 * tied, tied * 2.0**-12, tied * 2.0**-66, nearly_void, tied * 0, tied * 0 + 3):
        check_like_reference(CENTRED[codec], block.to(getattr(torch, layout.dtype)), layout)


def in_any_order(columns: torch.Tensor, layout: Layout, seed: int) -> torch.Tensor:
    """A block with these numbers in every channel of each plane, over its tokens in any order."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.zeros(layout.shape)
    for section in layout.split(block):
        order = torch.rand(section.shape, generator=generator).argsort(2)
        section[:] = columns[:, None].expand(section.shape).gather(2, order)
    return block


@pytest.mark.parametrize("tokens", [64, 128])
def test_sums_are_made_token_after_token(tokens: int) -> None:
    """Means that are nothing but rounding, and strengths next to where the exponent changes."""
    layout = MLALayout(1, 384, 64, "float32", tokens)
    codec = CENTRED["centred4"]
    large = torch.linspace(300, 700, tokens // 2)
    root = torch.full((2,), 2**-0.5)
    root = root.where(root * root < 0.5, root.nextafter(torch.zeros(2)))
    small = torch.full((tokens // 2 - 2,), (2.0**-22 / tokens) ** 0.5)
    for number, half in enumerate((large, torch.cat((root, small)))):
        block = in_any_order(torch.cat((half, -half)), layout, seed=number)
        *_, codes, exponents = _regions(codec.encode(block, layout).sections[0], layout)
        *_, codes_after, exponents_after = _regions(codec.encode(block.flip(1), layout).sections[0], layout)
        assert (codes, exponents)[number] != (codes_after, exponents_after)[number]
        check_like_reference(codec, block, layout)


def _regions(section: bytes, layout: Layout) -> list[bytes]:
    parts = []
    for region in CENTRED["centred4"].regions(layout.planes[0], layout.block_tokens):
        parts.append(section[: region.region_bytes])
        section = section[region.region_bytes :]
    return parts


@each_case
def test_any_finite_codes_decode_to_the_values_of_the_reference(codec: str, layout: Layout) -> None:
    """Exponents beyond their bounds and scales of either sign among them."""
    generator = np.random.default_rng(7)
    sections = []
    for planes in layout.planes:
        parts = []
        for region in CENTRED[codec].regions(planes, layout.block_tokens):
            data = generator.integers(0, 256, region.region_bytes, np.uint8)
            if region.dtype not in ("uint8", "int8", "uint16"):
                data[REGION_BYTES[region.dtype] - 1 :: REGION_BYTES[region.dtype]] &= 0xBF
            parts.append(data.tobytes())
        sections.append(b"".join(parts))
    expected = CENTRED[codec].decode(sections, layout)
    assert same_bits(decoded_by_cpu(CENTRED[codec], sections, layout), expected)


@settings(max_examples=20)
@given(st.data())
def test_any_shape_gives_the_bytes_of_the_reference(data: st.DataObject) -> None:
    layout = KVLayout(
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([64, 128, 192, 256])),
        "bfloat16",
        64 * data.draw(st.integers(1, 4)),
    )
    codec, seed = data.draw(st.sampled_from(["centred4", "centred4-3"])), data.draw(st.integers(0, 99))
    make = data.draw(st.sampled_from([extreme_block, keys_like_a_models]))
    check_like_reference(CENTRED[codec], make(layout, seed), layout)


@pytest.mark.parametrize("axes", AXES)
def test_every_form_of_pages_gives_the_same(axes: str) -> None:
    check_form(CENTRED["centred4-3"], KVLayout(2, 3, 64, "bfloat16", 64), 16, axes)


@pytest.mark.parametrize("axes", ["kv page token head dim", "vllm cpu"])
@pytest.mark.parametrize(("page_tokens", "block_tokens", "threads"), [(1, 64, 1), (64, 192, 1), (16, 256, 3)])
def test_every_size_of_pages_gives_the_same(page_tokens: int, block_tokens: int, threads: int, axes: str) -> None:
    layout = KVLayout(6, 3, 128, "bfloat16", block_tokens)
    check_form(CENTRED["centred3"], layout, page_tokens, axes, threads=threads, offset=threads - 1)


def test_staged_planes_of_many_short_vectors_give_the_same() -> None:
    """Tables for a vector each need the most scratch memory here, and the staged plane is behind them."""
    check_form(CENTRED["centred4-2"], KVLayout(1, 2, 80, "bfloat16", 128), 16, "vllm cpu")


def test_void_vectors_are_counted_for_each_block() -> None:
    layout = KVLayout(4, 2, 128, "bfloat16", 64)
    blocks = torch.cat([normal_block(layout, seed=number) for number in range(4)], dim=2)
    blocks[2, 0, 64:67, 1, 5] = torch.inf
    blocks[:, :, 192 + 9, 0, 7:9] = torch.nan
    codec = CENTRED["centred4"]
    payloads = [Guarded(sum(codec.max_section_bytes(layout))) for _ in range(4)]
    addresses = np.array([payload.address for payload in payloads], np.uint64)
    kv = PagedKV.from_tensor(layout, blocks)
    for threads in (1, 4):
        encoded = cpu.encode(codec, kv, np.arange(4, dtype=np.int32)[:, None], addresses, threads=threads)
        assert encoded.void_groups.tolist() == [0, 3, 0, 8]


def test_planes_one_after_another_leave_nothing_behind() -> None:
    """What void and far vectors of a plane are replaced by stays zero for those that follow."""
    layout = KVLayout(1, 2, 128, "bfloat16", 64)
    blocks = [keys_like_a_models(layout, seed) for seed in range(2)]
    for name in ("centred4", "centred3", "centred4"):
        for block in (*blocks, normal_block(layout)):
            assert encoded_by_cpu(CENTRED[name], block, layout).sections == CENTRED[name].encode(block, layout).sections


_SCRIPT = """
from codec_blocks import CENTRED, normal_block, same_bits
from cpu_blocks import decoded_by_cpu, encoded_by_cpu
from kvstore_kernels.layout import MLALayout

layout = MLALayout(1, 256, 64, "bfloat16", 64)
block, codec = normal_block(layout, outliers=True) + 1, CENTRED["centred3"]
sections = codec.encode(block, layout).sections
assert encoded_by_cpu(codec, block, layout).sections == sections
assert same_bits(decoded_by_cpu(codec, sections, layout), codec.decode(sections, layout))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines compile nothing else")
def test_code_for_a_machine_without_avx2_gives_the_same() -> None:
    run_without_avx2(_SCRIPT)
