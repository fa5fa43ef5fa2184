"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore.errors import InvalidArgument
from kvstore.policy.adaptive import Adaptive
from kvstore.policy.arc import Arc
from kvstore.policy.base import EvictionPolicy, PolicyContext
from kvstore.policy.clock import Clock
from kvstore.policy.fifo import Fifo
from kvstore.policy.gdsf import Gdsf, GdsfKept
from kvstore.policy.length_aware import LengthAware
from kvstore.policy.lfu import Lfu, LfuKept
from kvstore.policy.lrfu import Lrfu
from kvstore.policy.lru import Lru
from kvstore.policy.s3fifo import S3Fifo
from kvstore.policy.sieve import Sieve
from kvstore.policy.wtinylfu import WTinyLfu

Factory = Callable[[PolicyContext], EvictionPolicy]

POLICIES: Final[dict[str, Factory]] = {
    "lru": Lru,
    "clock": Clock,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "arc": Arc,
    "adaptive": Adaptive,
}
"""Those that a daemon may run."""

SIMULATED: Final[dict[str, Factory]] = {
    **POLICIES,
    "fifo": Fifo,
    "lfu": Lfu,
    "lfu-kept": LfuKept,
    "lrfu-300": Lrfu,
    "gdsf": Gdsf,
    "gdsf-kept": GdsfKept,
    "w-tinylfu": WTinyLfu,
    "length-aware": LengthAware,
}
"""Those that the simulator knows."""


def make_policy(name: str, context: PolicyContext) -> EvictionPolicy:
    """A new policy for a daemon.

    Raises:
        InvalidArgument: no such policy runs in a daemon; the message lists those that do.
    """
    return _make(name, context, POLICIES)


def make_simulated(name: str, context: PolicyContext) -> EvictionPolicy:
    """A new policy for a simulation.

    Raises:
        InvalidArgument: no policy has that name; the message lists those there are.
    """
    return _make(name, context, SIMULATED)


def _make(name: str, context: PolicyContext, known: dict[str, Factory]) -> EvictionPolicy:
    try:
        return known[name](context)
    except KeyError:
        there_are = f"there are: {', '.join(sorted(known))}"
        if name in SIMULATED:
            raise InvalidArgument(f"eviction policy {name!r} is for simulations only; {there_are}") from None
        raise InvalidArgument(f"unknown eviction policy {name!r}; {there_are}") from None
