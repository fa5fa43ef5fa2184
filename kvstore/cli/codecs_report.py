"""What ``kvstore codecs`` says of codecs: exact sizes, what was measured, where they can run; and how it is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.backends import Backends, cuda_problem
from kvstore.cli.quality.measured import CodecQuality, Estimate
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import ELEMENT_BYTES, Layout, Rule

__all__ = [
    "CodecReport",
    "CodecsReport",
    "RegionReport",
    "SectionReport",
    "codec_detail",
    "codecs_report",
    "codecs_table",
]

_FAMILIES: Final = {
    "raw": "exact",
    "lossless": "exact",
    "fp8": "head",
    "int8": "token",
    "int4": "token",
    "kivi": "channel",
    "turbo": "rotated",
}
"""What the numbers of a group have in common, by the module of ``kvstore_kernels.codecs``."""

_RULES: Final = (
    ("head", "groups of 64 tokens of a head"),
    ("token", "groups of channels of one token"),
    ("channel", "keys in groups of tokens of one channel, values as with token"),
    ("rotated", "vectors after a Hadamard transform"),
)
_FAST_MULTIPLE: Final = 64
"""Channels: planes of a multiple of this have kernels of their own, others go through general ones."""

_WIDTH: Final = 78
_QUALITY: Final = (
    "perplexity of recalled text over that on the unquantised cache, (standard error); 'kvstore quality' measures it"
)
_NO_QUALITY: Final = "nothing measured comes with this version; 'kvstore quality' measures it"


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
        rule=_FAMILIES[_family(codec)],
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


def _family(codec: Codec) -> str:
    """The module of ``kvstore_kernels.codecs`` that a codec's method is in."""
    return next(family for family in _FAMILIES if codec.name.startswith(family))


# ------------------------------------------------------------------ for people


def codecs_table(report: CodecsReport) -> RenderableType:
    """All codecs in one table of at most 80 columns, and what it says."""
    columns: list[str | render.Column] = ["codec", "bits", "ratio", render.text_column("rule"), "fidelity", "quality"]
    made = render.table("Codecs", [*columns, render.text_column("cpu"), render.text_column("cuda")])
    for row in report.codecs:
        bits = _bits(row)
        made.add_row(
            row.codec,
            render.NOTHING if bits is None else f"{bits:.3f}",
            render.NOTHING if bits is None else f"{_raw_bits(row, report) / bits:.2f}",
            row.rule,
            str(row.fidelity),
            _quality_cell(row),
            row.cpu,
            row.cuda,
        )
    return Group(made, "", _meanings(report))


def codec_detail(report: CodecsReport, codec: Codec, layout: Layout) -> RenderableType:
    """One codec: what it does and by whom, its bytes, what was measured."""
    (row,) = report.codecs
    facts = [
        ("id", str(row.id)),
        ("fidelity", "exact" if codec.exact else f"{row.fidelity} of 255"),
        ("digest", row.digest),
    ]
    if codec.parameters:
        facts.append(("parameters", codec.parameters))
    unable = "" if row.problem is not None else cuda_problem(codec, layout)
    facts += [("cpu", report.backends.cpu.text), ("cuda", unable or report.backends.cuda.text)]
    parts: list[RenderableType] = [render.facts(f"Codec {row.codec}", facts), "", Text(_description(codec)), ""]
    parts.append(_regions(row, report))
    if row.quality is not None:
        parts += ["", _quality_facts(row.quality)]
    return Group(*parts)


def _description(codec: Codec) -> str:
    """The first paragraphs of its module, which name the source, without their markup."""
    documentation = import_module(f"kvstore_kernels.codecs.{_family(codec)}").__doc__ or ""
    paragraphs = documentation.replace("``", "").strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), _WIDTH) for paragraph in paragraphs)


