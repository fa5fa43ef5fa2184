"""``kvstore why``: the story of a key, or of a prompt: where its blocks are, why it misses, what would have kept it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvstore.cli.namespaces import NAMING
from kvstore.errors import InvalidArgument

if TYPE_CHECKING:
    from kvstore.cli.why_search import Answer

__all__ = ["why"]

_KEY_DIGITS: Final = 64
_FEWEST_DIGITS: Final = 8
_MOST_TOKENS_BYTES: Final = 64 << 20


def why(
    keys: Annotated[
        list[str] | None, typer.Argument(help="Keys: 64 hexadecimal digits, or the first 8 or more.", metavar="KEY...")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="A prompt: its token ids, as a JSON list or with blanks between them.", metavar="FILE"),
    ] = None,
    namespace: Annotated[
        str, typer.Option(help=f"{NAMING.capitalize()}; else the one that knows the key or prompt.", metavar="NAME")
    ] = "",
    block_tokens: Annotated[
        int, typer.Option(help="Of a prompt: tokens a block, where the namespace does not say.", metavar="N", min=0)
    ] = 0,
    salt: Annotated[str, typer.Option(help="Of a prompt: salt of its first block, as text.", metavar="TEXT")] = "",
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon.", min=0.001, metavar="S")] = 5.0,
) -> None:
    """Say why a key or a prompt hits or misses, and what would have kept it."""
    if bool(keys) == (tokens is not None):
        raise InvalidArgument("give keys, or a prompt (--tokens FILE)")
    if keys and (block_tokens or salt):
        given = "--block-tokens" if block_tokens else "--salt"
        raise InvalidArgument(f"{given} is for a prompt (--tokens FILE): a key is looked up as it is")
    wanted = [_digits(key) for key in keys or ()]
    prompt = [] if tokens is None else _read_tokens(tokens)

    from kvstore.cli.why_search import Search
    from kvstore_client import Client

    with Client(endpoint, timeout=timeout, mapped=False) as client:
        search = Search(client, namespace)
        if tokens is None:
            found = [search.key(key) for key in wanted]
        else:
            found = [search.prompt(prompt, block_tokens, salt.encode())]
    if as_json:
        _print_json(found, tokens=tokens is not None)
        return

    from kvstore.cli import render
    from kvstore.cli.why_view import why_view

    render.console().print(why_view(found))


def _digits(key: str) -> str:
    digits = key.lower()
    if not _FEWEST_DIGITS <= len(digits) <= _KEY_DIGITS or digits.strip("0123456789abcdef"):
        raise InvalidArgument(f"a key has 64 hexadecimal digits, of which the first 8 or more are given; got {key!r}")
    return digits


def _read_tokens(path: Path) -> list[int]:
    """Token ids of a file.

    Raises:
        InvalidArgument: it cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _MOST_TOKENS_BYTES:
            raise InvalidArgument(f"{path} has more than {_MOST_TOKENS_BYTES >> 20} MiB: that is no prompt")
        text = path.read_text("utf-8")
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} is not text: token ids are a JSON list, or have blanks between them") from None
    values: Any
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{path} is no JSON list of token ids: {error}") from None
    else:
        values = text.replace(",", " ").split()
    ids: list[int] = []
    for index, value in enumerate(values):
        whole = isinstance(value, (int, str)) and not isinstance(value, bool)
        if not whole or not str(value).isascii() or not str(value).isdigit() or int(value) >= 1 << 32:
            raise InvalidArgument(f"{path}: token {index} is {str(value)[:40]!r}, no number from 0 to 2**32 - 1")
        ids.append(int(value))
    return ids


def _print_json(found: Sequence[Answer], *, tokens: bool) -> None:
    from dataclasses import asdict

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    if tokens:
        (explained,) = (answer.explained for answer in found)
        shown = {**plain(asdict(explained)), "hits": explained.hits, "text": explained.text}
        told = list(explained)
    else:
        shown = {"stories": [{**plain(asdict(answer.explained[0])), **_place(answer)} for answer in found]}
        told = [answer.explained[0] for answer in found]
    for story, one in zip(shown["stories"], told, strict=True):
        story["text"] = one.reason
    print(json.dumps(shown))


def _place(answer: Answer) -> dict[str, Any]:
    """Which namespace knows a key, or which ones do not."""
    if answer.unknown_in:
        unknown_in = [{"namespace": one.label, "digest": one.digest} for one in answer.unknown_in]
        return {"namespace": "", "digest": "", "generation": 0, "unknown_in": unknown_in}
    explained = answer.explained
    where = {"namespace": explained.namespace, "digest": explained.digest, "generation": explained.generation}
    return {**where, "unknown_in": []}
