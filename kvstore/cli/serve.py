"""``kvstore serve``: the daemon in the foreground."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from kvstore.errors import KVStoreError, SettingsError

__all__ = ["FLAGS", "serve"]

FLAGS: Final = {
    "endpoint": "--endpoint",
    "http": "--http",
    "dram.capacity_bytes": "--capacity",
    "dram.grant_bytes": "--grant",
    "dram.slab_bytes": "--slab",
    "dram.directory": "--arena-dir",
    "dram.verify": "--verify",
    "ssd.directory": "--ssd",
    "ssd.capacity_bytes": "--ssd-capacity",
    "log_level": "--log-level",
    "log_format": "--log-format",
    "access.mode": "--mode",
    "access.group": "--group",
}
"""Settings that have a flag of their own; ``--set`` reaches all others."""

_SIZE: Final = "SIZE"


def serve(
    config: Annotated[
        Path | None, typer.Option(help="Settings file (TOML); KVSTORE_CONFIG names one, too.", metavar="FILE")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Where clients reach the daemon.", metavar="ipc://PATH", show_default="private to you"),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of metrics and health, or off.", show_default="127.0.0.1:9477", metavar="ADDRESS"),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Most bytes of stored blocks.", show_default="1GiB", metavar=_SIZE)
    ] = None,
    grant: Annotated[
        str | None,
        typer.Option(help="Memory lent for writing, outside the capacity.", show_default="64MiB", metavar=_SIZE),
    ] = None,
    slab: Annotated[
        str | None,
        typer.Option(help="Unit in which memory moves between block sizes.", show_default="automatic", metavar=_SIZE),
    ] = None,
    arena_dir: Annotated[
        Path | None,
        typer.Option(
            help="Memory-backed directory for the blocks.",
            show_default="below /dev/shm",
            metavar="DIR",
            resolve_path=True,
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(help="Checksums on reads: always, sampled or off.", show_default="sampled", metavar="WHEN"),
    ] = None,
    ssd: Annotated[
        Path | None,
        typer.Option(help="Directory of the SSD tier.", show_default="no such tier", metavar="DIR", resolve_path=True),
    ] = None,
    ssd_capacity: Annotated[str | None, typer.Option(help="Most bytes that its files may take.", metavar=_SIZE)] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error.", show_default="info", metavar="LEVEL")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text", metavar="FORMAT")] = None,
    mode: Annotated[
        str | None, typer.Option(help="Who may connect: 0600, 0660 or 0666.", show_default="0600", metavar="MODE")
    ] = None,
    group: Annotated[str | None, typer.Option(help="Group that may connect; needs --mode 0660.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting, for example limits.max_sessions=64; again for more.", metavar="KEY=VALUE"
        ),
    ] = None,
    parent_pid: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the daemon until SIGTERM or Ctrl+C.

    Settings come from flags, else KVSTORE_* variables, else the file, else the defaults.
    """
    from kvstore.protocol.endpoint import ipc_path
    from kvstore.settings import Settings

    given: dict[str, object] = {
        "endpoint": endpoint,
        "http": http,
        "dram.capacity_bytes": capacity,
        "dram.grant_bytes": grant,
        "dram.slab_bytes": slab,
        "dram.directory": arena_dir,
        "dram.verify": verify,
        "ssd.directory": ssd,
        "ssd.capacity_bytes": ssd_capacity,
        "log_level": log_level,
        "log_format": log_format,
        "access.mode": mode,
        "access.group": group,
    }
    assignments = _assignments(set_ or ())
    overrides = assignments | {key: value for key, value in given.items() if value is not None}
    flags = {key: f"--set {key}" for key in assignments} | {
        key: flag for key, flag in FLAGS.items() if given[key] is not None
    }
    settings = Settings.load(config, overrides, flags=flags)
    if parent_pid is not None:
        _end_with(parent_pid)

    from kvstore.server.app import run

    try:
        status = run(settings)
    finally:
        if parent_pid is not None:  # the socket's directory was made for this daemon alone
            with contextlib.suppress(OSError):
                ipc_path(settings.endpoint).parent.rmdir()
    raise typer.Exit(status)


def _assignments(texts: Sequence[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise SettingsError(f"--set {text}: write KEY=VALUE, for example --set limits.max_sessions=64")
        values[key.strip()] = value.strip()
    return values


def _end_with(parent_pid: int) -> None:
    """Send this process SIGTERM when the parent is dead, without looking at a clock.

    Raises:
        KVStoreError: ``parent_pid`` is not this process's parent, or is gone already.
    """
    try:
        parent = os.pidfd_open(parent_pid)
    except OSError as error:
        raise KVStoreError(f"cannot watch the parent process {parent_pid}: {error.strerror}") from None
    if os.getppid() != parent_pid:
        os.close(parent)
        raise KVStoreError(f"process {parent_pid} is not the parent of this one")

    def watch() -> None:
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        while not poll.poll():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
