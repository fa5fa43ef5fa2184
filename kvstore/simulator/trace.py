"""Request traces in the Mooncake format: one JSON object a line, 512 tokens a block.

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one id for each block]}``. An id
stands for a whole prefix: it always follows the same id. The last id of a prompt may be of a partial block.

Covers: reading and checking. Does not cover: what a replay does with a request, see ``kvstore.cli.replay``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from os import PathLike
from typing import Final

import msgspec

from kvstore.errors import InvalidArgument
from kvstore.simulator.trace_lines import trace_lines

__all__ = ["TRACE_BLOCK_TOKENS", "TraceRequest", "block_key", "parse_trace", "read_trace"]

TRACE_BLOCK_TOKENS: Final = 512
"""Tokens a block, which the format fixes."""

_KEY_PREFIX: Final = b"kvstore trace block 1\0"
_MAX_ID: Final = (1 << 64) - 1
_MAX_TOKENS: Final = 1 << 40


class TraceRequest(
    msgspec.Struct,
    frozen=True,
    rename={"timestamp_ms": "timestamp", "input_tokens": "input_length", "output_tokens": "output_length"},
):
    """One request of a trace.

    Attributes:
        timestamp_ms: arrival, from the trace's beginning.
        input_tokens: length of the prompt.
        output_tokens: length of the answer.
        hash_ids: one id for each block of the prompt, the partial tail included.
    """

    timestamp_ms: int
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Ids of the blocks that are full; a partial tail is never cached."""
        return self.hash_ids[: self.input_tokens // TRACE_BLOCK_TOKENS]


_decoder: Final = msgspec.json.Decoder(TraceRequest)


def block_key(hash_id: int) -> bytes:
    """The 32-byte block key of a trace's id: it stands for a whole prefix, so no chaining is needed."""
    return sha256(_KEY_PREFIX + hash_id.to_bytes(8, "little")).digest()


def read_trace(path: str | PathLike[str], limit: int | None = None) -> list[TraceRequest]:
    """The first ``limit`` requests of a trace file, or all of them.

    Raises:
        InvalidArgument: the file cannot be read, holds no request, or a line is wrong, named as ``file:line``.
    """
    try:
        with open(path, "rb") as lines:
            requests = list(islice(parse_trace(trace_lines(lines, str(path)), str(path)), limit))
    except OSError as error:
        raise InvalidArgument(f"cannot read the trace {str(path)!r}: {error.strerror or error}") from None
    if not requests:
        raise InvalidArgument(f"the trace {str(path)!r} holds no requests")
    return requests


def parse_trace(lines: Iterable[bytes], name: str) -> Iterator[TraceRequest]:
    """Decode and check lines in order; ``name`` stands in errors.

    Fields that the format does not know are skipped, because recorders add their own.

    Raises:
        InvalidArgument: a line is no request, or an id follows another id than before.
    """
    parents: dict[int, int | None] = {}
    for number, line in enumerate(lines, 1):
        try:
            request = _decoder.decode(line)
            _check(request, parents)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidArgument) as error:
            what = "the line is empty" if not line.strip() else str(error)
            raise InvalidArgument(f"{name}:{number}: {what}") from None
        yield request


def _check(request: TraceRequest, parents: dict[int, int | None]) -> None:
    for field, value in (
        ("timestamp", request.timestamp_ms),
        ("input_length", request.input_tokens),
        ("output_length", request.output_tokens),
    ):
        if not 0 <= value < _MAX_TOKENS:
            raise InvalidArgument(f"{field} must be 0 or more and less than 2**40, got {value}")
    blocks = -(-request.input_tokens // TRACE_BLOCK_TOKENS)
    if len(request.hash_ids) != blocks:
        raise InvalidArgument(
            f"input_length {request.input_tokens} is {blocks} {'block' if blocks == 1 else 'blocks'} of "
            f"{TRACE_BLOCK_TOKENS} tokens, but hash_ids has {len(request.hash_ids)}"
        )
    parent: int | None = None
    for hash_id in request.full_blocks:
        if not 0 <= hash_id <= _MAX_ID:
            raise InvalidArgument(f"hash_ids must be 0 or more and less than 2**64, got {hash_id}")
        before = parents.setdefault(hash_id, parent)
        if before != parent:
            raise InvalidArgument(
                f"hash id {hash_id} stands for a whole prefix, but follows {_named(parent)} here "
                f"and {_named(before)} earlier"
            )
        parent = hash_id


def _named(hash_id: int | None) -> str:
    return "nothing" if hash_id is None else f"id {hash_id}"
