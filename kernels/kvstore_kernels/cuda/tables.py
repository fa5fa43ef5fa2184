"""Tables of the turbo kernels, as CUDA source, from the levels and thresholds of the reference implementation."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from kvstore_kernels.codecs.turbo import DEVIATION, LEVELS, SIGNS, THRESHOLDS

__all__ = ["turbo_tables"]

_LANES: Final = 32
_CELLS: Final = 31
_HALF_RANGE: Final = 8192
_MAGIC_BITS: Final = 0x4B400000
_NEVER: Final = 40_000
"""A border above every rounded coordinate; those are at most 2048 times the square root of 128."""


def turbo_tables() -> str:
    """Definitions of ``KV_FLIPS``, ``KV_CELLS``, ``KV_LEVELS`` and ``KV_VALUES`` (``sources/turbo.cuh``)."""
    flips = ", ".join(f"{{{{{_words(_flip_words(entry))}}}}}" for entry in range(16))
    lines = [f"#define KV_FLIPS {flips}"]
    for name, table in (("CELLS", _cells), ("LEVELS", _levels), ("VALUES", _values)):
        rows = ", ".join(f"{{{_words(table(bits))}}}" for bits in (4, 3, 2))
        lines.append(f"#define KV_{name} {rows}")
    return "\n".join(lines) + "\n"


def _words(words: Iterable[int]) -> str:
    return ", ".join(f"0x{word & 0xFFFFFFFF:x}u" for word in words)


def _flip_words(entry: int) -> list[int]:
    """Signs of elements ``8 * entry`` and on: of an even one at bit 15, of the next at bit 31."""
    byte = SIGNS[entry]
    return [(byte >> (2 * word) & 1) << 15 | (byte >> (2 * word + 1) & 1) << 31 for word in range(4)]


def _borders(bits: int) -> list[int]:
    """Where codes change: the code of y, counted from the lowest level, is how many of these are at or below y."""
    above = [threshold + 1 for threshold in THRESHOLDS[bits]]
    return sorted([-threshold for threshold in THRESHOLDS[bits]] + [0] + above)


def _cells(bits: int) -> list[int]:
    """What to add to ``_MAGIC_BITS + y``, by cell, for the code of y in the upper half."""
    borders = _borders(bits)
    words = []
    for cell in range(_LANES):
        # y is in the cell where floor(31 * (y + 8192) / 16384) is its number; the last one is of y from 8192 on alone.
        first = -(-cell * 2 * _HALF_RANGE // _CELLS) - _HALF_RANGE
        last = -(-(cell + 1) * 2 * _HALF_RANGE // _CELLS) - _HALF_RANGE - 1
        inside = [border for border in borders if first < border <= last]
        if len(inside) > 1:
            raise ValueError(f"turbo{bits}: cell {cell} has the borders {inside}; at most one fits")
        below = sum(border <= first for border in borders)
        border = inside[0] if inside else _NEVER
        words.append((below << 16) + (1 << 16) - border - _MAGIC_BITS)
    return words


def _levels(bits: int) -> list[int]:
    """Signed levels by a code counted from the lowest."""
    signed = [-level for level in reversed(LEVELS[bits])] + list(LEVELS[bits])
    return [signed[lane % len(signed)] for lane in range(_LANES)]


def _values(bits: int) -> list[int]:
    """Levels as float32 by what a lane number has of a stored code: sign and magnitude; at 3 bits magnitude alone."""
    values = [level / DEVIATION for level in LEVELS[bits]]
    if bits != 3:
        values += [-value for value in values]
    return [struct.unpack("<I", struct.pack("<f", values[lane % len(values)]))[0] for lane in range(_LANES)]
