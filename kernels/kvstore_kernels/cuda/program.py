"""Which kernels a codec needs for blocks of a layout in given pages: their source, and how many threads run them.

A program is made for one combination of codec, element type, channels, tokens and page size, which are constants of its
source, so that index arithmetic is folded. Nothing is compiled here, and CuPy is not needed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib import resources
from typing import Final

from kvstore_kernels.codecs import EXACT, Codec
from kvstore_kernels.codecs.centred import group_tokens
from kvstore_kernels.cuda.tables import turbo_tables
from kvstore_kernels.layout import Layout, Planes
from kvstore_kernels.paged import PagedKV, PagedPlanes

__all__ = ["COMPILER_OPTIONS", "Program", "SectionPlan", "program_for"]

COMPILER_OPTIONS: Final = ("-std=c++17", "-fmad=false", "-diag-suppress=177")
"""For NVRTC: nothing is contracted, and constants that a program does not use are no reason for a warning."""

_SEGMENT: Final = 64
"""Channels of a segment, what a warp takes 32 of."""
_USUAL_THREADS: Final = 128
_MAX_THREADS: Final = 1024
_MOST_CENTRED_THREADS: Final = 256
"""Of a block that encodes centred keys: two of 128 registers are on a multiprocessor."""
_MAX_SHARED_BYTES: Final = 96 << 10
"""Of a block of threads; every device from compute capability 8.0 on has this much."""
_MAX_STRIDE: Final = (1 << 31) - 1
_COPIED_UNITS: Final = 8
"""Units that a thread copies of planes that are stored as they are."""

_ELEMENTS: Final = {"bfloat16": "Bfloat16", "float16": "Float16", "float32": "Float32"}


@dataclass(frozen=True, slots=True)
class _Method:
    """How a kernel encodes planes: its type in the source, and the files of the source that define it."""

    template: str
    sources: tuple[str, ...]
    registers: int = 64


_METHODS: Final = {
    EXACT: _Method("Exact<{shape}, {row_bytes}, {unit}>", ("exact.cuh",)),
    "fp8": _Method("Fp8<{element}, {shape}>", ("fp8.cuh",)),
    "int8": _Method("Int8<{element}, {shape}>", ("int8.cuh",)),
    "int4": _Method("Int4<{element}, {shape}>", ("int4.cuh",)),
    "kivi4k": _Method("KiviKeys<{element}, {shape}, 4>", ("kivi_keys.cuh",)),
    "kivi4v": _Method("Int4<{element}, {shape}>", ("int4.cuh",)),
    "kivi2k": _Method("KiviKeys<{element}, {shape}, 2>", ("kivi_keys.cuh",), 80),
    "kivi2v": _Method("Kivi2Values<{element}, {shape}>", ("kivi2_values.cuh",)),
    "turbo4": _Method("Turbo<{element}, {shape}, 4>", ("turbo.cuh",), 128),
    "turbo3": _Method("Turbo<{element}, {shape}, 3>", ("turbo.cuh",), 128),
    "turbo2": _Method("Turbo<{element}, {shape}, 2>", ("turbo.cuh",), 128),
    "centred4k": _Method("CentredKeys<{element}, {shape}, 4>", ("turbo.cuh", "columns.cuh", "centred.cuh"), 128),
    "centred3k": _Method("CentredKeys<{element}, {shape}, 3>", ("turbo.cuh", "columns.cuh", "centred.cuh"), 128),
    "centred2k": _Method("CentredKeys<{element}, {shape}, 2>", ("turbo.cuh", "columns.cuh", "centred.cuh"), 128),
}
_CENTRED: Final = ("centred4k", "centred3k", "centred2k")


@dataclass(frozen=True, slots=True)
class SectionPlan:
    """How the planes of one role are encoded.

    Attributes:
        planes: of the role.
        method: name of the method.
        offset: bytes from a payload's start.
        strides: bytes from layer to layer, head to head and token to token in the payload, of planes that are stored as
            they are; else zeros.
        unit: bytes that addresses, strides and offsets of such planes are multiples of.
    """

    planes: Planes
    method: str
    offset: int
    strides: tuple[int, int, int]
    unit: int


@dataclass(frozen=True, slots=True)
class Program:
    """Source of ``kv_encode`` and ``kv_decode``, and how to launch them.

    Attributes:
        source: CUDA C++ without includes.
        threads: of a block.
        tiles: of a plane, by section; each is a block of the grid.
        encode_shared_bytes: dynamic shared memory of a block that encodes.
        decode_shared_bytes: of one that decodes.
    """

    source: str
    threads: int
    tiles: tuple[int, int]
    encode_shared_bytes: int
    decode_shared_bytes: int

    def shared_bytes(self, kernel: str) -> int:
        """Dynamic shared memory of a kernel by its name."""
        return self.encode_shared_bytes if kernel == "kv_encode" else self.decode_shared_bytes


def program_for(codec: Codec, kv: PagedKV, payload_alignment: int) -> tuple[Program, tuple[SectionPlan, SectionPlan]]:
    """The program that encodes and decodes blocks of these pages.

    Args:
        codec: to use.
        kv: the pages.
        payload_alignment: bytes that the addresses of all payloads are multiples of.

    Raises:
        ValueError: the codec cannot store the layout, or the kernels cannot; says why, and what would do.
    """
    layout = kv.layout
    codec.check(layout)
    if codec.section_bytes(layout) is None:
        raise ValueError(f"codec {codec.name} has no CUDA kernels: use kvstore_kernels.cpu, or codec raw")
    plans = _section_plans(codec, kv, payload_alignment)
    if any(plan.method not in _METHODS for plan in plans):
        raise ValueError(f"codec {codec.name} has no CUDA kernels: use kvstore_kernels.cpu, or codec raw")
    for plan, paged in zip(plans, kv.sections, strict=True):
        if max(map(abs, (paged.page_stride, paged.token_stride, paged.head_stride))) > _MAX_STRIDE:
            raise ValueError(f"the CUDA kernels take strides of at most {_MAX_STRIDE} bytes: use kvstore_kernels.cpu")
        if paged.element_stride != layout.element_bytes:
            raise ValueError(
                f"the CUDA kernels need the channels of a token side by side, got {paged.element_stride} bytes from "
                f"one to the next of {layout.element_bytes}: use kvstore_kernels.cpu"
            )
        if plan.method != EXACT:
            _check_planes(codec, plan.planes, paged)
    align = min(16, payload_alignment, *(_alignment(plan.offset) for plan in plans))
    if any(plan.method != EXACT for plan in plans) and align < 2:
        raise ValueError("payloads must have even addresses")
    program = _program(
        tuple((plan.method, plan.planes.dim, plan.planes.dim * layout.element_bytes, plan.unit) for plan in plans),
        layout.dtype,
        layout.block_tokens,
        kv.page_tokens,
        16 if align == 16 else 2,
    )
    if max(program.encode_shared_bytes, program.decode_shared_bytes) > _MAX_SHARED_BYTES:
        raise ValueError(
            f"codec {codec.name} with {layout.planes[0].dim} channels of {layout.dtype} needs more shared memory than "
            "GPUs have: use kvstore_kernels.cpu, or codec raw"
        )
    return program, plans


def _alignment(number: int) -> int:
    """The greatest power of two up to 16 that divides a number."""
    return math.gcd(number, 16)


def _check_planes(codec: Codec, planes: Planes, paged: PagedPlanes) -> None:
    if planes.dim % _SEGMENT:
        raise ValueError(
            f"the CUDA kernels of codec {codec.name} need a {planes.role} dimension that is a multiple of {_SEGMENT}, "
            f"got {planes.dim}: use kvstore_kernels.cpu, or codec raw"
        )
    if planes.dim > _MAX_THREADS:
        raise ValueError(
            f"the CUDA kernels of codec {codec.name} take at most {_MAX_THREADS} channels a head, got {planes.dim}: "
            "use kvstore_kernels.cpu, or codec raw"
        )
    numbers = (*paged.bases.tolist(), paged.page_stride, paged.token_stride, paged.head_stride)
    if any(number % 16 for number in numbers):
        raise ValueError(
            f"the CUDA kernels of codec {codec.name} need addresses and strides of pages, tokens and heads that are "
            f"multiples of 16 bytes, got strides of {numbers[-3:]}: use kvstore_kernels.cpu, or codec raw"
        )


def _section_plans(codec: Codec, kv: PagedKV, payload_alignment: int) -> tuple[SectionPlan, SectionPlan]:
    layout = kv.layout
    lengths = codec.section_bytes(layout)
    assert lengths is not None
    whole = _whole_block(layout)
    plans = []
    offset = 0
    for number, (planes, paged) in enumerate(zip(layout.planes, kv.sections, strict=True)):
        row_bytes = planes.dim * layout.element_bytes
        method, strides, at = EXACT, (layout.block_tokens * row_bytes, 0, row_bytes), offset
        if codec.whole:
            at, strides = whole[number]
        else:
            method = codec.plane_codec(planes)
            offset += lengths[number]
        unit = 16
        if method == EXACT:
            numbers = (*paged.bases.tolist(), paged.page_stride, paged.token_stride, paged.head_stride, at, *strides)
            unit = math.gcd(16, row_bytes, payload_alignment, *numbers)
        else:
            strides = (0, 0, 0)
        plans.append(SectionPlan(planes, method, at, strides, unit))
    first, second = plans
    return first, second


def _whole_block(layout: Layout) -> tuple[tuple[int, tuple[int, int, int]], ...]:
    """Of each role, where its planes start in a block of the layout's own order, and its strides there."""
    layer_bytes = layout.block_bytes // layout.num_layers
    token_bytes = layer_bytes // layout.block_tokens
    first, second = (planes.num_heads * planes.dim * layout.element_bytes for planes in layout.planes)
    heads = tuple(planes.dim * layout.element_bytes for planes in layout.planes)
    if layout.planes[0].role == "latent":
        return (0, (layer_bytes, heads[0], token_bytes)), (first, (layer_bytes, heads[1], token_bytes))
    half = layer_bytes // 2
    return (0, (layer_bytes, heads[0], first)), (half, (layer_bytes, heads[1], second))


