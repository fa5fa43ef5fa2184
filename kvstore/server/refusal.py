"""A request that cannot be carried out, and the keys of one that can."""

from __future__ import annotations

from kvstore.errors import ErrorCode, InvalidArgument
from kvstore.protocol.keys import KEY_BYTES, split_keys
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST, MAX_WAIT_MS


class Refused(Exception):
    """A request that gets an ``ErrorReply``; the connection and the session go on."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def keys_of(joined: bytes) -> list[bytes]:
    """The keys of a request.

    Raises:
        Refused: they are too many, or no keys.
    """
    if len(joined) > MAX_KEYS_PER_REQUEST * KEY_BYTES:
        raise Refused(ErrorCode.BAD_REQUEST, f"a request takes at most {MAX_KEYS_PER_REQUEST} keys")
    try:
        return split_keys(joined)
    except InvalidArgument as error:
        raise Refused(ErrorCode.BAD_REQUEST, str(error)) from None


def check_ahead(wait_ms: int) -> None:
    """Refuse a time ahead that is longer than any may be.

    Raises:
        Refused: it is.
    """
    if wait_ms > MAX_WAIT_MS:
        raise Refused(ErrorCode.BAD_REQUEST, f"{wait_ms} ms are further ahead than {MAX_WAIT_MS} ms, the most there is")
