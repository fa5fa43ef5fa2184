"""Reads the tables and hex examples out of a Markdown page, so that tests can hold them against the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_EXAMPLE = re.compile(r"<!-- example: (\S+) -->\n```\n(.*?)```", re.DOTALL)
_DUMP_LINE = re.compile(r"^[0-9a-f]{4}  ")


@dataclass(frozen=True)
class Table:
    """One table: the heading it stands under, and its rows by column."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]

    def column(self, name: str) -> list[str]:
        """All cells of a column, without code marks."""
        return [row[name].strip("`") for row in self.rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(page: str) -> list[Table]:
    """All tables of a page of ``docs``, in order."""
    found = []
    heading, block = "", list[str]()
    for line in [*(DOCS / page).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
            continue
        if block:
            columns = _cells(block[0])
            rows = tuple(dict(zip(columns, _cells(row), strict=True)) for row in block[2:])
            found.append(Table(heading, tuple(columns), rows))
            block = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def table(page: str, heading: str) -> Table:
    """The only table directly under a heading."""
    (found,) = [one for one in tables(page) if one.heading == heading]
    return found


def examples(page: str) -> dict[str, bytes]:
    """Hex examples by the golden file that they are taken from; offsets of dumps and comments are dropped."""
    found = {}
    for name, text in _EXAMPLE.findall((DOCS / page).read_text(encoding="utf-8")):
        lines = [_DUMP_LINE.sub("", line).partition("#")[0] for line in text.splitlines()]
        assert name not in found, f"{name} is shown twice"
        found[name] = bytes.fromhex("".join(lines))
    return found
