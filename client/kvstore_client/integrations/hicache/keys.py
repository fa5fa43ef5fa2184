"""Page hashes of SGLang as keys of the store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from kvstore.protocol.keys import ROOT_KEY, BlockKey

__all__ = ["key_of", "keys_of", "parent_of"]

_HASH: Final = re.compile(r"[0-9a-f]{64}")


def key_of(name: str) -> BlockKey:
    """The key of a page: the hash itself where it is a sha256 in hex, else the sha256 of the text."""
    if _HASH.fullmatch(name):
        key = bytes.fromhex(name)
        if key != ROOT_KEY:
            return key
    return sha256(b"sglang page\0" + name.encode("utf-8", "surrogatepass")).digest()


def keys_of(names: Sequence[str]) -> list[BlockKey]:
    """Keys of pages, in order."""
    return [key_of(name) for name in names]


def parent_of(extra_info: object) -> BlockKey | None:
    """Key of the page before the first one of a call, None where SGLang does not say it.

    Args:
        extra_info: SGLang's ``HiCacheStorageExtraInfo``, whose ``prefix_keys`` are the hashes before the call's.
    """
    before = getattr(extra_info, "prefix_keys", None)
    return key_of(before[-1]) if before else None
