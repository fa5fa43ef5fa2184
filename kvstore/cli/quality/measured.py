"""The measured quality of codecs: what a measurement gives, and the results that are committed with the project.

Needs neither numpy nor torch. The committed file is what ``kvstore quality --outliers --json`` printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import msgspec

__all__ = ["CodecQuality", "Estimate", "QualityReport", "measured", "measured_report"]


class Estimate(msgspec.Struct, frozen=True):
    """A mean over sequences and its standard error."""

    mean: float
    se: float


class CodecQuality(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one codec costs: bits, and the quality of a model that goes on from what it decoded.

    Attributes:
        codec: its name.
        sequences: number of sequences that the estimates are over.
        bits: a value, of all sections, metadata included.
        header_bits, padding_bits: a value, of record headers and of the rest of a slot of whole pages; not in ``bits``.
        exact: every value came back bit for bit.
        natural, recall: perplexity over that on the unquantised cache, by task.
        natural_divergence, recall_divergence: Kullback-Leibler divergence of the model's next-token distributions from
            those on the unquantised cache, in nats a token, by task.
        key_error, value_error: norm of the error over norm, of all keys and all values.
        attention_error: the same of what attention gives, mean over layers and sequences.
        outlier_natural, outlier_recall, outlier_recall_divergence: the same of the model with channels that stand out.
    """

    codec: str
    sequences: int
    bits: float
    header_bits: float
    padding_bits: float
    exact: bool
    natural: Estimate
    recall: Estimate
    natural_divergence: Estimate
    recall_divergence: Estimate
    key_error: float
    value_error: float
    attention_error: float
    outlier_natural: Estimate | None = None
    outlier_recall: Estimate | None = None
    outlier_recall_divergence: Estimate | None = None


class QualityReport(msgspec.Struct, frozen=True, kw_only=True):
    """All codecs of one run.

    Attributes:
        date: of the run, as YYYY-MM-DD.
        natural_perplexity, recall_perplexity: on the unquantised cache, by task.
        codecs: in the order measured.
    """

    date: str
    natural_perplexity: float
    recall_perplexity: float
    codecs: list[CodecQuality]


@cache
def measured_report() -> QualityReport:
    """The committed results."""
    return msgspec.json.decode(files(__package__).joinpath("measured.json").read_bytes(), type=QualityReport)


def measured() -> Mapping[str, CodecQuality]:
    """The committed results by name of the codec; a codec that was not measured is absent."""
    return {row.codec: row for row in measured_report().codecs}
