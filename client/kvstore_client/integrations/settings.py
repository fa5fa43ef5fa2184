"""Checks of what a user configures of an integration, before anything is connected; each says the same of all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from kvstore.errors import InvalidArgument
from kvstore.protocol.endpoint import check_endpoint
from kvstore.protocol.version import MAX_LEASE_MS

__all__ = ["MOST_THREADS", "Checks", "is_number", "is_whole"]

MOST_THREADS: Final = 64


@dataclass(frozen=True, slots=True)
class Checks:
    """Checks of fields of a settings object; every message begins with whose settings they are.

    All raise ``InvalidArgument`` naming the setting, what it must be and what it is.
    """

    who: str

    def wrong(self, name: str, wanted: str, got: object) -> InvalidArgument:
        """The error for a setting."""
        return InvalidArgument(f"{self.who}: {name} must be {wanted}, got {got!r}")

    def given(self, config: Mapping[str, Any], kind: Any, where: str = "") -> dict[str, Any]:
        """Arguments for a dataclass of settings.

        Args:
            config: what the user wrote.
            kind: the dataclass.
            where: added behind what is unknown, for example ``" in adapter_params"``.

        Raises:
            InvalidArgument: a key that is no setting, with the nearest one and those that are.
        """
        known = [field.name for field in fields(kind)]
        unknown = [key for key in config if key not in known]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InvalidArgument(
                f"{self.who}: unknown setting {', '.join(map(repr, unknown))}{hint}{where}; known are "
                f"{', '.join(known)}"
            )
        return dict(config)

    def texts(self, settings: object, names: Iterable[str]) -> None:
        """Text, which may be empty."""
        for name in names:
            if not isinstance(getattr(settings, name), str):
                raise self.wrong(name, "text", getattr(settings, name))

    def connection(self, settings: Any) -> None:
        """``endpoint``, ``directory``, ``mapped``, ``unknown_revision``, which all integrations have."""
        self.texts(settings, [name for name in ("endpoint", "directory") if getattr(settings, name) is not None])
        if settings.endpoint is not None:
            check_endpoint(settings.endpoint)
        if settings.mapped not in (None, True, False):
            raise self.wrong("mapped", "true, false or null", settings.mapped)
        self.one_of(settings, "unknown_revision", "warn", "refuse", "ignore")

    def one_of(self, settings: object, name: str, *values: str) -> None:
        """One of a few words."""
        if getattr(settings, name) not in values:
            words = ", ".join(map(repr, values[:-1]))
            raise self.wrong(name, f"{words} or {values[-1]!r}", getattr(settings, name))

    def seconds(self, settings: object, *names: str) -> None:
        """Seconds above 0."""
        for name in names:
            if not is_number(getattr(settings, name)) or not 0 < getattr(settings, name) <= 3600:
                raise self.wrong(name, "a number of seconds above 0 and up to 3600", getattr(settings, name))

    def lease(self, settings: Any) -> None:
        """``lease_s``, 0 for no leases."""
        if not is_number(settings.lease_s) or not 0 <= settings.lease_s <= MAX_LEASE_MS / 1000:
            raise self.wrong("lease_s", f"a number of seconds from 0 to {MAX_LEASE_MS // 1000}", settings.lease_s)

    def count(self, settings: object, name: str, most: int) -> None:
        """A whole number from 1."""
        if not is_whole(getattr(settings, name)) or not 1 <= getattr(settings, name) <= most:
            raise self.wrong(name, f"a whole number from 1 to {most}", getattr(settings, name))


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
