"""``kvstore quality``: codecs through the small model, as a table, as JSON, as a plot.

Covers: the command line, and what it needs. Does not cover: how quality is measured, see
``kvstore.cli.quality.evaluation``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.errors import InvalidArgument, KVStoreError

if TYPE_CHECKING:
    import torch

    from kvstore.cli.quality.evaluation import RoundTrip
    from kvstore.cli.quality.measured import QualityReport
    from kvstore_kernels.codecs import Codec
    from kvstore_kernels.layout import KVLayout

    Phase = Callable[[str], AbstractContextManager[None]]

__all__ = ["codec_round_trip", "measure_codecs", "quality", "reference_round_trip"]

_SEQUENCES: Final = 96
_MOST_SEQUENCES: Final = 382


def quality(
    codec: Annotated[
        list[str] | None, typer.Option(help="Codec to measure; repeat for several. (default: all)", metavar="NAME")
    ] = None,
    sequences: Annotated[
        int, typer.Option(help="Sequences to average over.", min=2, max=_MOST_SEQUENCES, metavar="N")
    ] = _SEQUENCES,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Also with key channels that stand out, as in large models.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of quality per bit: FILE.svg or FILE.png.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what codecs cost a small trained model that goes on from a cache which went through them.

    Shows the perplexity of what follows over that on the unquantised cache (1 is no loss), for natural text and for
    recall of text far back, beside the bits a value. Takes some seconds a codec.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.plot_files import check_plot
    from kvstore.cli.quality.plot import draw_plot
    from kvstore.cli.quality.report import table_of
    from kvstore_kernels.codecs import CODECS

    if plot is not None:
        check_plot(plot, "quality")
        if codec and all(name in CODECS and CODECS[name].exact for name in codec):
            raise InvalidArgument("--plot: only lossy codecs are drawn; add one with --codec")
    notes = render.console(stderr=True)

    @contextlib.contextmanager
    def phase(text: str) -> Iterator[None]:
        with notes.status(text, refresh_per_second=4) if notes.is_terminal else contextlib.nullcontext():
            yield

    report = measure_codecs(codec, sequences=sequences, outliers=outliers, phase=phase)
    if plot is not None:
        draw_plot(report, plot)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())
    else:
        render.console().print(table_of(report))


def measure_codecs(names: Sequence[str] | None, *, sequences: int, outliers: bool, phase: Phase) -> QualityReport:
    """Measure codecs one after the other.

    Args:
        names: of codecs; all of them where there are none.
        sequences: to average over.
        outliers: also use the model with channels that stand out.
        phase: entered for each phase with what goes on.

    Raises:
        InvalidArgument: there is no such codec.
        KVStoreError: torch is missing.
    """
    if find_spec("torch") is None:
        raise KVStoreError("measuring quality needs torch: pip install 'kvstored[quality]'")
    import torch

    from kvstore.cli.quality.evaluation import Evaluation, measure
    from kvstore.cli.quality.measured import QualityReport
    from kvstore_kernels.codecs import CODECS, get_codec

    # Tensors this small gain nothing from threads that wait for each other, least of all where others need the cores.
    torch.set_num_threads(1)
    try:
        codecs = [get_codec(name) for name in dict.fromkeys(names or CODECS)]
    except ValueError as wrong:
        raise InvalidArgument(str(wrong)) from None
    with phase("the model on its unquantised cache"):
        usual = Evaluation(sequences)
        rescaled = Evaluation(sequences, outliers=True) if outliers else None
    rows = []
    for codec in codecs:
        with phase(f"{codec.name}: {sequences} sequences"):
            rows.append(measure(codec.name, reference_round_trip(codec.name), usual, rescaled))
    return QualityReport(
        date=datetime.now(tz=UTC).date().isoformat(),
        natural_perplexity=usual.perplexity("natural"),
        recall_perplexity=usual.perplexity("recall"),
        codecs=rows,
    )


def reference_round_trip(name: str) -> RoundTrip:
    """Blocks through the reference implementation of a codec, to which the fast ones are equal to the bit."""
    from kvstore_kernels.codecs import get_codec

    return codec_round_trip(get_codec(name))


def codec_round_trip(codec: Codec) -> RoundTrip:
    """Blocks through a codec."""

    def round_trip(block: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, Sequence[int]]:
        sections = codec.encode(block, layout).sections
        return codec.decode(sections, layout), [len(section) for section in sections]

    return round_trip
