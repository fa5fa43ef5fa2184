"""How measured quality looks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.quality.measured import CodecQuality, Estimate, QualityReport

__all__ = ["table_of"]

_GOOD, _FAIR = 1.005, 1.02
_RAW_BITS = 16


def table_of(report: QualityReport) -> RenderableType:
    """All codecs, those with more bits first, and what the columns mean."""
    rows = sorted(report.codecs, key=lambda row: -row.bits)
    parts: list[RenderableType] = [_tasks(rows), "", _errors(rows)]
    if any(row.outlier_recall is not None for row in rows):
        parts += ["", _outliers(rows)]
    return Group(*parts, "", _legend(report))


def _tasks(rows: Sequence[CodecQuality]) -> RenderableType:
    made = render.table("Quality of codecs", ["codec", "bits", "ratio", "natural", "KL", "recall", "KL"])
    for row in rows:
        made.add_row(
            row.codec,
            f"{row.bits:.3f}",
            f"{_RAW_BITS / row.bits:.2f}",
            _cell(row, row.natural),
            _thousandths(row.natural_divergence),
            _cell(row, row.recall),
            _thousandths(row.recall_divergence),
        )
    return made


def _errors(rows: Sequence[CodecQuality]) -> RenderableType:
    made = render.table("Errors", ["codec", "keys", "values", "attention"])
    for row in rows:
        made.add_row(row.codec, *(_error(value) for value in (row.key_error, row.value_error, row.attention_error)))
    return made


def _outliers(rows: Sequence[CodecQuality]) -> RenderableType:
    made = render.table("With outliers", ["codec", "bits", "natural", "recall", "KL"])
    for row in rows:
        made.add_row(
            row.codec,
            f"{row.bits:.3f}",
            _cell(row, row.outlier_natural),
            _cell(row, row.outlier_recall),
            _thousandths(row.outlier_recall_divergence),
        )
    return made


def _cell(row: CodecQuality, value: Estimate | None) -> Text:
    """A perplexity ratio with the standard error of its last digits: ``1.0117(19)``."""
    if value is None:
        return Text(render.NOTHING)
    if row.exact:
        return Text("exact", style="green")
    style = "green" if value.mean <= _GOOD else "yellow" if value.mean <= _FAIR else "red"
    return Text(f"{value.mean:.4f}({round(value.se * 1e4):02d})", style=style)


def _thousandths(value: Estimate | None) -> str:
    return render.NOTHING if value is None else f"{1000 * value.mean:.2f}"


def _error(value: float) -> str:
    return render.percent(value) if value else render.NOTHING


def _legend(report: QualityReport) -> RenderableType:
    sequences = max((row.sequences for row in report.codecs), default=0)
    header, padding = (
        max((getattr(row, field) for row in report.codecs), default=0.0) for field in ("header_bits", "padding_bits")
    )
    return render.facts(
        "",
        [
            (
                "bits",
                f"a value, all metadata of the codec; headers add {header:.3f}, padding of slots up to {padding:.3f}",
            ),
            (
                "natural, recall",
                "perplexity over that on the unquantised cache: mean over sequences, (standard error)",
            ),
            ("KL", "divergence of the next-token distributions from the unquantised ones, in 0.001 nats a token"),
            ("outliers", "the same model with key channels that stand out; it computes the same"),
            ("errors", "norm of the error over norm: keys, values, output of attention"),
            (
                "model",
                f"2.6 million parameters, {sequences} sequences of 384 + 128 tokens, unquantised perplexity "
                f"{report.natural_perplexity:.2f} natural, {report.recall_perplexity:.2f} recall",
            ),
        ],
    )
