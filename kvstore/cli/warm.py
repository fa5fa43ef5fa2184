"""``kvstore warm``: blocks that are likely to be used come up from the SSD into memory."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvstore.cli.namespaces import NAMING
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore.format.warm_list import WarmChain, parse_warm_list, render_warm_list
from kvstore.sizes import parse_size

if TYPE_CHECKING:
    from kvstore_client import Client, WarmResult

__all__ = ["warm"]

_MOST_LIST_BYTES: Final = 1 << 30
_NO_SSD: Final = "the daemon has no SSD (kvstore serve --ssd DIR), from which blocks would come up"


def warm(
    file: Annotated[
        Path | None,
        typer.Argument(help="A list: a chain a line, as keys, or as token ids with --block-tokens.", metavar="[FILE]"),
    ] = None,
    hottest: Annotated[
        str | None, typer.Option(help="The blocks on the SSD that were used last, so much of them.", metavar="SIZE")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write what memory holds now as a list, the hottest first.", metavar="FILE")
    ] = None,
    namespace: Annotated[str, typer.Option(help=f"Where the list does not say: {NAMING}.", metavar="NAME")] = "",
    block_tokens: Annotated[
        int, typer.Option(help="Lines of the list are token ids, so many a block.", metavar="N", min=0)
    ] = 0,
    budget: Annotated[str | None, typer.Option(help="Most memory to fill.", metavar="SIZE")] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Let others leave for it; else only free room is filled.")] = (
        False
    ),
    endpoint: Annotated[
        str | None, typer.Option(help="The daemon's endpoint.", metavar="ipc://PATH", envvar="KVSTORE_ENDPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that all may take.", min=0.001, metavar="S")] = 600.0,
) -> None:
    """Bring blocks that are likely to be used up into memory, or save which ones are there.

    What is used now stays: without --evict nothing leaves for a list, and what came up is the first to leave.
    """
    if [file is not None, hottest is not None, save is not None].count(True) != 1:
        raise InvalidArgument("give one of: a list, --hottest SIZE, --save FILE")
    if save is not None and (budget or evict or block_tokens or namespace):
        raise InvalidArgument("--save writes all that memory holds: it takes no other option")
    budget_bytes = 0 if budget is None else parse_size(budget)
    hottest_bytes = 0 if hottest is None else parse_size(hottest)

    from kvstore_client import Client

    with Client(endpoint, timeout=min(timeout, 30.0), mapped=False) as client:
        if save is not None:
            _save(client, save, timeout, as_json=as_json)
            return
        below = client.stats().ssd is not None
        if file is not None:
            chains = _chains_of(client, file, namespace, block_tokens)
        elif not below:
            raise InvalidArgument(f"--hottest {hottest}: {_NO_SSD}")
        else:
            listed = client.chains("ssd", budget_bytes=hottest_bytes, timeout=timeout)
            chains = [WarmChain(one.digest, one.keys) for one in listed]
        total = sum(len(chain.keys) for chain in chains)
        with _progress(total) as on_progress:
            result = _warm(client, chains, timeout, budget_bytes, on_progress, evict=evict)
    if as_json:
        print(json.dumps({"blocks": total, **asdict(result)}))
        return
    notes = [] if below else [_NO_SSD]
    if not total and hottest is not None:
        notes.append(f"the SSD holds no block that fits into {hottest}")
    _show(result, total, no_room_words(result, budget_bytes, evict=evict), budget_bytes, notes)


def _chains_of(client: Client, file: Path, namespace: str, block_tokens: int) -> list[WarmChain]:
    """The chains of a list, each with its namespace.

    Raises:
        InvalidArgument: the list, or a namespace that is needed and not named.
    """
    lines = _lines(file)
    if block_tokens:
        from kvstore_client import chain_keys

        tokens = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
        chains = [WarmChain(b"", chain_keys(_tokens(line, file, number), block_tokens)) for number, line in tokens]
    else:
        chains = list(parse_warm_list(lines, str(file)))
    if all(chain.digest for chain in chains):
        return chains

    from kvstore.cli.namespaces import listed, named_namespace, used_namespaces

    known = client.stats().namespaces
    fitting = [named_namespace(known, namespace)] if namespace else used_namespaces(client, known)
    if len(fitting) != 1:
        raise InvalidArgument(f"{file} does not say of which namespace it is; say so (--namespace): {listed(fitting)}")
    # Half a byte is left out: the digits of the statistics are whole bytes, and tell namespaces apart.
    digits = fitting[0].digest
    digest = bytes.fromhex(digits[: len(digits) // 2 * 2])
    return [chain if chain.digest else WarmChain(digest, chain.keys) for chain in chains]


def _lines(file: Path) -> list[str]:
    try:
        if file.stat().st_size > _MOST_LIST_BYTES:
            raise InvalidArgument(f"{file} has more than {_MOST_LIST_BYTES >> 30} GiB: that is no list of chains")
        return file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InvalidArgument(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{file} is not text: a list has a chain a line") from None


def _tokens(line: str, file: Path, number: int) -> list[int]:
    words = line.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    for word in words:
        if not word.isascii() or not word.isdigit() or int(word) >= 1 << 32:
            raise InvalidArgument(f"{file} line {number}: {word[:40]!r} is no token id from 0 to 2**32 - 1")
    return [int(word) for word in words]


def _warm(
    client: Client,
    chains: Sequence[WarmChain],
    timeout: float,
    budget_bytes: int,
    on_progress: Callable[[int], None],
    *,
    evict: bool,
) -> WarmResult:
    """Chains that stand behind each other and are of one namespace together."""
    import time
    from itertools import groupby

    from kvstore_client import WarmResult

    end = time.monotonic() + timeout
    done = WarmResult()
    for digest, group in groupby(chains, key=lambda chain: chain.digest):
        keys = [chain.keys for chain in group]
        left_bytes = budget_bytes - done.brought_bytes if budget_bytes else 0
        left_s = end - time.monotonic()
        if left_s <= 0 or (budget_bytes and left_bytes <= 0):
            done = replace(done, not_tried=done.not_tried + sum(map(len, keys)))
            continue
        before = _told(done)

        def told(some: WarmResult, before: int = before) -> None:
            on_progress(before + _told(some))

        some = client.warm(keys, evict=evict, budget_bytes=left_bytes, timeout=left_s, digest=digest, progress=told)
        done = _sum(done, some)
    return done


def _sum(one: WarmResult, other: WarmResult) -> WarmResult:
    values: dict[str, Any] = {name: value + getattr(other, name) for name, value in asdict(one).items()}
    return type(one)(**values)


def _told(result: WarmResult) -> int:
    """Blocks of which it is known what became of them."""
    return result.brought + result.there + result.unknown + result.no_room + result.failed


def _save(client: Client, path: Path, timeout: float, *, as_json: bool) -> None:
    listed = client.chains("dram", timeout=timeout)
    lines = render_warm_list((one.digest, one.namespace, one.keys) for one in listed)
    try:
        with path.open("w", encoding="utf-8") as out:
            out.writelines(lines)
    except OSError as error:
        raise KVStoreError(f"cannot write {path}: {error.strerror or error}") from None
    blocks = sum(len(one.keys) for one in listed)
    if as_json:
        print(json.dumps({"blocks": blocks, "chains": len(listed), "file": str(path)}))
        return

    from kvstore.cli import render

    print(f"{path} lists {render.blocks(blocks)}; chains: {render.count(len(listed))}")


def no_room_words(result: WarmResult, budget_bytes: int, *, evict: bool) -> str:
    """Why there was no room for some blocks, as far as the counts say: they do not tell a budget from other bounds.

    Args:
        result: of all.
        budget_bytes: as it was given, 0 for none.
        evict: whether others may leave.
    """
    from kvstore.cli import render

    room = "without free room, and nothing leaves for a list (see --evict)"
    if evict:
        room = (
            "without room though others may leave: one request fills half of memory at most, and what is in use stays"
        )
    if not budget_bytes:
        return room
    left_bytes = max(budget_bytes - result.brought_bytes, 0)
    if result.brought and left_bytes < result.brought_bytes / result.brought:
        return f"beyond the budget (--budget {render.size(budget_bytes)})"
    return f"larger than what the budget leaves ({render.size(left_bytes)}), or {room}"


def _show(result: WarmResult, total: int, no_room: str, budget_bytes: int, notes: Sequence[str]) -> None:
    from kvstore.cli import render

    spent = budget_bytes and result.brought_bytes >= budget_bytes
    rows = [("came up", f"{render.blocks(result.brought)}, {render.size(result.brought_bytes)}")]
    for name, blocks, what in (
        ("were there", result.there, "in memory already"),
        ("no room", result.no_room, no_room),
        ("not known", result.unknown, "in no tier, or of another namespace"),
        ("failed", result.failed, "that could not be read: see the log of the daemon"),
        ("not tried", result.not_tried, "since the budget is spent" if spent else "since time was over"),
    ):
        if blocks:
            rows.append((name, f"{render.count(blocks)} {what}"))
    rows += [("note", note) for note in notes]
    render.console().print(render.facts(f"Warm-up of {render.blocks(total)}", rows))
    sys.stdout.flush()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kvstore.cli import render

    console = render.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("warming up", total=total)
        yield lambda done: progress.update(task, completed=done)
