"""Reading Python objects from compiled code that holds the interpreter lock.

The calls are those of CPython's stable ABI, so nothing here knows how an object is laid out. They save what costs more
than a lookup: joining keys, making memoryviews, asking arrays for their address. Objects are named by ``id()``; the
caller holds a reference and the lock.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.mapped.atomics import load, store
from kvstore.mapped.compiled import inlined

_word: Final = types.int64
_get_item: Final = types.ExternalFunction("PyList_GetItem", _word(_word, _word))
_bytes_of: Final = types.ExternalFunction("PyBytes_AsStringAndSize", types.int32(_word, _word, _word))
_get_buffer: Final = types.ExternalFunction("PyObject_GetBuffer", types.int32(_word, _word, types.int32))
_release: Final = types.ExternalFunction("PyBuffer_Release", types.void(_word))
_clear_error: Final = types.ExternalFunction("PyErr_Clear", types.void())

# ``Py_buffer`` is part of the stable ABI since Python 3.11 (PEP 688's predecessor, bpo-45459): its first fields.
BUFFER_BYTES: Final = 80
_BUFFER_OBJECT: Final = 8
_BUFFER_LENGTH: Final = 16
_BUFFER_FORMAT: Final = 40

_WRITABLE: Final = 1
_CONTIGUOUS_WITH_FORMAT: Final = 4 | 8
"""``PyBUF_FORMAT | PyBUF_ND``: without strides an exporter must refuse what is not C-contiguous."""
_OBJECTS: Final = ord("O")


@intrinsic
def _load_byte(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return builder.zext(byte, ir.IntType(64))

    return types.int64(types.int64), generate


@inlined
def list_item(list_id: int, index: int) -> int:
    """The ``id`` of a list's item, 0 where the list does not reach so far (any more)."""
    item = _get_item(list_id, index)
    if item == 0:
        _clear_error()
    return item


@inlined
def key_address(key_id: int, scratch: int) -> int:
    """Address of a 32-byte ``bytes`` object's bytes; 0 where it is no such thing.

    Args:
        key_id: of any object.
        scratch: two words that are overwritten.
    """
    if key_id == 0:
        return 0
    if _bytes_of(key_id, scratch, scratch + 8) != 0:
        _clear_error()
        return 0
    return load(scratch) if load(scratch + 8) == 32 else 0


@inlined
def open_buffer(object_id: int, buffer: int, writable: int) -> int:
    """Get a C-contiguous buffer of plain values.

    Args:
        object_id: of any object.
        buffer: ``BUFFER_BYTES`` bytes of memory for the ``Py_buffer``.
        writable: whether it will be written to.

    Returns:
        1; ``close_buffer`` must follow. 0: the object gives no such buffer, and nothing has to be closed.
    """
    if object_id == 0:
        return 0
    if _get_buffer(object_id, buffer, types.int32(_CONTIGUOUS_WITH_FORMAT + (_WRITABLE if writable else 0))) != 0:
        _clear_error()
        return 0
    character = load(buffer + _BUFFER_FORMAT)
    if character != 0:
        byte = _load_byte(character)
        while byte != 0:
            if byte == _OBJECTS:
                _release(buffer)
                return 0
            character += 1
            byte = _load_byte(character)
    return 1


@inlined
def buffer_address(buffer: int) -> int:
    """Where the bytes are."""
    return load(buffer)


@inlined
def buffer_length(buffer: int) -> int:
    """How many bytes there are."""
    return load(buffer + _BUFFER_LENGTH)


@inlined
def buffer_is_open(buffer: int) -> bool:
    """Whether memory that was zero, or used for a buffer before, holds one now."""
    return load(buffer + _BUFFER_OBJECT) != 0


@inlined
def close_buffer(buffer: int) -> None:
    """Give a buffer back."""
    _release(buffer)
    store(buffer, 0)
