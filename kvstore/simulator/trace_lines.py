"""The lines of a trace file, which must be text: what is packed, or no text at all, is told by its first bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from kvstore.errors import InvalidArgument

__all__ = ["trace_lines"]

_PACKED: Final = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"PK\x03\x04": ("zip", "unzip"),
}
"""What files of archives begin with, their names, and what unpacks them."""


def trace_lines(lines: Iterable[bytes], name: str) -> Iterator[bytes]:
    """The same lines, the first one without a byte order mark of UTF-8.

    Args:
        lines: of a file, from its beginning.
        name: of the file, for errors.

    Raises:
        InvalidArgument: the file is packed or no text in UTF-8, by its first line.
    """
    iterator = iter(lines)
    first = next(iterator, None)
    if first is None:
        return iter(())
    for magic, (what, command) in _PACKED.items():
        if first.startswith(magic):
            raise InvalidArgument(f"the trace {name!r} is packed with {what}: unpack it first ({command})")
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidArgument(f"the trace {name!r} is text in UTF-16; a trace is lines of JSON in UTF-8")
    first = first.removeprefix(codecs.BOM_UTF8)
    if not _is_text(first):
        raise InvalidArgument(
            f"the trace {name!r} is no text: a trace is lines of JSON in UTF-8, or what the daemon recorded"
        )
    return chain([first], iterator)


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in line
