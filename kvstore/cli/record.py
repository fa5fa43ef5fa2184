"""``kvstore record``: has the running daemon record what is looked up, for ``kvstore tune`` and ``kvstore replay``."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.protocol.statistics import RecordStats

__all__ = ["record", "record_facts"]


class Action(enum.StrEnum):
    """What to do."""

    START = "start"
    STOP = "stop"
    STATUS = "status"


def record(
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.STATUS,
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon.", min=0.001, metavar="S")] = 5.0,
) -> None:
    """Begin or end a recording of lookups by the running daemon, or show how it goes.

    No keys are recorded, and files are bounded; the section "record" of the settings
    says where they are and how large they may be. A stop exits with 1 where the
    recording had ended by itself.
    """
    from kvstore_client import Client

    with Client(endpoint, timeout=timeout) as client:
        status = client.record("" if action is Action.STATUS else action.value)
    if as_json:
        import msgspec

        print(msgspec.json.encode(status).decode())
    else:
        from kvstore.cli import render

        render.console().print(record_facts(status))
    if action is Action.STOP and status.state == "failed":
        raise typer.Exit(1)


def record_facts(status: RecordStats) -> RenderableType:
    """A recording, for people."""
    from kvstore.cli import render

    blocks, count, size = render.blocks, render.count, render.size
    rows = [
        ("state", status.state if not status.problem else f"{status.state}: {status.problem}"),
        ("directory", f"{status.directory}, at most {size(status.max_bytes)}"),
    ]
    if status.started_unix_s:
        rows.append(("file", status.file or "none is left"))
    if status.file or status.requests:
        written = f"{count(status.requests)} requests, {blocks(status.blocks)}, {size(status.bytes_written)}"
        if status.requests:
            written += f" ({status.bytes_written / status.requests:.0f} bytes a request)"
        rows += [
            ("written" if status.file else "lost", written),
            ("not over yet", f"{count(status.open_requests)} requests"),
        ]
    if status.dropped_requests:
        why = "could not keep up" if not status.problem else "could not keep up, or had ended"
        rows.append(("dropped", f"{count(status.dropped_requests)} requests, because writing {why}"))
    if status.requests and status.file and status.state != "on":
        rows.append(("next", f"kvstore tune {status.directory}"))
    return render.facts("Recording of lookups", rows)
