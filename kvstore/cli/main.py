"""The ``kvstore`` command: its subcommands, and errors as one line.

Exit status: 0 done; 1 failed, or problems found; 2 wrong usage or settings; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Final

import typer

import kvstore
from kvstore.cli.bench import app as bench
from kvstore.cli.codecs import codecs
from kvstore.cli.configure import configure
from kvstore.cli.demo import demo
from kvstore.cli.layout import layout
from kvstore.cli.quality.command import quality
from kvstore.cli.record import record
from kvstore.cli.replay import replay
from kvstore.cli.serve import serve
from kvstore.cli.stats import StatsCommand, stats
from kvstore.cli.top.command import top
from kvstore.cli.tune.command import tune
from kvstore.cli.verify import verify
from kvstore.cli.warm import warm
from kvstore.cli.why import why
from kvstore.errors import InvalidArgument, KVStoreError, SettingsError

__all__ = ["app", "main"]

_FAILED: Final = 1
_USAGE: Final = 2
_INTERRUPTED: Final = 130

app: Final = typer.Typer(
    name="kvstore",
    help="Keep the KV cache of LLM inference engines in a daemon that they share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvstore {kvstore.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Keep the KV cache of LLM inference engines in a daemon that they share."""


def _version() -> None:
    """Show the version."""
    _print_version(True)


app.command("serve")(serve)
app.command("stats", cls=StatsCommand)(stats)
app.command("top")(top)
app.command("configure")(configure)
app.command("why")(why)
app.command("warm")(warm)
app.command("verify")(verify)
app.command("replay")(replay)
app.command("record")(record)
app.command("tune")(tune)
app.command("codecs")(codecs)
app.command("layout")(layout)
app.command("demo")(demo)
app.command("quality")(quality)
app.add_typer(bench, name="bench")
app.command("version")(_version)


def main() -> None:
    """Run the command line; never returns.

    Every error is one line on stderr, ``kvstore: error: ...``; ``--debug`` (before the subcommand) shows where it
    came from.
    """
    arguments = sys.argv[1:]
    options = arguments[: next((at for at, word in enumerate(arguments) if not word.startswith("-")), None)]
    sys.exit(_run(arguments, debug="--debug" in options))


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        status = app(arguments, prog_name="kvstore", standalone_mode=False)
        sys.stdout.flush()
    except typer.Exit as end:
        status = end.exit_code
    except BrokenPipeError:
        # Whoever read stdout has enough; nothing more may be written to it, at exit neither.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _fail(*_described(error))
    if status == _INTERRUPTED:
        return _fail("interrupted", _INTERRUPTED)
    return status if isinstance(status, int) else 0


def _described(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit status."""
    if isinstance(error, KVStoreError):
        return str(error), _USAGE if isinstance(error, (InvalidArgument, SettingsError)) else _FAILED
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own errors, whose class has moved between its versions
        if not usage():
            return "", _USAGE
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "kvstore"
        return f"{usage().rstrip('.')}; see '{command} --help'", getattr(error, "exit_code", _USAGE)
    return f"internal error: {type(error).__name__}: {error}; 'kvstore --debug ...' shows where", _FAILED


def _fail(message: str, status: int) -> int:
    if message:  # none where the help was the answer
        print(f"kvstore: error: {' '.join(message.split())}", file=sys.stderr)
    return status
