"""Values taken apart into byte planes with the sign last, and put together again (``docs/codecs.md``, lossless)."""

from __future__ import annotations

from llvmlite import ir

from kvstore_kernels.cpu.code import kernel
from kvstore_kernels.cpu.kinds import Kind, element_bytes
from kvstore_kernels.cpu.lanes import I8, I64, Value, vector
from kvstore_kernels.cpu.vectors import Vectors, emitted

_STEP = 32
"""Values that are taken together."""


def _split(v: Vectors, kind: Kind, source: Value, planes: Value, pitch: Value, count: int) -> None:
    width = 8 * kind.element_bytes
    values = v.load(source, vector(ir.IntType(width), count))
    rotated = v.b.or_(v.shifted(values, 1), v.shifted(values, 1 - width))
    for plane in range(kind.element_bytes):
        part = v.shifted(rotated, -8 * plane)
        part = part if width == 8 else v.b.trunc(part, vector(I8, count))
        v.store(part, v.at(planes, v.b.mul(pitch, I64(plane))))


def _join(v: Vectors, kind: Kind, target: Value, planes: Value, offset: Value, count: int) -> None:
    width = 8 * kind.element_bytes
    parts = []
    for plane in range(kind.element_bytes):
        part = v.load(v.at(v.load(planes, I64, 8 * plane), offset), vector(I8, count))
        part = part if width == 8 else v.b.zext(part, vector(ir.IntType(width), count))
        parts.append(v.shifted(part, 8 * plane))
    rotated = v.any_of(parts)
    v.store(v.b.or_(v.shifted(rotated, -1), v.shifted(rotated, width - 1)), target)


@emitted
def _split_step(v: Vectors, kind: Kind, source: Value, planes: Value, pitch: Value) -> None:
    _split(v, kind, source, planes, pitch, _STEP)


@emitted
def _split_one(v: Vectors, kind: Kind, source: Value, planes: Value, pitch: Value) -> None:
    _split(v, kind, source, planes, pitch, 1)


@emitted
def _join_step(v: Vectors, kind: Kind, target: Value, planes: Value, offset: Value) -> None:
    _join(v, kind, target, planes, offset, _STEP)


@emitted
def _join_one(v: Vectors, kind: Kind, target: Value, planes: Value, offset: Value) -> None:
    _join(v, kind, target, planes, offset, 1)


@kernel
def split_planes(kind: Kind, source: int, planes: int, count: int) -> None:
    """Take ``count`` values apart.

    Args:
        kind: of the values.
        source: address of the values.
        planes: address of the planes, ``count`` bytes each, one behind another.
        count: values.
    """
    size = element_bytes(kind)
    whole = count // _STEP * _STEP
    for i in range(0, whole, _STEP):
        _split_step(kind, source + i * size, planes + i, count)
    for i in range(whole, count):
        _split_one(kind, source + i * size, planes + i, count)


@kernel
def join_planes(kind: Kind, target: int, planes: int, count: int) -> None:
    """Put ``count`` values together.

    Args:
        kind: of the values.
        target: address of the values.
        planes: address of int64 addresses of the planes.
        count: values.
    """
    size = element_bytes(kind)
    whole = count // _STEP * _STEP
    for i in range(0, whole, _STEP):
        _join_step(kind, target + i * size, planes, i)
    for i in range(whole, count):
        _join_one(kind, target + i * size, planes, i)
