"""Sizes in bytes as people write and read them: ``8GiB``, ``512MiB``, ``64KiB``, ``2GB``."""

from __future__ import annotations

import re
from typing import Final

from kvstore.errors import InvalidArgument

__all__ = ["SIZE_FORMS", "format_size", "parse_size"]

SIZE_FORMS: Final = "bytes as a whole number, or like 8GiB, 512MiB, 64KiB, 2GB"
"""What ``parse_size`` accepts, for error messages."""

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:_[0-9]+)*)(?:\.([0-9]+))?\s*([A-Za-z]*)\s*", re.ASCII)
_LARGEST: Final = 1 << 63
_LARGEST_FRACTION_DIGITS: Final = 12


def parse_size(value: str | int) -> int:
    """Bytes of a size.

    Args:
        value: whole bytes, or text with a unit: B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB, TB
            (powers of 1000). Units are case-sensitive, because ``Gb`` means bits to many. Fractions must come
            out whole.

    Returns:
        At least 1.

    Raises:
        InvalidArgument: no size, an unknown unit, zero, negative, a fraction of a byte, or 2**63 and more.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidArgument(f"a size is {SIZE_FORMS}; got {value!r}")
    if isinstance(value, int):
        return _checked(value, value)
    match = _SIZE.fullmatch(value)
    if match is None:
        if value.strip().startswith("-") and _SIZE.fullmatch(value.strip()[1:]):
            raise InvalidArgument(f"a size must be more than 0, got {value!r}")
        raise InvalidArgument(f"{value!r} is no size; write {SIZE_FORMS}")
    whole, fraction, unit = match.group(1), match.group(2) or "", match.group(3)
    if unit not in _UNITS:
        meant = next((known for known in _UNITS if known.lower() == unit.lower()), None)
        hint = f" (did you mean {meant}?)" if meant else ""
        raise InvalidArgument(f"{value!r} has the unknown unit {unit!r}{hint}; write {SIZE_FORMS}")
    if len(whole) + len(fraction) > 2 * _LARGEST_FRACTION_DIGITS:
        raise InvalidArgument(f"{value!r} has too many digits for a size; write {SIZE_FORMS}")
    scaled = int(whole + fraction) * _UNITS[unit]
    divisor = 10 ** len(fraction)
    if scaled % divisor:
        raise InvalidArgument(f"{value!r} is not a whole number of bytes; write {SIZE_FORMS}")
    return _checked(scaled // divisor, value)


def _checked(size: int, given: str | int) -> int:
    if size <= 0:
        raise InvalidArgument(f"a size must be more than 0, got {given!r}")
    if size >= _LARGEST:
        raise InvalidArgument(f"a size must be less than 2**63 bytes, got {given!r}")
    return size


def format_size(size: int | float) -> str:
    """A size for people, in powers of 1024: ``8.0 GiB``, below 1 KiB ``512 B``."""
    if size < 0:
        return f"-{format_size(-size)}"
    if size < 1024:
        return f"{size:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = 0
    scaled = size / 1024
    while scaled >= 1023.95 and power < len(units) - 1:
        scaled /= 1024
        power += 1
    return f"{scaled:.1f} {units[power]}"
