"""Header frames to structs and back. Nothing is ever unpickled; payloads never pass through here."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from kvstore.errors import InvalidArgument, KVStoreError
from kvstore.protocol.messages import AnyReply, AnyRequest
from kvstore.protocol.version import MAX_HEADER_FRAME_BYTES

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()
_requests: Final[msgspec.msgpack.Decoder[AnyRequest]] = msgspec.msgpack.Decoder(AnyRequest)
_replies: Final[msgspec.msgpack.Decoder[AnyReply]] = msgspec.msgpack.Decoder(AnyReply)
_MAX_CAUSE: Final = 300
"""Characters of a decoder's complaint that are passed on: it may quote the frame, which may be long."""


class _Envelope(msgspec.Struct, array_like=True):
    """The first two elements of a request; what follows is skipped, not built."""

    tag: msgspec.Raw
    id: int


_envelopes: Final = msgspec.msgpack.Decoder(_Envelope)

encode = _encoder.encode
"""Struct to the bytes of a header frame."""


def decode_request(frame: bytes | memoryview) -> AnyRequest:
    """A request from its header frame.

    Raises:
        InvalidArgument: not a request, with the field that is wrong.
    """
    return _decode(_requests, frame, "request")


def decode_reply(frame: bytes | memoryview) -> AnyReply:
    """A reply from its header frame.

    Raises:
        InvalidArgument: not a reply.
    """
    return _decode(_replies, frame, "reply")


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes | memoryview, what: str) -> T:
    if len(frame) > MAX_HEADER_FRAME_BYTES:
        raise InvalidArgument(f"the {what}'s header frame has {len(frame)} bytes, over {MAX_HEADER_FRAME_BYTES}")
    try:
        return decoder.decode(frame)
    except (KVStoreError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        cause = str(error)
        if len(cause) > _MAX_CAUSE:
            cause = f"{cause[:_MAX_CAUSE]}..."
        raise InvalidArgument(f"malformed {what}: {cause}") from None


def request_id(frame: bytes | memoryview) -> int | None:
    """The id of a request that did not decode, if its first two fields still do; else None."""
    if len(frame) > MAX_HEADER_FRAME_BYTES:
        return None
    try:
        value = _envelopes.decode(frame).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        return None
    return value if 0 <= value < 1 << 64 else None
