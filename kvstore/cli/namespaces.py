"""Namespaces of a running daemon as people name them on a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvstore.errors import InvalidArgument

if TYPE_CHECKING:
    from kvstore.protocol.statistics import NamespaceStats
    from kvstore_client import Client

__all__ = ["fitting_namespaces"]

_FEWEST_DIGITS: Final = 8


def fitting_namespaces(client: Client, name: str) -> list[NamespaceStats]:
    """The namespaces that are meant: those of that name or digest, or where none was given all that hold something.

    Raises:
        InvalidArgument: there is none, or several have that name.
    """
    known = client.stats().namespaces
    listed = ", ".join(f"{one.label} ({one.digest})" for one in known) or "none"
    if not name:
        # Whoever only asks joins one that is empty.
        return [one for one in known if one.blocks] or known
    fitting = [one for one in known if name in (one.label, one.name)]
    if not fitting and len(name) >= _FEWEST_DIGITS:
        fitting = [one for one in known if one.digest and name.lower().startswith(one.digest)]
    if not fitting:
        raise InvalidArgument(f"the daemon knows no namespace {name!r}; there are: {listed}")
    if len(fitting) > 1:
        several = ", ".join(one.digest for one in fitting)
        raise InvalidArgument(f"{len(fitting)} namespaces are called {name!r}: say which by its digest ({several})")
    return fitting
