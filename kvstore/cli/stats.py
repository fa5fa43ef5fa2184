"""``kvstore stats``: what the daemon holds and does, once or again and again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from kvstore.errors import ConnectionLost, DaemonUnavailable, DeadlineExceeded, InvalidArgument

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore.protocol.statistics import DaemonStats

__all__ = ["StatsCommand", "stats"]

_WATCH: Final = "--watch"
_WATCH_SECONDS: Final = "2"
_FASTEST_WATCH_S: Final = 0.1
_RETRY_S: Final = 1.0


class StatsCommand(TyperCommand):
    """Lets ``--watch`` stand without its number of seconds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # the context's class moved between typers
        """Put the default behind a bare ``--watch``."""
        filled: list[str] = []
        for at, word in enumerate(args):
            filled.append(word)
            if word == _WATCH and (at + 1 == len(args) or args[at + 1].startswith("-")):
                filled.append(_WATCH_SECONDS)
        return super().parse_args(ctx, filled)


def stats(
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[
        float | None, typer.Option(_WATCH, help="Show it again every SECONDS, by default 2.", metavar="[SECONDS]")
    ] = None,
    misses: Annotated[bool, typer.Option("--misses", help="Show why lookups missed, and nothing else.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon.", min=0.001, metavar="S")] = 5.0,
    curve: Annotated[
        bool, typer.Option("--curve", help="Show what hit rate the present load would have in more or less memory.")
    ] = False,
) -> None:
    """Show what the daemon holds and does."""
    if misses and curve:
        raise InvalidArgument("--misses and --curve do not go together")
    chosen = "misses" if misses else "curve" if curve else ""
    if watch is not None:
        if as_json:
            raise InvalidArgument("--watch and --json do not go together")
        if not _FASTEST_WATCH_S <= watch <= 86400:
            raise InvalidArgument(f"--watch must be {_FASTEST_WATCH_S:g} to 86400 seconds, got {watch:g}")
        _watch(endpoint, watch, timeout, chosen)
        return

    from kvstore_client import Client

    with Client(endpoint, timeout=timeout) as client:
        snapshot = client.stats()
    if as_json:
        import msgspec

        chosen_part = getattr(snapshot, chosen) if chosen else snapshot
        print(msgspec.json.encode(chosen_part).decode())
        return

    from kvstore.cli import render

    render.console().print(_view(snapshot, None, chosen))


def _view(snapshot: DaemonStats, since: DaemonStats | None, chosen: str) -> RenderableType:
    """What is shown of a snapshot: a part of it, or with "" all that has no view of its own."""
    if chosen == "misses":
        from kvstore.cli.miss_tables import miss_tables

        return miss_tables(snapshot)
    if chosen == "curve":
        from kvstore.cli.curve import curve_view

        return curve_view(snapshot)
    from kvstore.cli.stats_tables import stats_tables

    return stats_tables(snapshot, since=since)


def _watch(endpoint: str | None, seconds: float, timeout: float, chosen: str) -> None:
    """Redraw until Ctrl+C; a daemon that is away or comes back is a line on the screen, not an end."""
    from rich.live import Live

    from kvstore.cli import render

    console = render.console()
    views = _views(endpoint, seconds, timeout, chosen)
    with contextlib.suppress(KeyboardInterrupt):
        if not console.is_terminal:
            for view in views:
                console.print(view, "", sep="\n")
                sys.stdout.flush()
        with Live(console=console, auto_refresh=False, screen=True) as live:
            for view in views:
                live.update(view, refresh=True)


def _views(endpoint: str | None, seconds: float, timeout: float, chosen: str) -> Iterator[RenderableType]:
    from kvstore.cli.stats_tables import waiting
    from kvstore_client import Client

    while True:
        try:
            with Client(endpoint, timeout=timeout) as client:
                previous: DaemonStats | None = None
                while True:
                    snapshot = client.stats()
                    yield _view(snapshot, previous, chosen)
                    previous = snapshot
                    time.sleep(seconds)
        except (DaemonUnavailable, ConnectionLost, DeadlineExceeded) as error:
            yield waiting(str(error))
            time.sleep(min(seconds, _RETRY_S))
