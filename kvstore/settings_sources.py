"""Reads settings from flags, environment and a TOML file, and says which of them was wrong, and how.

Knows no setting by name: keys come from the model. See ``kvstore.settings`` for what there is to set.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from kvstore.errors import SettingsError

__all__ = ["load_settings"]

PREFIX: Final = "KVSTORE_"
CONFIG_VARIABLE: Final = "KVSTORE_CONFIG"

_SERVICE_VARIABLE: Final = re.compile(
    r"KVSTORE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""Variables that Kubernetes puts into every pod beside a service called kvstore or kvstore-something."""

_VALUE_CHARACTERS: Final = 80

S = TypeVar("S", bound=BaseSettings)
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Value:
    """A value with the words that say where it came from."""

    value: object
    origin: str


class _NamedSource(PydanticBaseSettingsSource):
    """A source whose values are known by dotted key, with their origins."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, _Value]) -> None:
        super().__init__(settings_cls)
        self.values = dict(values)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:
        """The subtree of a top-level field."""
        return self().get(field_name), field_name, False

    def __call__(self) -> Tree:
        tree: Tree = {}
        for key, value in self.values.items():
            *sections, leaf = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value.value
        return tree


def load_settings(
    model: type[S],
    config: Path | None,
    overrides: Mapping[str, object],
    flags: Mapping[str, str],
    environ: Mapping[str, str],
) -> S:
    """Combine overrides, environment, TOML file and defaults into a checked ``model``.

    Raises:
        SettingsError: one line with the source, the value and what is wrong with it.
    """
    keys = list(_keys(model))
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    file_values = _file_values(config, model, keys) if config is not None else {}
    environment_values = _environment_values(environ, keys)
    override_values = _override_values(overrides, flags, keys)
    combined = _NamedSource(model, file_values | environment_values | override_values)
    try:
        return model.model_validate(combined())
    except ValidationError as error:
        raise SettingsError(_refusal(error, combined.values)) from None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings that are no section."""
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            yield prefix + name
        else:
            yield from _keys(section, f"{prefix}{name}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


# ------------------------------------------------------------------ sources


def _override_values(
    overrides: Mapping[str, object], flags: Mapping[str, str], keys: Sequence[str]
) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for key, value in overrides.items():
        origin = flags.get(key, key)
        if key not in keys:
            raise SettingsError(f"{origin}: unknown setting {key!r}{_suggestion(key, keys)}")
        values[key] = _Value(value, origin)
    return values


_NO_SETTINGS = frozenset({CONFIG_VARIABLE, "KVSTORE_CACHE_DIR", "KVSTORE_DIRECTORY"})
"""Variables of other parts: where compiled code is kept, where a client finds the daemon's directory."""


def _environment_values(environ: Mapping[str, str], keys: Sequence[str]) -> dict[str, _Value]:
    by_variable = {PREFIX + key.upper().replace(".", "__"): key for key in keys}
    values: dict[str, _Value] = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in _NO_SETTINGS:
            continue
        if variable in by_variable:
            values[by_variable[variable]] = _Value(environ[variable], variable)
        elif not _SERVICE_VARIABLE.fullmatch(variable):
            suggestion = _nearest(variable, [*by_variable, CONFIG_VARIABLE]) or (
                f"; settings are {PREFIX}KEY with __ between levels, for example {next(reversed(by_variable))}"
            )
            raise SettingsError(f"environment: unknown variable {variable}{suggestion}")
    return values


def _file_values(config: Path, model: type[BaseModel], keys: Sequence[str]) -> dict[str, _Value]:
    try:
        tree = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {config}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{config}: not UTF-8 text at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        place = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        if place is None:
            raise SettingsError(f"{config}: not TOML: {str(error) or 'nested too deeply'}") from None
        raise SettingsError(f"{config}:{place[2]}: not TOML: {place[1]} (column {place[3]})") from None
    return dict(_leaves(tree, model, str(config), keys))


def _leaves(
    tree: Tree, model: type[BaseModel], origin: str, keys: Sequence[str], prefix: str = ""
) -> Iterator[tuple[str, _Value]]:
    for name, value in tree.items():
        key = prefix + name
        if name not in model.model_fields:
            raise SettingsError(f"{origin}: unknown key {key!r}{_suggestion(key, keys)}")
        section = _section(model.model_fields[name])
        if section is None:
            yield key, _Value(value, f"{origin}: {key}")
        elif isinstance(value, dict):
            yield from _leaves(value, section, origin, keys, key + ".")
        else:
            raise SettingsError(f"{origin}: {key} is a table of settings: write [{key}], got {_shown(value)}")


def _suggestion(key: str, keys: Sequence[str]) -> str:
    """The nearest known key, or what there is in the same section."""
    near = _nearest(key, keys)
    if near:
        return near
    section, dot, _ = key.rpartition(".")
    beside = [other.removeprefix(section + dot) for other in keys if other.startswith(section + dot)]
    where = f"in [{section}] " if section and beside else ""
    names = [f"[{name.partition('.')[0]}]" if "." in name else name for name in beside or keys]
    return f"; known {where}are {', '.join(dict.fromkeys(names))}"


def _nearest(name: str, known: Sequence[str]) -> str:
    by_name = [key for key in known if key.rpartition(".")[2] == name]
    near = by_name or get_close_matches(name, known, n=1, cutoff=0.7)
    if not near:
        # A key in the wrong section, or in none: its last component decides.
        by_leaf: dict[str, str] = {}
        for key in known:
            by_leaf.setdefault(key.rpartition(".")[2], key)
        near = [by_leaf[leaf] for leaf in get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else ""


# ------------------------------------------------------------------ refusals


def _refusal(error: ValidationError, values: Mapping[str, _Value]) -> str:
    """One line for the first error, and how many more there are."""
    details = error.errors()
    lines = list(dict.fromkeys(_line(detail, values) for detail in details))
    more = len(lines) - 1
    return lines[0] + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _line(detail: ErrorDetails, values: Mapping[str, _Value]) -> str:
    cause = _cause(detail)
    if detail["type"] == "conflict":
        origins = [values[key].origin for key in detail["ctx"]["keys"] if key in values]
        return f"{' and '.join(origins) or 'defaults'}: {cause}"
    key = next((key for key in _prefixes(detail["loc"]) if key in values), None)
    if key is None:
        key = ".".join(map(str, detail["loc"]))
        return f"{key}: {cause}"
    value = values[key]
    shown = _shown(value.value)
    return f"{value.origin}: {cause}" if shown in cause else f"{value.origin} = {shown}: {cause}"


def _prefixes(loc: tuple[int | str, ...]) -> Iterator[str]:
    """Dotted forms of a location, longest first: behind a union, pydantic appends the branch."""
    for length in range(len(loc), 0, -1):
        yield ".".join(map(str, loc[:length]))


def _cause(detail: ErrorDetails) -> str:
    context = detail.get("ctx") or {}
    if "error" in context:
        text = str(context["error"])
    elif "message" in context:
        text = str(context["message"])
    elif detail["type"] == "path_type":
        text = "should be a path"
    else:
        text = detail["msg"].removeprefix("Input ")
    return " ".join(text.split())


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_CHARACTERS else text[: _VALUE_CHARACTERS - 3] + "..."
