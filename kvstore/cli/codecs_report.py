"""What ``kvstore codecs`` says of codecs: exact sizes, what was measured, and where they can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from kvstore.cli.backends import Backends, cuda_problem
from kvstore.cli.quality.measured import CodecQuality
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import Layout, Rule

__all__ = ["CodecReport", "CodecsReport", "RegionReport", "SectionReport", "codecs_report", "family_of"]

_FAMILIES: Final = {
    "raw": "exact",
    "lossless": "exact",
    "fp8": "head",
    "int8": "token",
    "int4": "token",
    "kivi": "channel",
    "turbo": "rotated",
    "centred": "centred",
}
"""What the numbers of a group have in common, by the module of ``kvstore_kernels.codecs``."""

_FAST_MULTIPLE: Final = 64
"""Channels: planes of a multiple of this have kernels of their own, others go through general ones."""


class RegionReport(msgspec.Struct, frozen=True, kw_only=True):
    """An array of a section: see ``kvstore_kernels.codecs.Region``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    region_bytes: int


class SectionReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A section of a record.

    Attributes:
        role: key, value, latent or rotary; ``block`` for the whole block.
        method: that encodes it.
        most_bytes: that it has; exactly so many where there are regions.
        regions: in order; absent where the codec takes the block as it is.
    """

    role: str
    method: str
    most_bytes: int
    regions: list[RegionReport] = []


class CodecReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One codec, for blocks of one layout.

    Attributes:
        codec: its name.
        id: in record headers.
        digest: of its parameters, hex.
        fidelity: 255 exact, else four times the signal-to-noise ratio in dB.
        rule: what the numbers of a group have in common.
        bits_per_value: with all parameters; absent where it depends on the data, or the layout cannot be stored.
        block_bytes: unquantised.
        sections: absent where the layout cannot be stored.
        problem: why the layout cannot be stored.
        quality: measured with ``kvstore quality``; absent where it was not.
        cpu: how it runs here: "fast", "slow" (for planes of unusual width), "no".
        cuda: whether it runs here: "yes" or "no".
    """

    codec: str
    id: int
    digest: str
    fidelity: int
    rule: str
    block_bytes: int
    cpu: str
    cuda: str
    bits_per_value: float | None = None
    sections: list[SectionReport] | None = None
    problem: str | None = None
    quality: CodecQuality | None = None


class CodecsReport(msgspec.Struct, frozen=True, kw_only=True):
    """All codecs that were asked for.

    Attributes:
        model: names the layout's model.
        layout: canonical text.
        dtype, block_tokens: of the layout.
        backends: of this machine.
        codecs: one for each.
    """

    model: str
    layout: str
    dtype: str
    block_tokens: int
    backends: Backends
    codecs: list[CodecReport]


def codecs_report(
    model: str,
    layout: Layout,
    codecs: Sequence[Codec],
    quality: Mapping[str, CodecQuality],
    backends: Backends,
) -> CodecsReport:
    """Put together what is known."""
    return CodecsReport(
        model=model,
        layout=layout.text,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        backends=backends,
        codecs=[_codec_report(codec, layout, quality.get(codec.name), backends) for codec in codecs],
    )


def _codec_report(codec: Codec, layout: Layout, quality: CodecQuality | None, backends: Backends) -> CodecReport:
    sections, bits, problem = None, None, None
    try:
        codec.check(layout)
    except ValueError as wrong:
        problem = str(wrong)
    else:
        bits = codec.bits_per_value(layout)
        sections = _sections(codec, layout)
    return CodecReport(
        codec=codec.name,
        id=codec.id,
        digest=codec.digest.hex(),
        fidelity=codec.fidelity,
        rule=_FAMILIES[family_of(codec)],
        bits_per_value=bits,
        block_bytes=layout.block_bytes,
        sections=sections,
        problem=problem,
        quality=quality,
        cpu=_speed(layout) if backends.cpu.available else "no",
        cuda="yes" if backends.cuda.available and not problem and not cuda_problem(codec, layout) else "no",
    )


def _speed(layout: Layout) -> str:
    lossy = [planes for planes in layout.planes if planes.rule != Rule.EXACT]
    return "fast" if all(planes.dim % _FAST_MULTIPLE == 0 for planes in lossy) else "slow"


def _sections(codec: Codec, layout: Layout) -> list[SectionReport]:
    most_bytes = codec.max_section_bytes(layout)
    if codec.whole:
        return [SectionReport(role="block", method=codec.name, most_bytes=most_bytes[0])]
    sections = []
    for planes, most in zip(layout.planes, most_bytes, strict=True):
        regions = [
            RegionReport(name=region.name, dtype=region.dtype, shape=region.shape, region_bytes=region.region_bytes)
            for region in codec.regions(planes, layout.block_tokens)
        ]
        sections.append(
            SectionReport(role=planes.role, method=codec.plane_codec(planes), most_bytes=most, regions=regions)
        )
    return sections


def family_of(codec: Codec) -> str:
    """The module of ``kvstore_kernels.codecs`` that a codec's method is in."""
    return next(family for family in _FAMILIES if codec.name.startswith(family))
