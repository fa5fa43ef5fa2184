"""``kvstore top``: the command."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from kvstore.errors import InvalidArgument

__all__ = ["top"]

_FASTEST_S: Final = 0.1
_SLOWEST_S: Final = 3600.0


def top(
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", metavar="SECONDS")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print one frame as text, and end.")] = False,
    theme: Annotated[
        str | None, typer.Option(help="Colours: dark or light. (default: what the terminal says)", metavar="NAME")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.", min=0.001, metavar="S")] = 5.0,
) -> None:
    """Watch what the daemon holds and does, live."""
    if not _FASTEST_S <= interval <= _SLOWEST_S:
        raise InvalidArgument(f"--interval must be {_FASTEST_S:g} to {_SLOWEST_S:g} seconds, got {interval:g}")
    if theme not in (None, "dark", "light"):
        raise InvalidArgument(f"--theme must be dark or light, got {theme!r}")
    if once:
        from kvstore.cli.top.once import print_once

        print_once(endpoint, interval, timeout)
        return
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise InvalidArgument(
            "kvstore top needs a terminal; 'kvstore top --once' prints one frame as text, 'kvstore stats --json' the "
            "numbers for programs"
        )
    from kvstore.cli.top.app import TopApp

    TopApp(endpoint, interval_s=interval, timeout_s=timeout, theme=theme).run()
