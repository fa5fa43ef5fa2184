"""Colours, for dark and for light terminals. What two colours tell apart is told apart by glyphs too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from textual.theme import Theme

__all__ = ["THEMES", "usual_theme"]


def _theme(name: str, *, dark: bool, colours: Mapping[str, str]) -> Theme:
    """A theme; the names of ``colours`` are what panels write with a dollar sign."""
    return Theme(
        name=name,
        dark=dark,
        primary=colours["dram"],
        secondary=colours["ssd"],
        accent=colours["accent"],
        foreground=colours["text"],
        background=colours["ground"],
        surface=colours["ground"],
        panel=colours["raised"],
        success=colours["good"],
        warning=colours["warn"],
        error=colours["bad"],
        variables=dict(colours),
    )


THEMES: Final = {
    "dark": _theme(
        "dark",
        dark=True,
        colours={
            "ground": "#0e1318",
            "raised": "#18202a",
            "text": "#d5dde6",
            "faint": "#8290a0",
            "track": "#2a3542",
            "frame": "#2f3b49",
            "accent": "#7cd5ff",
            "dram": "#35c4b0",
            "retired": "#1f8377",
            "ssd": "#a58bf5",
            "put": "#5ea8f2",
            "miss": "#f0788c",
            "good": "#7fd491",
            "warn": "#f0bf62",
            "bad": "#ff6f6f",
            "alarm": "#7a2331",
        },
    ),
    "light": _theme(
        "light",
        dark=False,
        colours={
            "ground": "#fcfcfa",
            "raised": "#eef0f0",
            "text": "#1d2630",
            "faint": "#64707c",
            "track": "#d5dade",
            "frame": "#c3cad1",
            "accent": "#0069a8",
            "dram": "#0e8f80",
            "retired": "#67b8ad",
            "ssd": "#7650cf",
            "put": "#1b6ec9",
            "miss": "#c5304e",
            "good": "#1b8744",
            "warn": "#a06000",
            "bad": "#c41c1c",
            "alarm": "#ffd6da",
        },
    ),
    "dark-grey": _theme(
        "dark-grey",
        dark=True,
        colours={
            "ground": "#101010",
            "raised": "#1e1e1e",
            "text": "#dcdcdc",
            "faint": "#909090",
            "track": "#343434",
            "frame": "#3c3c3c",
            "accent": "#ffffff",
            "dram": "#d0d0d0",
            "retired": "#a0a0a0",
            "ssd": "#7c7c7c",
            "put": "#b8b8b8",
            "miss": "#a8a8a8",
            "good": "#dcdcdc",
            "warn": "#ffffff",
            "bad": "#ffffff",
            "alarm": "#5a5a5a",
        },
    ),
    "light-grey": _theme(
        "light-grey",
        dark=False,
        colours={
            "ground": "#fbfbfb",
            "raised": "#eeeeee",
            "text": "#202020",
            "faint": "#6a6a6a",
            "track": "#d8d8d8",
            "frame": "#c6c6c6",
            "accent": "#000000",
            "dram": "#3c3c3c",
            "retired": "#6c6c6c",
            "ssd": "#949494",
            "put": "#505050",
            "miss": "#606060",
            "good": "#202020",
            "warn": "#000000",
            "bad": "#000000",
            "alarm": "#c8c8c8",
        },
    ),
}
"""By name. The grey ones are for ``NO_COLOR``: tones far enough apart where hues were."""


def usual_theme() -> str:
    """``light`` where the terminal says that its background is (``COLORFGBG``), ``dark`` otherwise."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if ground.isdecimal() and (int(ground) == 7 or 10 <= int(ground) <= 15) else "dark"
