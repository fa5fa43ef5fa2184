"""Planes that are copied as they are: exact planes of lossy codecs, and whole blocks (``docs/codecs.md``)."""

from __future__ import annotations

from kvstore_kernels.cpu.code import kernel
from kvstore_kernels.cpu.kinds import Kind, element_bytes
from kvstore_kernels.cpu.memory import copy, load
from kvstore_kernels.cpu.work import DIM, PLANE, ROW_COUNT, ROWS, TARGET_TOKEN_STRIDE, copied_plane, next_plane


@kernel
def encode_exact(kind: Kind, work: int, place: int) -> None:
    """Gather planes (``work``)."""
    tokens, row_bytes = load(work + ROW_COUNT), load(work + DIM) * element_bytes(kind)
    stride = load(work + TARGET_TOKEN_STRIDE)
    while next_plane(work, place) != 0:
        plane, rows, target = load(place + PLANE), load(place + ROWS), copied_plane(work, place)
        for token in range(tokens):
            copy(target + token * stride, plane + load(rows + 8 * token), row_bytes)


@kernel
def decode_exact(kind: Kind, work: int, place: int) -> None:
    """Scatter planes (``work``)."""
    tokens, row_bytes = load(work + ROW_COUNT), load(work + DIM) * element_bytes(kind)
    stride = load(work + TARGET_TOKEN_STRIDE)
    while next_plane(work, place) != 0:
        plane, rows, source = load(place + PLANE), load(place + ROWS), copied_plane(work, place)
        for token in range(tokens):
            copy(plane + load(rows + 8 * token), source + token * stride, row_bytes)
