"""``kvstore verify``: the daemon checks its invariants and the checksum of every record it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.protocol.messages import VerifyReply

__all__ = ["verify", "verify_tables"]

_SHOWN_PROBLEMS: Final = 20


def verify(
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that it may take.", min=0.001, metavar="S")] = 600.0,
) -> None:
    """Check the daemon's invariants and every record's checksum.

    Exits with 1 if there is a problem. Other clients are served meanwhile.
    """
    import msgspec

    from kvstore_client import Client

    with Client(endpoint, timeout=timeout) as client:
        outcome = client.verify()
    if as_json:
        fields = {
            "records": outcome.records,
            "bytes": outcome.bytes,
            "seconds": outcome.seconds,
            "problems": outcome.problems,
        }
        print(msgspec.json.encode(fields).decode())
    else:
        from kvstore.cli import render

        render.console().print(verify_tables(outcome))
    if outcome.problems:
        raise typer.Exit(1)


def verify_tables(outcome: VerifyReply) -> RenderableType:
    """What was checked, and the problems if there are any."""
    from rich.console import Group
    from rich.text import Text

    from kvstore.cli import render

    problems = outcome.problems
    checked = render.facts(
        "Verified",
        [
            ("records", render.count(outcome.records)),
            ("bytes", render.size(outcome.bytes)),
            ("time", f"{render.duration(outcome.seconds)} ({render.throughput(outcome.bytes, outcome.seconds)})"),
            ("problems", render.count(len(problems)) if problems else "none"),
        ],
    )
    if not problems:
        return checked
    shown = [Text(problem) for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        shown.append(
            Text(f"... {render.count(len(problems) - _SHOWN_PROBLEMS)} more, --json has them all", style="dim")
        )
    return Group(checked, "", Text("Problems", style="bold"), *shown)