@functools.lru_cache(maxsize=64)
def _program(
    sections: tuple[tuple[str, int, int, int], ...], dtype: str, tokens: int, page_tokens: int, align: int
) -> Program:
    element_bytes = sections[0][2] // sections[0][1]
    wanted = [_threads(method, dim, tokens) for method, dim, *_ in sections]
    threads = next(filter(None, wanted), min(_USUAL_THREADS, 32 * -(-tokens * sections[0][1] // (32 * _SEGMENT))))
    tiles, encode_shared, decode_shared, types, files = [], 0, 0, [], dict[str, None]()
    for number, (method, dim, row_bytes, unit) in enumerate(sections):
        shape = f"Shape<{dim}, {tokens}, {page_tokens}, {align}, {threads}>"
        template = _METHODS[method].template.format(
            element=_ELEMENTS.get(dtype), shape=shape, row_bytes=row_bytes, unit=unit
        )
        types.append(f"using {('First', 'Second')[number]} = {template};")
        files.update(dict.fromkeys(_METHODS[method].sources))
        if method == EXACT:
            tiles.append(-(-tokens * (row_bytes // unit) // (threads * _COPIED_UNITS)))
            continue
        tiles.append(tokens // group_tokens(tokens) if method in _CENTRED else -(-tokens * dim // (threads * _SEGMENT)))
        encode, decode = _shared_bytes(method, dim, tokens, threads, element_bytes)
        encode_shared, decode_shared = max(encode_shared, encode), max(decode_shared, decode)
    registers = max(_METHODS[method].registers for method, *_ in sections)
    # Elements of four bytes take twice as many, and so do addresses that do not fold.
    if any(method != EXACT for method, *_ in sections) and (
        element_bytes == 4 or align != 16 or 32 % (sections[0][1] // _SEGMENT)
    ):
        registers *= 2
    blocks = max(1, 65536 // min(registers, 255) // threads)
    parts = [turbo_tables()] if "turbo.cuh" in files else []
    parts += [_source(name) for name in ("primitives.cuh", "arithmetic.cuh", "tile.cuh", *files)]
    parts += [*types, f"constexpr u32 FIRST_TILES = {tiles[0]}, SECOND_TILES = {tiles[1]};"]
    parts += [f"constexpr int THREADS = {threads}, BLOCKS = {blocks};", _source("kernels.cuh")]
    return Program("\n".join(parts), threads, (tiles[0], tiles[1]), encode_shared, decode_shared)


def _threads(method: str, dim: int, tokens: int) -> int | None:
    """Threads of a block that the method needs, 64 elements each; None where any number of warps serves."""
    segments = -(-tokens * dim // _SEGMENT)
    if method in _CENTRED:
        # A group, or as much of it as there are registers for, in whole tokens.
        threads = group_tokens(tokens) * dim // _SEGMENT
        while threads > _MOST_CENTRED_THREADS and threads // 2 % math.lcm(32, dim // _SEGMENT) == 0:
            threads //= 2
        return threads
    if method in ("kivi4k", "kivi2k"):
        return dim if tokens % 64 == 0 else dim // 2
    if method == "fp8":
        return dim if tokens >= 64 else 32 * -(-segments // 32)
    if method == "int8":
        whole_tokens = math.lcm(32, dim // _SEGMENT)
        most = max(whole_tokens, _USUAL_THREADS // whole_tokens * whole_tokens)
        return min(most, whole_tokens * -(-segments // whole_tokens))
    return None


def _shared_bytes(method: str, dim: int, tokens: int, threads: int, element_bytes: int) -> tuple[int, int]:
    """Dynamic shared memory of encoding and decoding, as the sources lay it out."""
    exchange = threads * _SEGMENT * element_bytes
    if method in ("kivi4k", "kivi2k"):
        groups = threads * _SEGMENT // dim // (64 if method == "kivi4k" else 32)
        return threads * _SEGMENT // 8 * 2 * element_bytes + groups * 16 * (dim // 2 + 16), 0
    if method in _CENTRED:
        parameters = 2 * 288 * (dim // _SEGMENT)
        return threads * _SEGMENT * 4 + parameters + 4 * (dim // _SEGMENT), exchange + parameters
    if method == "fp8":
        return threads // 32 * 4, 0
    if method == "int8":
        return threads * 8 * element_bytes + 4 * (threads // (dim // _SEGMENT)), 0
    return exchange, exchange


@functools.cache
def _source(name: str) -> str:
    text = (resources.files(__package__) / "sources" / name).read_text(encoding="ascii")
    return f'#line 1 "{name}"\n{text}'
