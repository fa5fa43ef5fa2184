"""``kvstore configure``: shows and changes the policies of a running daemon."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstore.errors import InvalidArgument

__all__ = ["configure"]


def configure(
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction policy of DRAM.", metavar="NAME")] = None,
    ssd_policy: Annotated[str | None, typer.Option(help="Eviction policy of the SSD.", metavar="NAME")] = None,
    admission: Annotated[
        str | None, typer.Option(help="What is written to the SSD: all or predicted.", metavar="NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon.", min=0.001, metavar="S")] = 5.0,
) -> None:
    """Show the policies of the running daemon, or change them.

    No block is lost. It lasts until the daemon ends: write it into its settings to keep it.
    """
    from kvstore_client import Client

    for option, name in (("--policy", policy), ("--ssd-policy", ssd_policy), ("--admission", admission)):
        if name is not None and not name.strip():
            raise InvalidArgument(f"{option}: the name is empty; leave {option} away to change nothing")
    with Client(endpoint, timeout=timeout) as client:
        now = client.configure(policy=policy or "", ssd_policy=ssd_policy or "", admission=admission or "")
    shown = {"policy": now.policy, "ssd_policy": now.ssd_policy, "admission": now.admission}
    if as_json:
        import msgspec

        print(msgspec.json.encode(shown).decode())
        return

    from kvstore.cli import render

    rows = [
        ("eviction from DRAM", now.policy),
        ("eviction from the SSD", now.ssd_policy or "no SSD tier"),
        ("written to the SSD", now.admission or "no SSD tier"),
    ]
    render.console().print(render.facts("Policies", rows))
