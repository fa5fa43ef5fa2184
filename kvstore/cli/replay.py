"""``kvstore replay``: a recorded trace against a live daemon, with every byte of every hit checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.errors import InvalidArgument
from kvstore.sizes import parse_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.cli.private_daemon import PrivateDaemon
    from kvstore.cli.replay_loop import ReplayReport

__all__ = ["private_daemon_for", "private_daemon_of", "replay"]

_BLOCK, _CODEC_BLOCK = "4KiB", "64KiB"
_DEFAULT_CAPACITY_BYTES: Final = 1 << 30
_SLAB_BYTES: Final = 4 << 20
"""About how large the slabs of a private daemon are; each is a whole number of slots."""

_GRANT_BYTES: Final = 64 << 20
_MAX_BLOCK_BYTES: Final = 64 << 20


def replay(
    trace: Annotated[
        Path, typer.Argument(help="A trace: Mooncake or Bailian jsonl, or what the daemon recorded.", metavar="TRACE")
    ],
    endpoint: Annotated[
        str | None, typer.Option(help="A running daemon; without it a private one is started.", metavar="ipc://PATH")
    ] = None,
    block_bytes: Annotated[
        str | None,
        typer.Option(
            help="Payload bytes a block, for example 4096 or 64KiB. (default: 4KiB; 64KiB with --codec)", metavar="SIZE"
        ),
    ] = None,
    capacity_blocks: Annotated[
        int | None, typer.Option(help="Blocks that the private daemon can hold.", min=1, metavar="N")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Replay with KV stored by this codec, and by raw beside it; repeat.", metavar="NAME"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Replay only the first N requests.", min=1, metavar="N")] = None,
    namespace: Annotated[str, typer.Option(help="Namespace to work in.")] = "replay",
    timeout: Annotated[float, typer.Option(help="Seconds that each call may take.", min=0.001)] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay a trace against a daemon and check every byte of every hit.

    Each request matches its full blocks, gets those that hit and puts the others; the bytes of a block derive from its
    key. Exits with 1 if one byte was wrong, or one record arrived damaged. With --codec each codec has a daemon of its
    own with the same bytes for slots, and a lossy one must give what it makes of the KV, to the byte.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.replay_loop import replay_namespace, replay_trace
    from kvstore.simulator.trace_files import read_requests
    from kvstore_client import Client

    if codec:
        if endpoint is not None:
            raise InvalidArgument("--codec compares daemons of its own; leave --endpoint away")
        report_codecs(trace, codec, block_bytes or _CODEC_BLOCK, capacity_blocks, limit, timeout, as_json=as_json)
        return
    payload_bytes = _block_bytes(block_bytes or _BLOCK)
    if endpoint is not None and capacity_blocks is not None:
        raise InvalidArgument("--capacity-blocks sizes a private daemon; the one at --endpoint has its own capacity")
    read = read_requests(trace, limit)
    requests = read.requests
    with contextlib.ExitStack() as stack:
        if endpoint is None:
            endpoint = stack.enter_context(private_daemon_for(payload_bytes, capacity_blocks)).endpoint
        client = stack.enter_context(
            Client(
                endpoint,
                namespace=replay_namespace(namespace, payload_bytes, read.block_tokens),
                timeout=timeout,
                payload_bytes=(payload_bytes,),
            )
        )
        with _progress(len(requests)) as on_request:
            report = replay_trace(client, requests, trace=str(trace), block_bytes=payload_bytes, on_request=on_request)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(_table(report))
    if report.wrong_bytes or report.corrupt_records:
        raise typer.Exit(1)


def report_codecs(
    trace: Path,
    names: Sequence[str],
    block_bytes: str,
    capacity_blocks: int | None,
    limit: int | None,
    timeout_s: float,
    *,
    as_json: bool,
) -> None:
    """Replay a trace by several codecs and print the comparison."""
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.replay_codecs import codecs_layout, comparison_table, replay_codecs
    from kvstore.cli.replay_loop import slot_bytes
    from kvstore.simulator.trace_files import read_requests

    payload_bytes = _block_bytes(block_bytes)
    codecs_layout(payload_bytes)
    slot = slot_bytes(payload_bytes)
    capacity_bytes = slot * (max(1, _DEFAULT_CAPACITY_BYTES // slot) if capacity_blocks is None else capacity_blocks)
    requests = read_requests(trace, limit).requests
    with _progress(len(requests) * (1 + len(set(names) - {"raw"}))) as on_request:
        report = replay_codecs(
            requests,
            names,
            private_daemon_of,
            trace=str(trace),
            block_bytes=payload_bytes,
            capacity_bytes=capacity_bytes,
            timeout_s=timeout_s,
            on_request=on_request,
        )
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(comparison_table(report))
    if any(one.wrong_bytes or one.corrupt_records for one in report.replays.values()):
        raise typer.Exit(1)


def private_daemon_for(block_bytes: int, capacity_blocks: int | None) -> PrivateDaemon:
    """A private daemon (not started) that holds exactly ``capacity_blocks`` blocks, or 1 GiB of them."""
    from kvstore.cli.replay_loop import slot_bytes

    slot = slot_bytes(block_bytes)
    blocks = max(1, _DEFAULT_CAPACITY_BYTES // slot) if capacity_blocks is None else capacity_blocks
    return private_daemon_of(slot, blocks * slot)


def private_daemon_of(slot_bytes: int | None, capacity_bytes: int) -> PrivateDaemon:
    """A private daemon (not started) for at most so many bytes of slots of one size, or of any.

    Slabs are whole numbers of slots, so no byte of the capacity is lost to cutting; grants are outside the capacity.
    """
    from kvstore.cli.private_daemon import PrivateDaemon

    if slot_bytes is None:
        return PrivateDaemon(capacity_bytes=capacity_bytes, grant_bytes=_GRANT_BYTES)
    blocks = max(1, capacity_bytes // slot_bytes)
    slots_per_slab = max(1, min(_SLAB_BYTES // slot_bytes, blocks))
    return PrivateDaemon(
        capacity_bytes=blocks * slot_bytes,
        grant_bytes=max(_GRANT_BYTES, 4 * slot_bytes),
        slab_bytes=slots_per_slab * slot_bytes,
    )


def _block_bytes(text: str) -> int:
    try:
        size = parse_size(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"--block-bytes: {error}") from None
    if size > _MAX_BLOCK_BYTES:
        raise InvalidArgument(f"--block-bytes: {text} is more than {_MAX_BLOCK_BYTES >> 20} MiB a block")
    return size


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr where that is a terminal; gives what to call after each request."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kvstore.cli import render

    console = render.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


def _table(report: ReplayReport) -> RenderableType:
    from rich.console import Group

    from kvstore.cli import render

    count, size = render.count, render.size
    outcome = render.facts(
        f"Replay of {report.trace}",
        [
            ("requests", f"{count(report.requests)} in {render.duration(report.seconds)}"),
            ("blocks hit / asked", f"{count(report.blocks_hit)} / {count(report.blocks_asked)}"),
            ("hit rate", render.ratio(report.blocks_hit, report.blocks_asked)),
            ("hits lost before the get", count(report.blocks_lost)),
            ("damaged records", count(report.corrupt_records)),
            ("wrong bytes", count(report.wrong_bytes)),
            ("bytes read", size(report.bytes_read)),
            ("bytes written", size(report.bytes_written)),
            ("puts", ", ".join(f"{count(number)} {status}" for status, number in report.puts.items())),
            ("block", f"{size(report.block_bytes)} of payload in a slot of {size(report.slot_bytes)}"),
        ],
    )
    latencies = render.table("Latency of a request", ["call", "calls", "p50", "p99"])
    for name, latency in report.latency.items():
        shown = [latency.p50_us, latency.p99_us] if latency.calls else []
        cells = [render.latency(value / 1e6) for value in shown] or [render.NOTHING] * 2
        latencies.add_row(name, count(latency.calls), *cells)
    view = report.daemon
    daemon = render.facts(
        "The daemon's view",
        [
            ("blocks hit / asked", f"{count(view.match_hits)} / {count(view.match_keys)}"),
            ("blocks stored", count(view.stored_blocks)),
            ("blocks evicted", count(view.evicted_blocks)),
            ("corrupt records", count(view.corrupt_records)),
            ("bytes in / out", f"{size(view.bytes_in)} / {size(view.bytes_out)}"),
            ("resident", f"{count(view.resident_blocks)} blocks of {count(report.capacity_blocks)}"),
            ("resident bytes", f"{size(view.resident_bytes)} of {size(view.capacity_bytes)}"),
        ],
    )
    return Group(outcome, "", latencies, "", daemon)
