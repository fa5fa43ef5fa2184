"""The example settings load, and the one that lists the defaults lists them all, as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from kvstore.errors import SettingsError
from kvstore.settings import Settings

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))


def settable_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settable_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def mentioned_keys(text: str) -> set[str]:
    """Dotted keys that a file sets or shows commented out."""
    keys, section = set(), ""
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1] + "."
        elif assignment := re.match(r"(?:# )?(\w+) = ", line):
            keys.add(section + assignment[1])
    return keys


def test_configs_folder_holds_the_documented_files() -> None:
    assert {"default.toml", "cpu-sidecar.toml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_config_loaded_is_accepted(path: Path) -> None:
    settings = Settings.load(path, environ={})
    assert settings.dram.capacity_bytes > 0


def test_default_config_loaded_equals_the_defaults() -> None:
    assert Settings.load(CONFIGS / "default.toml", environ={}) == Settings()


def test_default_config_mentions_every_setting() -> None:
    mentioned = mentioned_keys((CONFIGS / "default.toml").read_text(encoding="utf-8"))
    assert mentioned == set(settable_keys(Settings))


def test_default_config_with_a_typo_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "default.toml"
    text = (CONFIGS / "default.toml").read_text(encoding="utf-8")
    broken.write_text(text.replace("capacity_bytes =", "capacity_byte =", 1), encoding="utf-8")
    with pytest.raises(SettingsError, match="capacity_byte"):
        Settings.load(broken, environ={})
