"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvstore.errors import InvalidArgument
from kvstore.policy.base import EvictionPolicy, PolicyContext
from kvstore.policy.lru import Lru

POLICIES: Final[dict[str, Callable[[PolicyContext], EvictionPolicy]]] = {"lru": Lru}


def make_policy(name: str, context: PolicyContext) -> EvictionPolicy:
    """A new policy.

    Raises:
        InvalidArgument: no policy has that name; the message lists those there are.
    """
    try:
        return POLICIES[name](context)
    except KeyError:
        raise InvalidArgument(f"unknown eviction policy {name!r}; there are: {', '.join(sorted(POLICIES))}") from None
