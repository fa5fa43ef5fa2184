"""``kvstore codecs``: what codecs there are, what they cost, and where they run on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvstore.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.cli.quality.measured import CodecQuality

__all__ = ["codecs"]

_MODEL: Final = "llama-3.1-8b"


def codecs(
    name: Annotated[str | None, typer.Argument(help="Show one codec in detail.", metavar="[NAME]")] = None,
    model: Annotated[
        str,
        typer.Option(help="Whose KV the sizes are of: a config.json, a directory that holds one, or a known name."),
    ] = _MODEL,
    block_tokens: Annotated[int, typer.Option(help="Tokens a block.", min=1, max=1 << 20, metavar="N")] = 64,
    dtype: Annotated[str | None, typer.Option(help="Of the KV cache. (default: the model's)", metavar="NAME")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the codecs: bits a value, measured quality, and whether they run on this machine's CPU and GPU."""
    import msgspec

    from kvstore.cli import render
    from kvstore.cli.backends import backends
    from kvstore.cli.codecs_report import codecs_report
    from kvstore.cli.codecs_tables import codec_detail, codecs_table
    from kvstore.cli.model_files import read_model
    from kvstore_kernels.codecs import CODECS, get_codec

    try:
        chosen = list(CODECS.values()) if name is None else [get_codec(name)]
    except ValueError as wrong:
        raise InvalidArgument(str(wrong)) from None
    layout = read_model(model, block_tokens, dtype).groups[0].layout
    report = codecs_report(model, layout, chosen, _quality(), backends())
    if as_json:
        print(msgspec.json.encode(report).decode())
    elif name is None:
        render.console().print(codecs_table(report))
    else:
        render.console().print(codec_detail(report, chosen[0], layout))


def _quality() -> Mapping[str, CodecQuality]:
    """What was measured; nothing where no measurement comes with the program."""
    from kvstore.cli.quality.measured import measured

    try:
        return measured()
    except FileNotFoundError:
        return {}
