"""Block keys: 32 bytes, chained over the tokens of a prefix.

``key = sha256(parent key | little-endian u32 tokens | extra)``; the root's parent is 32 zero bytes and the
salt is the extra of block 0 only. Engines may use their own 32-byte hashes instead: the store never looks
inside a key.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any, Final

from kvstore.errors import InvalidArgument

KEY_BYTES: Final = 32
_MANY: Final = struct.Struct(f"{KEY_BYTES}s" * 64)

ROOT_KEY: Final = bytes(KEY_BYTES)
"""Parent of every first block. Never a key itself."""

BlockKey = bytes
"""A 32-byte block key."""


def check_key(key: object, what: str = "key") -> bytes:
    """Return ``key`` as bytes.

    Raises:
        InvalidArgument: it is not bytes-like, not 32 bytes, or the all-zero root.
    """
    if type(key) is not bytes:
        if not isinstance(key, (bytearray, memoryview)):
            raise InvalidArgument(
                f"{what} must be {KEY_BYTES} bytes, got {type(key).__name__}; make keys with chain_keys()"
            )
        key = bytes(key)
    if len(key) != KEY_BYTES:
        raise InvalidArgument(f"{what} must be {KEY_BYTES} bytes, got {len(key)}; make keys with chain_keys()")
    if key == ROOT_KEY:
        raise InvalidArgument(f"{what} is the all-zero root, which names no block")
    return key


def check_parent(parent: object) -> bytes:
    """Return the parent key as bytes; None means the root.

    Raises:
        InvalidArgument: as ``check_key``.
    """
    if parent is None:
        return ROOT_KEY
    if isinstance(parent, (bytes, bytearray, memoryview)) and parent == ROOT_KEY:
        return ROOT_KEY
    return check_key(parent, "parent")


def join_keys(keys: Iterable[object], what: str = "keys") -> bytes:
    """Concatenate keys for the wire.

    Raises:
        InvalidArgument: as ``check_key``, naming the index.
    """
    if isinstance(keys, (bytes, bytearray, memoryview, str)) or not isinstance(keys, Iterable):
        raise InvalidArgument(f"{what} must be a sequence of {KEY_BYTES}-byte keys, got one {type(keys).__name__}")
    given = list(keys)
    whole = [key for key in given if type(key) is bytes and len(key) == KEY_BYTES]
    if len(whole) == len(given) and ROOT_KEY not in whole:
        return b"".join(whole)
    return b"".join(check_key(key, f"{what}[{index}]") for index, key in enumerate(given))


def split_keys(joined: bytes) -> list[bytes]:
    """Inverse of ``join_keys``.

    Raises:
        InvalidArgument: the length is not a multiple of 32.
    """
    if len(joined) % KEY_BYTES:
        raise InvalidArgument(f"{len(joined)} bytes of keys are not a multiple of {KEY_BYTES}")
    keys: list[bytes] = []
    whole = len(joined) - len(joined) % _MANY.size
    for at in range(0, whole, _MANY.size):
        keys += _MANY.unpack_from(joined, at)
    keys += [joined[at : at + KEY_BYTES] for at in range(whole, len(joined), KEY_BYTES)]
    return keys


def token_bytes(tokens: Any) -> bytes:
    """Tokens as little-endian u32 bytes.

    Args:
        tokens: a sequence of ints, or anything with ``__array__`` (numpy, CPU torch) of one dimension.

    Raises:
        InvalidArgument: a token is not an integer in ``[0, 2**32)``, or there is more than one dimension.
    """
    if hasattr(tokens, "__array__"):
        import numpy as np

        try:
            values = np.asarray(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgument(f"tokens must be integers in host memory: {error}") from None
        if values.ndim != 1:
            raise InvalidArgument(f"tokens must have one dimension, got shape {values.shape}")
        if values.size == 0:
            return b""
        if values.dtype.kind not in "iu":
            raise InvalidArgument(f"tokens must be integers, got dtype {values.dtype}")
        if int(values.min()) < 0 or int(values.max()) >= 1 << 32:
            raise InvalidArgument("tokens must lie in [0, 2**32)")
        return values.astype("<u4").tobytes()
    if isinstance(tokens, (bytes, bytearray)):
        raise InvalidArgument(
            f"tokens must be a sequence of integers, got {type(tokens).__name__}; "
            "view packed tokens with numpy.frombuffer(tokens, '<u4')"
        )
    try:
        packed = array.array("I", tokens)
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidArgument(f"tokens must be integers in [0, 2**32): {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def chain_keys(
    tokens: Sequence[int] | Any, block_tokens: int, *, parent: bytes | None = None, salt: bytes = b""
) -> list[bytes]:
    """Keys of the full blocks of a token sequence; a partial tail has no key.

    Args:
        tokens: token ids (see ``token_bytes``).
        block_tokens: tokens a block, at least 1.
        parent: key of the block before the first, for a sequence that goes on; None for a prompt's beginning.
        salt: the extra of block 0; it changes all keys of a prompt (a tenant, a LoRA, an image). It is not
            applied where ``parent`` is given, because the parent already carries it.

    Returns:
        ``len(tokens) // block_tokens`` keys of 32 bytes.

    Raises:
        InvalidArgument: bad tokens, ``block_tokens`` or parent.
    """
    given: object = block_tokens
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise InvalidArgument(f"block_tokens must be a whole number of at least 1, got {block_tokens!r}")
    if not isinstance(salt, (bytes, bytearray, memoryview)):
        raise InvalidArgument(f"salt must be bytes, got {type(salt).__name__}")
    packed = token_bytes(tokens)
    block_bytes = 4 * block_tokens
    previous = check_parent(parent)
    extra = bytes(salt) if previous == ROOT_KEY else b""
    keys: list[bytes] = []
    for at in range(0, len(packed) - block_bytes + 1, block_bytes):
        previous = sha256(previous + packed[at : at + block_bytes] + extra).digest()
        extra = b""
        keys.append(previous)
    return keys
