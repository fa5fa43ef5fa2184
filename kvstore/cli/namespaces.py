"""Namespaces of a running daemon as people name them on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kvstore.errors import InvalidArgument

if TYPE_CHECKING:
    from kvstore.protocol.statistics import NamespaceStats
    from kvstore_client import Client

__all__ = ["NAMING", "listed", "named_namespace", "used_namespaces"]

NAMING: Final = "name of the namespace, or the first 4 or more digits of its digest"
"""What ``--namespace`` takes where one that is there is meant, for the help."""

_FEWEST_DIGITS: Final = 4
_MOST_DIGITS: Final = 64


def named_namespace(known: Sequence[NamespaceStats], name: str) -> NamespaceStats:
    """The namespace of a name, or where none has it of a digest that begins so.

    Its ``digest`` has as many digits as were given where those are more than the statistics have: the daemon knows all.

    Args:
        known: the daemon's.
        name: as it was given.

    Raises:
        InvalidArgument: there is none, or several are meant.
    """
    fitting = [one for one in known if name in (one.label, one.name)]
    if len(fitting) > 1:
        raise InvalidArgument(
            f"{len(fitting)} namespaces are called {name!r}: say which by its digest (--namespace): {listed(fitting)}"
        )
    if fitting:
        return fitting[0]
    digits = name.lower()
    if _FEWEST_DIGITS <= len(digits) <= _MOST_DIGITS and not digits.strip("0123456789abcdef"):
        fitting = [
            one for one in known if one.digest and (digits.startswith(one.digest) or one.digest.startswith(digits))
        ]
    if len(fitting) > 1:
        raise InvalidArgument(f"{len(fitting)} namespaces have a digest that begins with {name}: {listed(fitting)}")
    if not fitting:
        raise InvalidArgument(f"the daemon knows no namespace {name!r}; there are: {listed(known)}")
    (found,) = fitting
    if len(digits) > len(found.digest):
        from msgspec.structs import replace

        return replace(found, digest=digits)
    return found


def used_namespaces(client: Client, known: Sequence[NamespaceStats]) -> list[NamespaceStats]:
    """Those that somebody uses or has used: all but one that holds no block and that this client itself has joined."""
    from kvstore.protocol.namespace import namespace_digest

    canonical = client.namespace.canonical()

    def own(one: NamespaceStats) -> bool:
        return bool(one.digest) and namespace_digest(canonical, one.generation).hex().startswith(one.digest)

    return [one for one in known if one.blocks or not own(one)] or list(known)


def listed(namespaces: Sequence[NamespaceStats]) -> str:
    """Their names and digests."""
    return ", ".join(f"{one.label} ({one.digest})" for one in namespaces) or "none"
