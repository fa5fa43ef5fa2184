"""Which versions of an engine an integration was tested with, and one clear message where another one is installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from kvstore.errors import UnsupportedEngine

__all__ = ["require"]

_RELEASE: Final = re.compile(r"(?:\d+!)?(\d+(?:\.\d+)*)")


def require(integration: str, distributions: tuple[str, ...], *, at_least: str, below: str) -> str:
    """The installed version of an engine, if it is one that the integration knows.

    Args:
        integration: what wants it, for the message: ``"the vLLM connector"``.
        distributions: names under which the engine is published, the usual one first.
        at_least: the first release that is known: ``"0.32"``.
        below: the first one that is not: ``"0.34"``. Pre-releases and local builds count as their release.

    Raises:
        UnsupportedEngine: none of the distributions is installed, or in another version; the message has the command
            that installs a right one.
    """
    wanted = f"{distributions[0]}>={at_least},<{below}"
    for name in distributions:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if _release(at_least) <= _release(found) < _release(below):
            return found
        raise UnsupportedEngine(
            f"{integration} works with {wanted}, and {name} {found} is installed; "
            f"install a version in that range (pip install '{wanted}'), or a kvstored that knows {found}"
        )
    raise UnsupportedEngine(f"{integration} needs {wanted}, which is not installed; run: pip install '{wanted}'")


def _release(text: str) -> tuple[int, ...]:
    found = _RELEASE.match(text.strip().removeprefix("v"))
    if found is None:
        return ()
    numbers = [int(number) for number in found[1].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
