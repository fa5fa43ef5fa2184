"""``kvstore layout``: what KV a model has, how large it is with each codec, and how long it takes over a link."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvstore.errors import InvalidArgument

__all__ = ["layout"]

_GBIT_A_GB: Final = 8


def layout(
    model: Annotated[
        str, typer.Argument(help="A config.json, a directory that holds one, or a name such as llama-3.1-8b.")
    ],
    block_tokens: Annotated[int, typer.Option(help="Tokens a block.", min=1, max=1 << 20, metavar="N")] = 64,
    tokens: Annotated[
        int, typer.Option(help="Length of a prefix whose bytes and transfer times are shown.", min=1, metavar="N")
    ] = 8192,
    dtype: Annotated[str | None, typer.Option(help="Of the KV cache. (default: the config's)", metavar="NAME")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Codec to show; repeat for several. (default: all)", metavar="NAME")
    ] = None,
    link_gbps: Annotated[
        list[float] | None,
        typer.Option(help="Rate of a link of your own in Gbit/s, in place of the usual ones; repeat.", metavar="N"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the KV of a model: bytes a token and a block, with each codec, and transfer times.

    Hybrid models have several groups of layers, which are stored apart; of those with a window a prefix needs only the
    newest blocks.
    """
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.layout_report import LINKS, Link, layout_report, layout_table
    from kvstore.cli.model_files import read_model
    from kvstore_kernels.codecs import CODECS, get_codec

    try:
        codecs = [get_codec(name) for name in dict.fromkeys(codec or CODECS)]
    except ValueError as wrong:
        raise InvalidArgument(f"--codec: {wrong}") from None
    if link_gbps and not all(0 < rate < float("inf") for rate in link_gbps):
        raise InvalidArgument("--link-gbps: a link's rate is a number of Gbit/s above 0")
    links = [Link(name=f"{rate:g} Gbit/s", gb_per_s=rate / _GBIT_A_GB) for rate in dict.fromkeys(link_gbps or ())]
    groups = read_model(model, block_tokens, dtype)
    report = layout_report(model, groups, codecs, links or LINKS, tokens)
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        render.console().print(layout_table(report))