def _regions(row: CodecReport, report: CodecsReport) -> RenderableType:
    title = f"A block of {report.model}, {report.block_tokens} tokens, {report.dtype}"
    if row.sections is None:
        return render.facts(title, [("cannot be stored", row.problem or "")])
    texts = [render.text_column(heading) for heading in ("section", "method", "region", "dtype", "shape")]
    made = render.table(title, [*texts, "bytes"])
    for section in row.sections:
        for region in section.regions:
            shape = " ".join(map(str, region.shape))
            made.add_row(
                section.role, section.method, region.name, region.dtype, shape, render.count(region.region_bytes)
            )
        if not section.regions:
            least = "" if row.bits_per_value else "at most "
            made.add_row(section.role, section.method, "", "", "", f"{least}{render.count(section.most_bytes)}")
    total = render.count(sum(section.most_bytes for section in row.sections))
    if len(row.sections) > 1:
        made.add_row("together", "", "", "", "", total)
    bits = _bits(row)
    known = "" if bits is None else f", {bits:.3f} bits a value, a ratio of {_raw_bits(row, report) / bits:.2f}"
    summary = Text(f"of {render.count(row.block_bytes)} bytes unquantised{known}", style="dim")
    return Group(made, "", summary)


def _quality_facts(quality: CodecQuality) -> RenderableType:
    rows = (
        ("natural", quality.natural),
        ("recall", quality.recall),
        ("outliers: natural", quality.outlier_natural),
        ("outliers: recall", quality.outlier_recall),
    )
    shown = [(name, _estimate(value, exact=quality.exact)) for name, value in rows if value is not None]
    errors = ", ".join(
        f"{name} {render.percent(value)}"
        for name, value in (
            ("keys", quality.key_error),
            ("values", quality.value_error),
            ("attention", quality.attention_error),
        )
    )
    divergence = (
        f"{quality.natural_divergence.mean:.4f} natural, {quality.recall_divergence.mean:.4f} recall, nats a token"
    )
    return render.facts(
        "Measured: perplexity over that on the unquantised cache",
        [*shown, ("divergence", divergence), ("errors", errors)],
    )


def _estimate(value: Estimate, *, exact: bool) -> str:
    """A mean with the standard error of its last digits: ``1.0117(19)``."""
    return "exact" if exact else f"{value.mean:.4f}({round(value.se * 1e4):02d})"


def _quality_cell(row: CodecReport) -> str:
    return render.NOTHING if row.quality is None else _estimate(row.quality.recall, exact=row.quality.exact)


def _bits(row: CodecReport) -> float | None:
    """Bits a value; of a codec whose size depends on the data what was measured."""
    if row.bits_per_value is not None or row.problem is not None:
        return row.bits_per_value
    return None if row.quality is None else row.quality.bits


def _raw_bits(row: CodecReport, report: CodecsReport) -> int:
    return 8 * ELEMENT_BYTES[report.dtype]


def _meanings(report: CodecsReport) -> RenderableType:
    shown = {row.rule for row in report.codecs}
    measured = [row.quality for row in report.codecs if row.quality is not None]
    meanings = [
        (
            "bits",
            f"a value, with all parameters: {report.model}, {report.dtype}, blocks of {report.block_tokens} tokens",
        )
    ]
    varying = [row.codec for row in report.codecs if row.bits_per_value is None and row.problem is None]
    if varying:
        meanings.append(("", f"{', '.join(varying)}: as measured, the data decides"))
    rules = [f"{rule}: {meaning}" for rule, meaning in _RULES if rule in shown]
    meanings += [("" if index else "rule", text) for index, text in enumerate(rules)]
    meanings.append(("fidelity", "255 exact, else four times the signal-to-noise ratio in dB"))
    meanings.append(("quality", _QUALITY if measured else _NO_QUALITY))
    meanings += [("cpu", report.backends.cpu.text), ("cuda", report.backends.cuda.text)]
    meanings += [(row.codec, row.problem) for row in report.codecs if row.problem is not None]
    return render.facts("", meanings)
