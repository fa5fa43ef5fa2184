"""What people give ``kvstore tune`` as lists: policies, capacities, codecs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvstore.errors import InvalidArgument
from kvstore.policy.registry import SIMULATED
from kvstore.simulator.clairvoyant import CLAIRVOYANT
from kvstore.sizes import parse_size

__all__ = [
    "DEFAULT_POLICIES",
    "Capacity",
    "capacities_around",
    "default_capacities",
    "parse_capacities",
    "parse_codecs",
    "parse_policies",
]

DEFAULT_POLICIES: Final = tuple(
    name for name in ("lru", "adaptive", "s3fifo", "arc", "lrfu-300", CLAIRVOYANT) if name in {*SIMULATED, CLAIRVOYANT}
)
_COUNT: Final = re.compile(r"([0-9]+(?:_[0-9]+)*)(?:\.([0-9]+))?([kM]?)", re.ASCII)
_FACTORS: Final = {"": 1, "k": 1000, "M": 1000_000}
_MOST_BLOCKS: Final = 1 << 40
_DEFAULT_CAPACITIES: Final = 8


@dataclass(frozen=True, slots=True)
class Capacity:
    """A capacity as it was given: in blocks that are not compressed, or in bytes; the other one is 0."""

    blocks: int = 0
    size_bytes: int = 0


def parse_policies(text: str) -> list[str]:
    """Names between commas, each once.

    Raises:
        InvalidArgument: none, or one that nobody knows; the message lists those there are.
    """
    names = _parts(text, "--policies")
    known = {*SIMULATED, CLAIRVOYANT}
    for name in names:
        if name not in known:
            raise InvalidArgument(f"--policies: unknown policy {name!r}; there are: {', '.join(sorted(known))}")
    return names


def parse_codecs(text: str) -> list[str]:
    """Names of codecs between commas, each once.

    Raises:
        InvalidArgument: none, or an unknown one.
    """
    from kvstore_kernels.codecs import get_codec

    names = _parts(text, "--codecs")
    for name in names:
        try:
            get_codec(name)
        except ValueError as wrong:
            raise InvalidArgument(f"--codecs: {wrong}") from None
    return names


def parse_capacities(text: str, option: str = "--capacities", *, zero: bool = False) -> list[Capacity]:
    """Capacities between commas, each once: blocks (``1000``, ``5k``, ``1.5M``) or sizes (``64GiB``).

    Args:
        text: as given.
        option: for errors.
        zero: whether 0 is one.

    Raises:
        InvalidArgument: none, or one that is neither, or not above 0.
    """
    found: dict[Capacity, None] = {}
    for part in _parts(text, option):
        found[_capacity(part, option, zero=zero)] = None
    return list(found)


def capacities_around(have: Capacity) -> list[Capacity]:
    """Up to eight capacities from an eighth to 16 times what there is."""
    some = (
        Capacity(have.blocks * 2**power // 8, have.size_bytes * 2**power // 8) for power in range(_DEFAULT_CAPACITIES)
    )
    return list(dict.fromkeys(each for each in some if each != Capacity()))


def default_capacities(distinct_blocks: int) -> list[Capacity]:
    """Eight round capacities (1, 2, 5 times a power of ten) up to the blocks of a trace."""
    round_ones = [factor * 10**power for power in range(12) for factor in (1, 2, 5)]
    below = [blocks for blocks in round_ones if blocks < distinct_blocks]
    return [Capacity(blocks) for blocks in below[-_DEFAULT_CAPACITIES:] or [1]]


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidArgument(f"{option}: there is nothing between two commas or at an end in {text!r}")
    return list(dict.fromkeys(parts))


def _capacity(text: str, option: str, *, zero: bool) -> Capacity:
    if zero and text == "0":
        return Capacity()
    count = _COUNT.fullmatch(text)
    if count is None:
        if not any(character.isalpha() for character in text):
            raise InvalidArgument(f"{option}: {text!r} must be more than 0: blocks (5000, 5k) or a size (64GiB)")
        try:
            return Capacity(size_bytes=parse_size(text))
        except InvalidArgument as wrong:
            raise InvalidArgument(f"{option}: {wrong}; or blocks, like 5000 or 5k") from None
    whole, fraction, factor = count.group(1).replace("_", ""), count.group(2) or "", _FACTORS[count.group(3)]
    if len(whole) + len(fraction) > 24:
        raise InvalidArgument(f"{option}: {text!r} has too many digits")
    blocks, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
    if rest:
        raise InvalidArgument(f"{option}: {text!r} is no whole number of blocks")
    if not 0 < blocks < _MOST_BLOCKS:
        raise InvalidArgument(f"{option}: {text!r} must be more than 0 blocks, and less than 2**40")
    return Capacity(blocks)
