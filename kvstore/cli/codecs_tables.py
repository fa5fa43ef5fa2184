"""How ``kvstore codecs`` looks: all codecs in one table, or one of them in detail."""

from __future__ import annotations

import textwrap
from importlib import import_module
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.backends import cuda_problem
from kvstore.cli.codecs_report import CodecReport, CodecsReport, family_of
from kvstore.cli.quality.measured import CodecQuality, Estimate
from kvstore_kernels.codecs import Codec
from kvstore_kernels.layout import ELEMENT_BYTES, Layout

__all__ = ["codec_detail", "codecs_table"]

_RULES: Final = (
    ("head", "groups of 64 tokens of a head"),
    ("token", "groups of channels of one token"),
    ("channel", "keys in groups of tokens of one channel, values as with token"),
    ("rotated", "vectors after a Hadamard transform"),
    ("centred", "rotated, keys less their mean"),
)
_WIDTH: Final = 78
_MEASURED_DTYPE: Final = "bfloat16"
"""Of the KV of the model that quality is measured with."""
_QUALITY: Final = (
    "perplexity of recalled text over that on the unquantised cache, (standard error); 'kvstore quality' measures it"
)
_NO_QUALITY: Final = "nothing measured comes with this version; 'kvstore quality' measures it"


def codecs_table(report: CodecsReport) -> RenderableType:
    """All codecs in one table of at most 80 columns, and what it says."""
    columns: list[str | render.Column] = ["codec", "bits", "ratio", render.text_column("rule"), "fidelity", "quality"]
    made = render.table("Codecs", [*columns, render.text_column("cpu"), render.text_column("cuda")])
    for row in report.codecs:
        bits = _bits(row, report)
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
    documentation = import_module(f"kvstore_kernels.codecs.{family_of(codec)}").__doc__ or ""
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
    bits = _bits(row, report)
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


def _bits(row: CodecReport, report: CodecsReport) -> float | None:
    """Bits a value; where they depend on the data what was measured, of the dtype that it was measured of."""
    if row.bits_per_value is not None or row.problem is not None:
        return row.bits_per_value
    return None if row.quality is None or report.dtype != _MEASURED_DTYPE else row.quality.bits


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
