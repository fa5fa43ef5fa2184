"""The readers of an index stage: map its files as the SDK does, read, check every word."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from kvstore.cli.stress.checked_reads import (
    TALLY,
    TALLY_WORDS,
    check_batch,
    copy_and_check,
    pin_and_check,
    prepare_batch,
)
from kvstore.cli.stress.faulty import copy_unchecked
from kvstore.cli.stress.layout import NAMESPACE_ID, SHAPES, ReaderFiles
from kvstore.cli.stress.pattern import Words
from kvstore.cli.stress.worker import Post
from kvstore.mapped import context as fields
from kvstore.mapped.index_reader import copy_batch
from kvstore.protocol.messages import Welcome
from kvstore_client.mapped_session import MappedSession

__all__ = ["read"]

_BATCH: Final = 8
_ROUNDS: Final = 64
"""Reads of one compiled call."""

_UNALIGNED: Final = 8
"""Every other target begins so many bytes behind a line: both kinds of copies are used."""


class Reader:
    """One client's mapping of an index stage's files, without a daemon."""

    def __init__(self, files: ReaderFiles, shape: str, seed: int) -> None:
        self.keys = SHAPES[shape].keys()
        self._session_fd = os.open(files.session, os.O_RDWR | os.O_CLOEXEC)
        try:
            welcome = Welcome(
                0, files.incarnation, 1, 1, "", 0, files.session, True, 0, files.arena, files.index, files.doorbell
            )
            self.mapped = MappedSession(welcome, self._session_fd, NAMESPACE_ID, 1, bytes(32), None)
        finally:
            os.close(self._session_fd)
        self.context = self.mapped.address
        room = SHAPES[shape].max_length + 64
        self._memory = np.zeros(room * _BATCH + 4096, np.uint8)
        begin = -int(self._memory.ctypes.data) % 4096 + int(self._memory.ctypes.data)
        self._items: Words = np.zeros((_BATCH, fields.ITEM_BYTES // 8), np.int64)
        self.items = int(self._items.ctypes.data)
        for index, item in enumerate(self._items):
            item[fields.ITEM_TARGET // 8] = begin + index * room + _UNALIGNED * (index % 2)
            item[fields.ITEM_CAPACITY // 8] = SHAPES[shape].max_length
        self._rows: Words = np.zeros(_BATCH, np.int64)
        self.rows = int(self._rows.ctypes.data)
        self._tally: Words = np.zeros(TALLY_WORDS, np.int64)
        self._tally[-1] = seed
        self.tally = int(self._tally.ctypes.data)

    def count(self, name: str) -> int:
        """One word of the tally."""
        return int(self._tally[TALLY.index(name)])

    def result(self, seconds: float, counts_copies: bool) -> dict[str, Any]:
        """Everything that was counted. ``retries``: copies that were thrown away because the entry had changed."""
        found: dict[str, Any] = dict(zip(TALLY, self._tally.tolist(), strict=False))
        copies = int(self.mapped._context[fields.READS // 8])
        found["retries"] = copies - found["hits"] if counts_copies else None
        found["seconds"] = seconds
        return found


def _copy(reader: Reader) -> None:
    copy_and_check(reader.context, reader.items, reader.keys.address, len(reader.keys), _ROUNDS, reader.tally)


def _batch(reader: Reader) -> None:
    for _ in range(_ROUNDS // _BATCH):
        prepare_batch(reader.items, _BATCH, reader.rows, reader.keys.address, len(reader.keys), reader.tally)
        copy_batch(reader.context, reader.items, _BATCH, 0)
        check_batch(reader.items, _BATCH, reader.rows, reader.tally)


def _pinned(reader: Reader) -> None:
    keys = (reader.keys.address, len(reader.keys))
    pin_and_check(reader.context, reader.items, *keys, _ROUNDS, 4, reader.tally)


def _unchecked(reader: Reader) -> None:
    copy_unchecked(reader.context, reader.items, reader.keys.address, len(reader.keys), _ROUNDS, reader.tally)


WAYS: Final[dict[str, Callable[[Reader], None]]] = {
    "copy": _copy,
    "batch": _batch,
    "pinned": _pinned,
    "unchecked": _unchecked,
}


def read(
    post: Post, *, files: dict[str, Any], shape: str, way: str, seconds: float, seed: int, enough: int
) -> dict[str, Any]:
    """Role: read for so long, or until so many blocks were wrong (0: never mind); what was counted."""
    reader = Reader(msgspec.convert(files, ReaderFiles), shape, seed)
    step = WAYS[way]
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < seconds and not post.stopped():
            step(reader)
            if enough and reader.count("wrong_blocks") >= enough:
                break
        return reader.result(time.monotonic() - begin, counts_copies=way in ("copy", "batch"))
    finally:
        reader.mapped.release()
