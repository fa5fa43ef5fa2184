"""``kvstore bench``: measurements beside a named baseline in the same run. See ``benchmarks/README.md``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

__all__ = ["app", "bench_codecs", "bench_control", "bench_local", "bench_ssd", "bench_transcode"]

app: Final = typer.Typer(no_args_is_help=True, help="Measure the store beside a baseline in the same run.")

_CAPACITY_BYTES: Final = 64 << 20
_GRANT_BYTES: Final = 32 << 20
_IDLE_SECONDS: Final = 60.0


@app.callback()
def bench() -> None:
    """Measure the store beside a baseline in the same run."""


@app.command("control")
def bench_control(
    endpoint: Annotated[
        str | None, typer.Option(help="A running daemon; without it a private one is started.", metavar="ipc://PATH")
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="Also measure the cost of 16 idle clients.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds of the idle measurement (default 60); implies --idle.", min=1, max=86400, metavar="S"
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Turns of echo and daemon; a round is 200 exchanges of each kind.", min=1, max=1000)
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the control path beside a bare ZeroMQ echo.

    Round trips, a window of 32 requests, a match of 1,024 keys, and with --idle the CPU time of idle clients.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.bench.control import Samples, measure_control
    from kvstore.cli.bench.idle import measure_idle
    from kvstore.cli.bench.report import table_of
    from kvstore.cli.private_daemon import PrivateDaemon
    from kvstore_client import Client

    idle_seconds = seconds if seconds is not None else _IDLE_SECONDS if idle else None
    with contextlib.ExitStack() as stack:
        if endpoint is None:
            daemon = stack.enter_context(PrivateDaemon(capacity_bytes=_CAPACITY_BYTES, grant_bytes=_GRANT_BYTES))
            endpoint = daemon.endpoint
        with _progress(rounds) as on_round:
            report = measure_control(endpoint, Samples(rounds=rounds), on_round)
        if idle_seconds is not None:
            with Client(endpoint) as client:
                pid = client.stats().pid
            report.rows.append(measure_idle(endpoint, pid, idle_seconds))
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(table_of(report, "Control path"))


@app.command("local")
def bench_local(
    idle: Annotated[bool, typer.Option("--idle", help="Also measure the cost of 16 idle mapped clients.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds of the idle measurement (default 60); implies --idle.", min=1, max=86400, metavar="S"
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Turns of all sides; in a round each copies 128 MiB of each size.", min=1, max=1000)
    ] = 20,
    sizes: Annotated[
        str, typer.Option(help="Sizes of the blocks' data, with commas between.", metavar="SIZE,...")
    ] = "64KiB,256KiB,1MiB,4MiB",
    set_size: Annotated[
        str,
        typer.Option("--set", help="Bytes of stored blocks; below some caches' size nothing is cold.", metavar="SIZE"),
    ] = "512MiB",
    redis: Annotated[bool, typer.Option(help="Measure Redis beside it, where it is installed.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure reads and writes through mapped memory beside a plain copy of the same memory.

    Gets, views, puts and matches of a client of a daemon that is started for it: the benchmark writes into its memory.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.bench.idle import measure_idle
    from kvstore.cli.bench.local import Extent, local_daemon, measure_local
    from kvstore.cli.bench.local_table import local_table
    from kvstore.sizes import parse_size

    set_bytes = parse_size(set_size)
    extent = Extent(
        sizes_bytes=[parse_size(size) for size in sizes.split(",")],
        rounds=rounds,
        set_bytes=set_bytes,
        buffer_bytes=set_bytes // 2,
        round_bytes=set_bytes // 4,
        with_redis=redis,
    )
    idle_seconds = seconds if seconds is not None else _IDLE_SECONDS if idle else None
    with local_daemon(extent) as daemon:
        with _progress(extent.steps) as on_round:
            report = measure_local(daemon, extent, on_round)
        if idle_seconds is not None:
            report.rows.append(measure_idle(daemon.endpoint, daemon.pid, idle_seconds, kind="mapped"))
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(local_table(report))


@app.command("codecs")
def bench_codecs(
    codec: Annotated[
        list[str] | None, typer.Option(help="Codec to measure; repeat for several. (default: all)", metavar="NAME")
    ] = None,
    mib: Annotated[
        int, typer.Option(help="MiB of KV; it takes four times as much memory.", min=1, max=1 << 20, metavar="N")
    ] = 256,
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas between.", metavar="N,...")] = "1,2",
    rounds: Annotated[
        int, typer.Option(help="Calls of each side; a call works on 32 MiB.", min=1, max=10_000, metavar="N")
    ] = 20,
    dtype: Annotated[str, typer.Option(help="Of the KV: bfloat16, float16, float32.", metavar="NAME")] = "bfloat16",
    store: Annotated[bool, typer.Option(help="Also measure 64 blocks through a daemon of its own, with kivi4.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the CPU codecs beside a plain copy of the same KV.

    Encoding and decoding, of KV in one tensor and in an engine's pages, with each number of threads.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.bench.codecs import CodecExtent, measure_codecs, thread_counts
    from kvstore.cli.bench.codecs_table import codecs_table
    from kvstore_kernels.codecs import CODECS

    extent = CodecExtent(
        total_bytes=mib << 20,
        codecs=tuple(dict.fromkeys(codec or CODECS)),
        threads=thread_counts(threads),
        rounds=rounds,
        dtype=dtype,
        with_store=store,
    )
    with _progress(extent.steps) as on_round:
        report = measure_codecs(extent, on_round)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(codecs_table(report))


@app.command("transcode")
def bench_transcode(
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Pair to measure, such as 'raw>lossless-zstd'; repeat for several. (default: all)"),
    ] = None,
    mib: Annotated[
        int, typer.Option(help="MiB of KV; it takes about six times as much memory.", min=1, max=1 << 20, metavar="N")
    ] = 128,
    rounds: Annotated[
        int, typer.Option(help="In each, a quarter of the records goes each way.", min=1, max=10_000, metavar="N")
    ] = 12,
    dtype: Annotated[str, typer.Option(help="Of the KV: bfloat16, float16, float32.", metavar="NAME")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure transcoding of records for a lower tier, and restoring them, beside a plain copy."""
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.bench.transcode import TranscodeExtent, measure_transcoding
    from kvstore.cli.bench.transcode_table import transcode_table
    from kvstore.transcode.pairs import PAIRS

    extent = TranscodeExtent(
        total_bytes=mib << 20, pairs=tuple(dict.fromkeys(pair or PAIRS)), rounds=rounds, dtype=dtype
    )
    with _progress(extent.steps) as on_round:
        report = measure_transcoding(extent, on_round)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(transcode_table(report))


