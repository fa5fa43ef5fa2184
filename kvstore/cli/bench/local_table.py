"""The mapped path's benchmark for people: a table a block size, then what Redis takes, then matches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table

from kvstore.cli import render
from kvstore.cli.bench.report import Report, Row, facts_of, outcome, us

__all__ = ["local_table"]

_BUFFERS: Final = "one: the same in each call, as for staging; rotating: in random order, as an engine's cache"
_HOT: Final = "one block again and again; all others are of a set larger than the caches, in random order"
_BESIDE: Final = "memmove of the same bytes; of a view compiled pin and unpin, of a match the same over the socket"
_PUTS: Final = "not waited for, into a full tier; without the checksum the time of put_checksum is taken off"
_REDIS: Final = "redis"
_DICT: Final = "dict loop"
_NAMES: Final = {"put_without_checksum": "put, no checksum"}


def local_table(report: Report) -> RenderableType:
    """All rows, and what their words mean, in 80 columns."""
    rows = [row for row in report.rows if row.core_share is None and row.note is None]
    sized = [row for row in rows if row.size_bytes is not None]
    redis = [row for row in sized if (row.baseline or "").startswith(_REDIS)]
    parts: list[RenderableType] = []
    for size_bytes in dict.fromkeys(row.size_bytes or 0 for row in sized):
        of_size = [row for row in sized if row.size_bytes == size_bytes and row not in redis]
        parts += [_of_size(size_bytes, of_size), ""]
    if redis:
        parts += [_beside_redis(redis), ""]
    matches = [row for row in rows if row.size_bytes is None]
    if matches:
        parts += [_matches(matches), ""]
    meanings = [("beside", _BESIDE), ("buffers", _BUFFERS), ("hot", _HOT), ("put", _PUTS)]
    sustained = [row for row in rows if row.daemon_cpu_us is not None]
    cpu = ", ".join(f"{us(row.daemon_cpu_us)} at {render.size(row.size_bytes or 0)}" for row in sustained)
    others = ", ".join(f"{row.others_share or 0:.1f}" for row in sustained)
    meanings.append(("put_sustained", f"until flush() returns; the daemon's CPU time a put: {cpu}"))
    meanings.append(
        ("", f"needs a core for the client and one for the daemon; cores that others used meanwhile: {others}")
    )
    return Group(*parts, facts_of(report, meanings))


def _of_size(size_bytes: int, rows: Sequence[Row]) -> Table:
    made = render.table(
        f"Blocks of {render.size(size_bytes)}",
        [
            "operation",
            render.text_column("buffers"),
            *("time", "GB/s", "beside", "ratio"),
            render.text_column("aim"),
        ],
        key_columns=2,
    )
    for row in rows:
        made.add_row(
            _operation(row),
            row.buffers or "",
            us(row.median_us),
            render.NOTHING if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
            us(row.baseline_median_us),
            *outcome(row),
        )
    return made


def _beside_redis(rows: Sequence[Row]) -> Table:
    made = render.table(
        "Beside Redis on a unix socket", ["operation", "size", "time", render.text_column("redis"), "its time", "ratio"]
    )
    for row in rows:
        command = (row.baseline or "").removeprefix(_REDIS).strip()
        made.add_row(
            _operation(row),
            render.size(row.size_bytes or 0),
            us(row.median_us),
            command,
            us(row.baseline_median_us),
            outcome(row)[0],
        )
    return made


def _matches(rows: Sequence[Row]) -> Table:
    """A row for each number of keys: beside the socket, and beside a loop over a dict in this process."""
    aim = render.text_column("aim")
    made = render.table("Keys in one call", ["match", "time", "socket", "ratio", aim, _DICT, "ratio", aim])
    for keys in dict.fromkeys(row.batch for row in rows):
        of_keys = sorted((row for row in rows if row.batch == keys), key=lambda row: row.baseline == _DICT)
        cells = [cell for row in of_keys for cell in (us(row.baseline_median_us), *outcome(row))]
        made.add_row(f"{keys:,} key{'s' if keys > 1 else ''}", us(of_keys[0].median_us), *cells)
    return made


def _operation(row: Row) -> str:
    many = f" {row.batch}" if row.op == "get_many_into" else ""
    return _NAMES.get(row.op, row.op) + many + (", hot" if row.cache == "hot" else "")
