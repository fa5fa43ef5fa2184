"""``kvstore tune``: a trace against policies, capacities, codecs and tiers, and what follows from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.errors import InvalidArgument
from kvstore.sizes import parse_size

if TYPE_CHECKING:
    from kvstore.cli.tune.options import Capacity
    from kvstore.cli.tune.sizes import BlockSizes
    from kvstore.simulator.requests import Trace

__all__ = ["tune"]

_MODEL: Final = "llama-3.1-70b"
_PREFILL_TOKENS_PER_S: Final = 8000.0
_DRAM_GB_PER_S: Final = 25.0
_SSD_GB_PER_S: Final = 6.0


def tune(
    trace: Annotated[
        Path, typer.Argument(help="A trace: Mooncake or Bailian jsonl, or what the daemon recorded.", metavar="TRACE")
    ],
    policies: Annotated[
        str | None,
        typer.Option(help="Eviction policies between commas; opt is the clairvoyant bound.", metavar="LIST"),
    ] = None,
    capacities: Annotated[
        str | None,
        typer.Option(help="DRAM to try: blocks (5000, 10k) or sizes (64GiB), between commas.", metavar="LIST"),
    ] = None,
    codecs: Annotated[str, typer.Option(help="Codecs to try in the same bytes.", metavar="LIST")] = "raw",
    ssd: Annotated[str, typer.Option(help="SSDs below DRAM to try; 0 is none.", metavar="LIST")] = "0",
    have: Annotated[
        str | None,
        typer.Option(
            help="DRAM that you have: what is recommended is for that. (default: as recorded)", metavar="SIZE"
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Simulate all blocks, not a sample of them.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Model that blocks are of, as for 'kvstore layout'. (default: as recorded, or {_MODEL})",
            metavar="MODEL",
        ),
    ] = None,
    block_bytes: Annotated[
        str | None, typer.Option(help="Instead: bytes of a block, not compressed.", metavar="SIZE")
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option(help="Tokens a block, a multiple of the trace's own.", min=1, metavar="N")
    ] = None,
    prefill_tokens_per_s: Annotated[
        float, typer.Option(help="What the engine computes in a second.", metavar="N")
    ] = _PREFILL_TOKENS_PER_S,
    dram_gb_per_s: Annotated[
        float, typer.Option(help="From DRAM to the engine, 10^9 bytes a second.", metavar="N")
    ] = _DRAM_GB_PER_S,
    ssd_gb_per_s: Annotated[
        float, typer.Option(help="From the SSD, 10^9 bytes a second.", metavar="N")
    ] = _SSD_GB_PER_S,
    decode_gb_per_s: Annotated[
        float | None,
        typer.Option(
            help="What codecs decode to, 10^9 bytes a second. (default: as measured on this CPU)", metavar="N"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N requests.", min=1, metavar="N")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a picture, too: .png, .svg or .pdf. Needs matplotlib.", metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report for browsers, too: one file of HTML.", metavar="FILE")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Have the running daemon use the recommended policy; says what it cannot.")
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option(help="The daemon's endpoint, for --apply.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that each call of the daemon may take, for --apply.", min=0.001, metavar="S")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate a trace with other policies, capacities, codecs and tiers, and recommend a configuration.

    Capacities in blocks are of uncompressed ones; a codec holds more of its own in the same bytes. Without --exact
    most simulations are of a sample of the blocks, and hit rates are off by some tenths of a point, at worst by one.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.plot_files import check_plot
    from kvstore.cli.tune.apply import applied, daemon_capacity
    from kvstore.cli.tune.html import check_html, write_html
    from kvstore.cli.tune.options import Capacity, parse_capacities, parse_codecs, parse_policies
    from kvstore.cli.tune.plot import draw_plot
    from kvstore.cli.tune.tables import tune_tables
    from kvstore.cli.tune.tuning import Asked, tuned
    from kvstore.simulator.trace_files import read_requests

    for option, value in (
        ("--prefill-tokens-per-s", prefill_tokens_per_s),
        ("--dram-gb-per-s", dram_gb_per_s),
        ("--ssd-gb-per-s", ssd_gb_per_s),
        ("--decode-gb-per-s", decode_gb_per_s),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InvalidArgument(f"{option}: a rate is a number above 0, got {value:g}")
    if model is not None and block_bytes is not None:
        raise InvalidArgument("--model and --block-bytes both say how large blocks are; give one of them")
    if plot is not None:
        check_plot(plot, "plot")
    if html is not None:
        check_html(html)
    names = parse_codecs(codecs)
    asked = Asked(
        policies=None if policies is None else parse_policies(policies),
        capacities=None if capacities is None else parse_capacities(capacities),
        codecs=names,
        ssd=parse_capacities(ssd, "--ssd", zero=True),
        have=None if have is None else _one(parse_capacities(have, "--have")),
        exact=exact,
        prefill_tokens_per_s=prefill_tokens_per_s,
        dram_gb_per_s=dram_gb_per_s,
        ssd_gb_per_s=ssd_gb_per_s,
        decode_gb_per_s=_decoding(names, decode_gb_per_s),
    )
    if apply:
        # Before anything is simulated: a daemon that is not there is said at once.
        capacity_bytes = daemon_capacity(endpoint, timeout)
        if asked.have is None:
            asked = replace(asked, have=Capacity(size_bytes=capacity_bytes))
    with _progress() as on_progress:
        read = read_requests(trace, limit, block_tokens)
        sizes = _sizes(read, model, block_bytes, asked.codecs)
        report = tuned(read, sizes, asked, on_progress)
    if apply and report.recommendation is not None:
        report = msgspec.structs.replace(report, applied=applied(report.recommendation, endpoint, timeout))
    if plot is not None:
        draw_plot(report, plot)
    if html is not None:
        write_html(report, html)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(tune_tables(report))


def _one(capacities: list[Capacity]) -> Capacity:
    if len(capacities) > 1:
        raise InvalidArgument("--have: give one capacity, that of your DRAM")
    return capacities[0]


def _decoding(codecs: Sequence[str], gb_per_s: float | None) -> dict[str, float]:
    """What codecs decode to; ``raw`` is loaded as it is."""
    from kvstore.cli.tune.sizes import RAW

    named = [codec for codec in codecs if codec != RAW]
    if gb_per_s is not None or not named:
        return {codec: gb_per_s for codec in named if gb_per_s is not None}
    from kvstore.cli.tune.decoding import measured_decoding

    return measured_decoding(named)


def _sizes(trace: Trace, model: str | None, block_bytes: str | None, codecs: Sequence[str]) -> BlockSizes:
    from kvstore.cli.codec_slots import WHAT_IF_CODEC
    from kvstore.cli.tune.sizes import given_sizes, model_sizes, recorded_sizes

    if block_bytes is not None:
        try:
            return given_sizes(parse_size(block_bytes), [*codecs, WHAT_IF_CODEC])
        except InvalidArgument as wrong:
            raise InvalidArgument(f"--block-bytes: {wrong}") from None
    if model is None and trace.slot_bytes:
        return recorded_sizes(trace.slot_bytes, trace.codec, [*codecs, WHAT_IF_CODEC])
    return model_sizes(model or _MODEL, trace.block_tokens, codecs, also=WHAT_IF_CODEC)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr where that is a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from kvstore.cli import render

    console = render.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading the trace", total=None)
        yield lambda what, done, of: progress.update(task, description=what, completed=done, total=of)
