"""How ``kvstore why`` looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvstore.cli import render
from kvstore.cli.miss_tables import cause_words
from kvstore.cli.namespaces import listed
from kvstore.format.constants import FIDELITY_EXACT
from kvstore_client.why import tier_name

if TYPE_CHECKING:
    from kvstore.cli.why_search import Answer
    from kvstore_client import Explanation, Story

__all__ = ["why_view"]

_KEY_DIGITS: Final = 16
_MOST_RUNS: Final = 24
_HIT: Final = "green"
_MISS: Final = "yellow"


def why_view(found: Sequence[Answer]) -> RenderableType:
    """The stories of keys, or of a prompt."""
    parts: list[RenderableType] = []
    for answer in found:
        explained = answer.explained
        parts += [_prompt(explained) if explained.chained else _key(explained[0], answer), ""]
    return Group(*parts[:-1])


def _key(story: Story, answer: Answer) -> RenderableType:
    explained = answer.explained
    where = f"{explained.namespace}, generation {explained.generation}"
    if answer.unknown_in:
        where = f"unknown in all of {listed(answer.unknown_in)}; say which is meant (--namespace)"
    made = render.facts(f"Block {story.key.hex()[:_KEY_DIGITS]}", [("namespace", where)])
    made.add_row(Text("lookup", style="dim"), Text(story.reason, style=_HIT if story.hit else _MISS))
    for name, value in _facts(story):
        made.add_row(Text(name, style="dim"), value)
    return made


def _facts(story: Story) -> Iterator[tuple[str, str]]:
    yield "key", story.key.hex()
    if story.depth >= 0:
        yield "depth", f"{story.depth}" + (f", from token {story.at_token:,} on" if story.at_token >= 0 else "")
    if story.parent == "root":
        yield "parent", "none: a first block"
    elif story.parent_key:
        parent = {"": "unknown", "gone": "gone"}.get(story.parent) or f"in {tier_name(story.parent)}"
        yield "parent", f"{story.parent_key.hex()[:_KEY_DIGITS]}, {parent}"
    if story.tiers:
        yield "children", render.count(story.children)
        exact = "exact" if story.fidelity == FIDELITY_EXACT else f"fidelity {story.fidelity}"
        parts = f"{story.parts} of {story.of_parts} parts"
        yield "record", f"{render.size(story.slot_bytes)}, {story.codec}, {exact}, {parts}"
    if story.used_ago >= 0:
        yield "last use", f"{render.count(story.used_ago)} requests ago"
    if story.leases:
        yield "leases", render.count(story.leases)
    if story.state == "leaving":
        yield "leaving", "chosen to leave DRAM when its room is needed"
    if story.retention:
        yield "retention", story.retention
    if story.ghost is not None and (story.ghost.back or story.tiers):
        yield "before", f"it {story.ghost.text}"
    for index, chapter in enumerate(story.chapters):
        yield "" if index else "lately", chapter.text


def _prompt(explained: Explanation) -> RenderableType:
    """How far a prompt hits, and what became of the rest, run by run."""
    made = render.table(
        f"Prompt of {render.blocks(len(explained))} in {explained.namespace}",
        ["blocks", render.text_column("tokens"), render.text_column("lookup"), render.text_column("first of them")],
    )
    first = 0
    runs = [list(run) for _, run in groupby(explained, key=_kind)]
    for run in runs[:_MOST_RUNS]:
        last = first + len(run) - 1
        tokens = explained.block_tokens
        made.add_row(
            f"{first:,} - {last:,}" if last > first else f"{first:,}",
            f"{first * tokens:,} - {(last + 1) * tokens - 1:,}" if tokens else "",
            Text(_kind(run[0]), style=_HIT if run[0].hit else _MISS),
            run[0].key.hex()[:_KEY_DIGITS],
        )
        first = last + 1
    parts: list[RenderableType] = [made]
    if len(runs) > _MOST_RUNS:
        parts.append(Text(f"... {render.count(len(runs) - _MOST_RUNS)} more runs, --json has all blocks", style="dim"))
    parts += ["", Text(explained.text)]
    return Group(*parts)


def _kind(story: Story) -> str:
    return f"hit in {tier_name(story.tiers[0])}" if story.hit else cause_words(story.cause)
