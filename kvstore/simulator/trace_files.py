"""Reads a trace, whichever of the known formats it is in.

Covers: Mooncake's jsonl (``kvstore.simulator.trace``), Bailian's jsonl (``kvstore.simulator.bailian``), what a daemon
recorded (``kvstore.simulator.recording``). A jsonl file is Bailian's if its first line has a ``chat_id``; a recording's
file begins with its magic, and a directory holds recordings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Final

import msgspec

from kvstore.errors import InvalidArgument
from kvstore.simulator.bailian import BAILIAN_BLOCK_TOKENS, parse_bailian
from kvstore.simulator.recording import is_recording, read_recording
from kvstore.simulator.requests import Request, Trace
from kvstore.simulator.trace import TRACE_BLOCK_TOKENS, parse_trace
from kvstore.simulator.trace_lines import trace_lines

__all__ = ["read_requests"]

_NS_PER_MS: Final = 1_000_000


def read_requests(path: str | PathLike[str], limit: int | None = None, block_tokens: int | None = None) -> Trace:
    """The first ``limit`` requests of a trace, or all of them.

    Args:
        path: of a file, or of a directory of recordings.
        limit: most requests.
        block_tokens: tokens a block, a multiple of what the trace has; None for that.

    Raises:
        InvalidArgument: the trace cannot be read, holds no request, a line is wrong (named as ``file:line``), or blocks
            cannot be of that size.
    """
    name = str(path)
    try:
        if is_recording(Path(path)):
            trace = read_recording(Path(path), limit)
        else:
            with open(path, "rb") as lines:
                trace = _read_lines(trace_lines(lines, name), name, limit)
    except OSError as error:
        raise InvalidArgument(f"cannot read the trace {name!r}: {error.strerror or error}") from None
    if not trace.requests:
        raise InvalidArgument(f"the trace {name!r} holds no requests")
    return trace if block_tokens is None else trace.with_block_tokens(block_tokens)


def _read_lines(lines: Iterable[bytes], name: str, limit: int | None) -> Trace:
    iterator = iter(lines)
    first = next(iterator, None)
    if first is None:
        return Trace(name, "mooncake", TRACE_BLOCK_TOKENS, [])
    every = chain([first], iterator)
    if _is_bailian(first):
        return Trace(name, "bailian", BAILIAN_BLOCK_TOKENS, list(islice(parse_bailian(every, name), limit)))
    return Trace(name, "mooncake", TRACE_BLOCK_TOKENS, list(islice(_mooncake(every, name), limit)))


def _is_bailian(line: bytes) -> bool:
    try:
        decoded = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(decoded, dict) and "chat_id" in decoded


def _mooncake(lines: Iterable[bytes], name: str) -> Iterator[Request]:
    for request in parse_trace(lines, name):
        yield Request(
            request.timestamp_ms * _NS_PER_MS, request.input_tokens, request.output_tokens, request.full_blocks
        )
