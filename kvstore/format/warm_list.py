"""Warm-up lists: text files that say which chains of blocks are worth having in memory.

A line is a chain, or a part of one, as keys of 64 hexadecimal digits, parents first; chains stand in
the order of their worth. ``namespace DIGEST NAME`` says of which namespace the lines behind it are, by the hexadecimal
digits of its digest (eight at least). Empty lines and those that begin with ``#`` say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import KEY_BYTES, ROOT_KEY

__all__ = ["WarmChain", "parse_warm_list", "render_warm_list"]

FIRST_LINE: Final = "# kvstore warm 1"
FEWEST_DIGEST_BYTES: Final = 4


class WarmChain(NamedTuple):
    """A chain of a list, and the digest of its namespace or the first bytes of it; b"" where the list does not say."""

    digest: bytes
    keys: list[bytes]


def parse_warm_list(lines: Iterable[str], source: str) -> Iterator[WarmChain]:
    """Read a list.

    Args:
        lines: of the file.
        source: what to call it in errors.

    Raises:
        InvalidArgument: naming the line and what is wrong with it.
    """
    digest = b""
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] == "namespace":
            digest = _digest(words[1] if len(words) > 1 else "", f"{source} line {number}")
            continue
        keys: list[bytes] = []
        for word in words:
            key = _hex(word)
            if key is None or len(key) != KEY_BYTES or key == ROOT_KEY:
                raise InvalidArgument(
                    f"{source} line {number}: {word[:80]!r} is no block key (64 hexadecimal digits); token ids need "
                    "--block-tokens"
                )
            keys.append(key)
        yield WarmChain(digest, keys)


def render_warm_list(chains: Iterable[tuple[bytes, str, list[bytes]]]) -> Iterator[str]:
    """Lines of a list, each with its end, of chains with the digest and the name of their namespaces."""
    yield f"{FIRST_LINE}\n"
    last = b""
    for digest, name, keys in chains:
        if digest != last:
            yield f"namespace {digest.hex()} {' '.join(name.split())}".rstrip() + "\n"
            last = digest
        yield " ".join(key.hex() for key in keys) + "\n"


def _digest(word: str, where: str) -> bytes:
    found = _hex(word)
    if found is None or not FEWEST_DIGEST_BYTES <= len(found) <= KEY_BYTES:
        raise InvalidArgument(f"{where}: namespace needs 8 to 64 hexadecimal digits of its digest, got {word[:80]!r}")
    return found


def _hex(word: str) -> bytes | None:
    try:
        return bytes.fromhex(word)
    except ValueError:
        return None
