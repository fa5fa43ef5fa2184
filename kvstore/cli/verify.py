"""``kvstore verify``: the daemon checks its invariants and the checksum of every record it holds.

With ``--ssd`` the files of an SSD tier are verified that no daemon uses. With ``--stress`` it looks for wrong bytes in
private daemons and files instead, see ``kvstore.cli.stress``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.cli.verify_ssd import verify_files
from kvstore.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.cli.stress import StageReport
    from kvstore.protocol.messages import VerifyReply

__all__ = ["verify", "verify_tables", "with_list"]

_SHOWN_PROBLEMS: Final = 20


def verify(
    context: typer.Context,
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that it may take.", min=0.001, metavar="S")] = 600.0,
    ssd: Annotated[
        Path | None,
        typer.Option(
            help="Instead, this directory of an SSD tier, which no daemon may use meanwhile.",
            metavar="DIR",
            resolve_path=True,
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="With --ssd: drop what is damaged. Without it nothing is changed.")
    ] = False,
    stress: Annotated[
        float | None,
        typer.Option(
            help="Instead, for so many seconds: processes that look for one wrong byte, in private daemons only.",
            min=30,
            max=7 * 86400,
            metavar="SECONDS",
        ),
    ] = None,
) -> None:
    """Check the daemon's invariants and every record's checksum, in DRAM and on the SSD; drop what is damaged.

    Exits with 1 if there is a problem. Other clients are served meanwhile.
    """
    import msgspec

    from kvstore_client import Client

    if repair and ssd is None:
        raise InvalidArgument("--repair goes with --ssd DIR: a daemon drops by itself what it finds damaged")
    if stress is not None or ssd is not None:
        option = "--stress" if stress is not None else "--ssd"
        why = "it uses daemons of its own" if stress is not None else "it reads the files itself"
        for name in ("endpoint", "timeout", *(("ssd", "repair") if stress is not None else ())):
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise InvalidArgument(f"{option} takes no --{name}: {why}")
    if stress is not None:
        _stress(stress, as_json)
        return
    if ssd is not None:
        verify_files(ssd, repair=repair, as_json=as_json)
        return

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


def _stress(seconds: float, as_json: bool) -> None:
    """``--stress``: progress on stderr, the result on stdout, status 1 where anything is not as it must be."""
    import contextlib
    import logging

    import msgspec

    from kvstore.cli import render
    from kvstore.cli.stress import run_stress, stress_tables

    # That puts are refused now and then is part of it.
    logging.getLogger("kvstore_client").setLevel(logging.ERROR)
    notes = render.console(stderr=True)
    with notes.status("starting") if notes.is_terminal else contextlib.nullcontext() as status:

        def on_begin(name: str) -> None:
            if status is not None:
                status.update(name)

        def on_end(stage: StageReport) -> None:
            checked, wrong = render.count(stage.hits), render.count(stage.wrong_bytes)
            how = f"{checked} hits checked in {render.duration(stage.seconds)}, {wrong} wrong bytes"
            notes.print(f"{stage.phase}, {stage.name}: {how}: {stage.outcome}")

        report = run_stress(seconds, on_begin, on_end)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(stress_tables(report))
    if not report.ok:
        raise typer.Exit(1)


def verify_tables(outcome: VerifyReply) -> RenderableType:
    """What was checked, and the problems if there are any."""
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
    return with_list(checked, "Problems", problems)


def with_list(table: RenderableType, title: str, lines: list[str]) -> RenderableType:
    """A table, and below it the first of some lines, if there are any."""
    from rich.console import Group
    from rich.text import Text

    from kvstore.cli import render

    if not lines:
        return table
    shown = [Text(line) for line in lines[:_SHOWN_PROBLEMS]]
    if len(lines) > _SHOWN_PROBLEMS:
        shown.append(Text(f"... {render.count(len(lines) - _SHOWN_PROBLEMS)} more, --json has them all", style="dim"))
    return Group(table, "", Text(title, style="bold"), *shown)
