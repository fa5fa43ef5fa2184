"""What callers hand in: buffers, keys and small values, checked before anything is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.errors import InvalidArgument
from kvstore.protocol.keys import join_keys
from kvstore.protocol.version import MAX_KEYS_PER_REQUEST, MAX_PRIORITY, MAX_TTL_MS, MAX_WAIT_MS, NORMAL_PRIORITY


def buffer_of(data: object, what: str, *, writable: bool = False) -> memoryview:
    """The bytes of a contiguous buffer (bytes, memoryview, numpy, CPU torch), without a copy.

    Raises:
        InvalidArgument: not a buffer, not contiguous, empty, or read-only where it must be written.
    """
    if hasattr(data, "untyped_storage"):
        data = _torch_bytes(data, what)
    try:
        view = memoryview(data)  # type: ignore[arg-type]
    except TypeError:
        # numpy has no buffer format for bfloat16 and the like; their bytes are as good.
        try:
            view = memoryview(data.view("uint8"))  # type: ignore[attr-defined]
        except (AttributeError, TypeError, ValueError):
            raise InvalidArgument(
                f"{what} must be bytes, a memoryview, a numpy array or a CPU torch tensor, got {type(data).__name__}"
            ) from None
    except ValueError as error:
        raise InvalidArgument(f"{what}: {error}") from None
    if "O" in view.format:
        raise InvalidArgument(f"{what} holds Python objects, whose bytes are addresses of this process")
    if not view.c_contiguous:
        raise InvalidArgument(f"{what} must be contiguous; copy it first")
    if not view.nbytes:
        raise InvalidArgument(f"{what} is empty; a block has at least one byte")
    if writable and view.readonly:
        raise InvalidArgument(f"{what} is read-only")
    return view.cast("B")


def _torch_bytes(tensor: Any, what: str) -> Any:
    """A CPU tensor's bytes as numpy, for any dtype; torch is the caller's, it is not imported here."""
    if tensor.device.type != "cpu":
        raise InvalidArgument(f"{what} is on {tensor.device}; this version takes CPU tensors")
    if not tensor.is_contiguous():
        raise InvalidArgument(f"{what} must be contiguous; call .contiguous() first")
    flat = tensor.detach().reshape(-1)
    return flat.view(_uint8_of(flat)).numpy()


def _uint8_of(tensor: Any) -> Any:
    return sys.modules[type(tensor).__module__.partition(".")[0]].uint8


def milliseconds(seconds: object, what: str) -> int:
    """A time ahead on the wire, at least a millisecond.

    Raises:
        InvalidArgument: not a number of seconds above 0, or more than a day.
    """
    good = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds <= MAX_WAIT_MS / 1000
    if not good:
        raise InvalidArgument(f"{what} must be more than 0 and at most {MAX_WAIT_MS // 1000} seconds, got {seconds!r}")
    assert isinstance(seconds, (int, float))
    return max(round(seconds * 1000), 1)


def list_of(items: Sequence[Any]) -> list[Any]:
    """A list, as compiled functions take it, without a copy where it is one.

    Raises:
        InvalidArgument: it is no sequence of several things, but one key.
    """
    if type(items) is list:
        return items
    if isinstance(items, (bytes, bytearray, memoryview, str)) or not isinstance(items, Iterable):
        raise InvalidArgument(f"keys must be a sequence of 32-byte keys, got one {type(items).__name__}")
    return list(items)


def check_read(part: object, request: object) -> None:
    """``check_part`` and ``check_request``, the usual case first."""
    if request is None and type(part) is int and 0 <= part < 1 << 16:
        return
    check_part(part)
    check_request(request)


def check_request(request: object) -> None:
    """Refuse what is no ``Match.request``.

    Raises:
        InvalidArgument: not None and not a whole number below 2**63.
    """
    if request is not None and (type(request) is not int or not 0 <= request < 1 << 63):
        raise InvalidArgument(f"request must be the .request of a match, got {request!r}")


def check_durable(durable: object, wait: object) -> None:
    """Refuse a put that is to be durable and does not wait.

    Raises:
        InvalidArgument: it is one.
    """
    if durable and not wait:
        raise InvalidArgument("durable=True waits until the blocks are durable; it does not go with wait=False")


def check_retention(priority: object, ttl_s: object, drop: object) -> None:
    """Refuse a retention that there cannot be.

    Raises:
        InvalidArgument: the priority is not 0 to 100, the time not positive, or blocks are to be dropped at no time.
    """
    if not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority <= MAX_PRIORITY:
        raise InvalidArgument(
            f"priority must be a whole number from 0 to {MAX_PRIORITY} ({NORMAL_PRIORITY} is normal), got {priority!r}"
        )
    longest_s = MAX_TTL_MS // 1000
    if ttl_s is not None and (
        isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 < ttl_s <= longest_s
    ):
        raise InvalidArgument(f"ttl_s must be more than 0 and at most {longest_s} seconds, or None, got {ttl_s!r}")
    if drop and ttl_s is None:
        raise InvalidArgument("drop=True removes blocks at the end of their time: it needs ttl_s")


def check_text(**arguments: object) -> None:
    """Refuse arguments that must be text and are not.

    Args:
        arguments: by their names, which stand in the error.

    Raises:
        InvalidArgument: one is no ``str``.
    """
    for name, given in arguments.items():
        if not isinstance(given, str):
            raise InvalidArgument(f"{name} must be text, got {given!r}")


def check_part(part: object) -> None:
    """Refuse a part that no record can have.

    Raises:
        InvalidArgument: not an integer in 0 to 65535.
    """
    if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < 1 << 16:
        raise InvalidArgument(f"part must be a whole number from 0 to 65535, got {part!r}")


def batches(keys: Sequence[bytes], most: int = MAX_KEYS_PER_REQUEST) -> list[bytes]:
    """Keys, one behind the other, in pieces that a request takes."""
    joined = join_keys(keys)
    step = 32 * most
    return [joined[at : at + step] for at in range(0, len(joined), step)]