@app.command("ssd")
def bench_ssd(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Where to measure; what is put there is removed.",
            metavar="DIR",
            show_default="where you are",
        ),
    ] = None,
    size: Annotated[
        str, typer.Option(help="Of fio's file, and of the SSD tier: twice as much has to be free.", metavar="SIZE")
    ] = "2GiB",
    mib: Annotated[
        int, typer.Option(help="MiB that each side writes, and reads, in a round.", min=1, max=1 << 20, metavar="N")
    ] = 256,
    rounds: Annotated[int, typer.Option(help="Turns of all.", min=1, max=1000, metavar="N")] = 9,
    kivi4: Annotated[bool, typer.Option(help="Also measure records of the codec kivi4.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the SSD tier beside fio in the same directory, and reads of DRAM meanwhile.

    Demotion with group commit, promotion, and gets through mapped memory while both go on.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.bench.ssd import SsdExtent, measure_ssd
    from kvstore.cli.bench.ssd_table import ssd_table
    from kvstore.sizes import parse_size

    extent = SsdExtent(size_bytes=parse_size(size), round_bytes=mib << 20, rounds=rounds, with_codec=kivi4)
    with _progress(extent.steps) as on_round:
        report = measure_ssd(directory or Path.cwd(), extent, on_round)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(ssd_table(report))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr where that is a terminal; gives what to call after each round."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from kvstore.cli import render

    console = render.console(stderr=True)
    quiet = not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Drawn between rounds only: a refreshing thread would take the measured process's interpreter lock.
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=quiet) as bar:
        task = bar.add_task("rounds", total=total)

        def on_round() -> None:
            bar.advance(task)
            bar.refresh()

        yield on_round
