"""Request traces in the format of Alibaba Cloud's Bailian (Qwen): one JSON object a line, 16 tokens a block.

``{"chat_id": id, "parent_chat_id": id or -1, "timestamp": seconds, "input_length": tokens, "output_length": tokens,
"type": text, "turn": number, "hash_ids": [one id for each block]}``. An id stands for the content of a block; whether
also for all before it, the format does not promise. So a block is known by its id and the block in front of it. The
last id of a prompt may be of a partial block, or missing.

Covers: reading and checking. Fields that are of no use here need not be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final

import msgspec

from kvstore.errors import InvalidArgument
from kvstore.simulator.requests import MAX_TOKENS, Request

__all__ = ["BAILIAN_BLOCK_TOKENS", "parse_bailian"]

BAILIAN_BLOCK_TOKENS: Final = 16
"""Tokens a block, which the format fixes."""

_NS_PER_S: Final = 1_000_000_000
_MAX_TIMESTAMP_S: Final = 1 << 33


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: Annotated[int, msgspec.Meta(ge=0, lt=MAX_TOKENS)]
    output_length: Annotated[int, msgspec.Meta(ge=0, lt=MAX_TOKENS)]
    hash_ids: tuple[int, ...]


_decoder: Final = msgspec.json.Decoder(_Line)


def parse_bailian(lines: Iterable[bytes], name: str) -> Iterator[Request]:
    """Decode and check lines in order; ``name`` stands in errors. Ids are numbers from 0 on, in order of appearance.

    Raises:
        InvalidArgument: a line is no request, named as ``file:line``.
    """
    chains: dict[tuple[int, int], int] = {}
    for number, line in enumerate(lines, 1):
        try:
            decoded = _decoder.decode(line)
            _check(decoded)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidArgument) as error:
            what = "the line is empty" if not line.strip() else str(error)
            raise InvalidArgument(f"{name}:{number}: {what}") from None
        ids = []
        at = -1
        for hash_id in decoded.hash_ids[: decoded.input_length // BAILIAN_BLOCK_TOKENS]:
            at = chains.setdefault((at, hash_id), len(chains))
            ids.append(at)
        yield Request(round(decoded.timestamp * _NS_PER_S), decoded.input_length, decoded.output_length, tuple(ids))


def _check(line: _Line) -> None:
    if not 0 <= line.timestamp < _MAX_TIMESTAMP_S:
        raise InvalidArgument(f"timestamp must be seconds, 0 or more and less than 2**33, got {line.timestamp:g}")
    full = line.input_length // BAILIAN_BLOCK_TOKENS
    if not full <= len(line.hash_ids) <= full + 1:
        raise InvalidArgument(
            f"input_length {line.input_length} is {full} full {'block' if full == 1 else 'blocks'} of "
            f"{BAILIAN_BLOCK_TOKENS} tokens, but hash_ids has {len(line.hash_ids)}"
        )
