"""Why keys hit or miss: what ``Client.why`` gives back, with a text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.messages import WhyReply
from kvstore.protocol.misses import MissCause
from kvstore.protocol.stories import ChapterStory, GhostStory, KeyStory
from kvstore.sizes import format_size

__all__ = ["Chapter", "Explanation", "Ghost", "Story", "explanation_of"]

_TIERS: Final = {"hbm": "GPU memory", "dram": "DRAM", "ssd": "the SSD", "remote": "the remote tier"}
_KEY_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Ghost:
    """What the daemon remembers of a block that left, or could not be stored or loaded; see ``GhostStory``."""

    cause: str
    ago_s: float
    tier: str
    policy: str
    extra_bytes: int
    reason: str
    back: bool

    @property
    def text(self) -> str:
        """A sentence without its subject and its end."""
        when = f"{age(self.ago_s)} ago"
        refused = f"; a put of it since then was refused ({_words(self.reason)})" if self.reason else ""
        if self.cause == MissCause.NOT_STORED:
            return f"was not stored when it was put, {when}" + (f": {_words(self.reason)}" if self.reason else "")
        if self.cause == MissCause.EVICTED:
            kept = f"; {format_size(self.extra_bytes)} more would have kept it" if self.extra_bytes else ""
            by = f" by {self.policy}" if self.policy else ""
            return f"was evicted from {tier_name(self.tier)}{by} {when}{kept}{refused}"
        if self.cause == MissCause.FAILED_LOAD:
            return f"could not be loaded from {tier_name(self.tier)} {when}{refused}"
        left = {
            MissCause.REMOVED: "was removed by a client",
            MissCause.INVALIDATED: "went with an earlier generation of the namespace",
            MissCause.CORRUPT: f"was found corrupt in {tier_name(self.tier)} and dropped",
            MissCause.EXPIRED: "expired",
            MissCause.QUOTA: "left because its tenant had more than its quota",
        }
        known = {cause.value: words for cause, words in left.items()}
        return f"{known.get(self.cause, f'left ({_words(self.cause)})')} {when}{refused}"


@dataclass(frozen=True, slots=True)
class Chapter:
    """A change of state of one of a block's records in DRAM."""

    ago_s: float
    part: int
    before: str
    after: str
    cause: str

    @property
    def text(self) -> str:
        """One line."""
        return f"{age(self.ago_s)} ago: part {self.part}, {self.before} -> {self.after} ({self.cause})"


@dataclass(frozen=True, slots=True)
class Story:
    """One block, or what is known of one that is not there. See ``KeyStory`` for the fields.

    Attributes:
        of_parts: parts that make a block complete.
        block_tokens: tokens a block, 0 where that is unknown.
    """

    key: bytes
    state: str
    cause: str
    tiers: tuple[str, ...]
    depth: int
    parent: str
    parent_key: bytes
    children: int
    branched: bool
    parts: int
    of_parts: int
    block_tokens: int
    used_ago: int
    leases: int
    slot_bytes: int
    codec: str
    fidelity: int
    retention: str
    ghost: Ghost | None
    chapters: tuple[Chapter, ...]

    @property
    def hit(self) -> bool:
        """Whether a lookup finds it."""
        return not self.cause

    @property
    def at_token(self) -> int:
        """First token of the block in its prompt, -1 where that is unknown."""
        return self.depth * self.block_tokens if self.depth >= 0 and self.block_tokens else -1

    @property
    def reason(self) -> str:
        """Why it hits or misses, as a sentence without its subject and its end."""
        if self.hit:
            return f"hits, in {' and '.join(map(tier_name, self.tiers))}"
        ghost = self.ghost
        told = "" if ghost is None or ghost.back else ghost.text
        there = self.state in ("resident", "leaving", "below")
        if self.cause == MissCause.DIVERGED:
            where = f"token {self.at_token:,}" if self.at_token >= 0 else "here"
            return f"was never seen: the prompt differs from {where} on, where others go on behind the block before"
        if self.cause == MissCause.NEVER_SEEN and not there:
            return "was never seen, as far as is remembered"
        if self.cause == MissCause.PART_MISSING:
            return f"lacks a part: {self.parts} of {self.of_parts} are there"
        if self.cause == MissCause.RECOMPUTE:
            return f"is in {tier_name(self.tiers[-1])}, and computing it anew is faster than loading it"
        if self.cause == MissCause.NOT_STORED and not told:
            return "was never stored: there was no slot when a block behind the one before was put"
        if there:
            return f"is there and of no use: a block before it is missing ({_words(self.cause)})"
        return told or f"misses ({_words(self.cause)})"

    @property
    def text(self) -> str:
        """A few lines."""
        return "\n".join([f"{self.key.hex()[:_KEY_DIGITS]} {self.reason}.", *(f"  {line}" for line in self._details())])

    def _details(self) -> Iterator[str]:
        tokens = f", from token {self.at_token:,} on" if self.at_token >= 0 else ""
        depth = f"depth {self.depth}{tokens}" if self.depth >= 0 else "depth unknown"
        if self.depth >= 0 or self.parent_key:
            yield f"{depth}; parent: {self._parent()}; children: {self.children}"
        if self.tiers:
            fidelity = "exact" if self.fidelity == FIDELITY_EXACT else f"fidelity {self.fidelity}"
            yield f"{format_size(self.slot_bytes)} of {self.codec}, {fidelity}; {self.parts} of {self.of_parts} parts"
        if self.used_ago >= 0:
            leases = f"; {self.leases} leases" if self.leases else ""
            yield f"last used {self.used_ago:,} requests ago{leases}"
        if self.state == "leaving":
            yield "chosen to leave DRAM when its room is needed"
        if self.retention:
            yield f"retention: {self.retention}"
        if self.ghost is not None and (self.ghost.back or self.tiers):
            yield f"before: it {self.ghost.text}"
        for chapter in self.chapters:
            yield chapter.text

    def _parent(self) -> str:
        if self.parent == "root":
            return "none, it is a first block"
        where = {"": "unknown", "gone": "gone"}.get(self.parent) or f"in {tier_name(self.parent)}"
        return f"{self.parent_key.hex()[:_KEY_DIGITS]}, {where}" if self.parent_key else where


@dataclass(frozen=True, slots=True)
class Explanation:
    """The stories of keys; a sequence of them.

    Attributes:
        namespace: its label.
        digest: its digest, hexadecimal.
        generation: of the namespace.
        block_tokens: tokens a block, 0 where that is unknown.
        chained: the keys are a prompt's, from its first block on.
        stories: one a key.
    """

    namespace: str
    digest: str
    generation: int
    block_tokens: int
    chained: bool
    stories: tuple[Story, ...]

    def __len__(self) -> int:
        return len(self.stories)

    def __iter__(self) -> Iterator[Story]:
        return iter(self.stories)

    def __getitem__(self, index: int) -> Story:
        return self.stories[index]

    @property
    def hits(self) -> int:
        """Leading blocks that hit."""
        return next((index for index, story in enumerate(self.stories) if not story.hit), len(self.stories))

    @property
    def first_miss(self) -> Story | None:
        """The first block that misses: why the prompt does."""
        return next((story for story in self.stories if not story.hit), None)

    @property
    def text(self) -> str:
        """For people: of a prompt how far it hits and why no further, else each key's story."""
        if not self.chained:
            return "\n".join(story.text for story in self.stories)
        if not self.stories:
            return "no whole block, nothing to look up"
        hits, miss = self.hits, self.first_miss
        many = f"{len(self.stories):,} {'block' if len(self.stories) == 1 else 'blocks'}"
        lines = [f"{hits:,} of {many} of {self.namespace} hit{_where(self.stories[:hits])}."]
        if miss is not None:
            at = f" (from token {miss.at_token:,} on)" if miss.at_token >= 0 else ""
            lines.append(f"Block {hits}{at}, {miss.key.hex()[:_KEY_DIGITS]}, {miss.reason}.")
        behind = [f"{count:,} {_words(cause)}" for cause, count in _causes(self.stories[hits + 1 :])]
        if behind:
            lines.append(f"Of the blocks behind it: {', '.join(behind)}.")
        return "\n".join(lines)


def _where(stories: Sequence[Story]) -> str:
    counts: dict[str, int] = {}
    for story in stories:
        counts[story.tiers[0]] = counts.get(story.tiers[0], 0) + 1
    return ": " + ", ".join(f"{count:,} in {tier_name(tier)}" for tier, count in counts.items()) if counts else ""


def _causes(stories: Sequence[Story]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for story in stories:
        counts[story.cause] = counts.get(story.cause, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def tier_name(tier: str) -> str:
    """A tier as people call it."""
    return _TIERS.get(tier, tier or "no tier")


def age(seconds: float) -> str:
    """How long ago something was."""
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _words(name: str) -> str:
    return name.replace("_", " ")


def explanation_of(reply: WhyReply, chained: bool) -> Explanation:
    """What a reply says."""
    stories = tuple(_story(story, reply) for story in reply.stories)
    return Explanation(reply.namespace, reply.digest, reply.generation, reply.block_tokens, chained, stories)


def _story(story: KeyStory, reply: WhyReply) -> Story:
    return Story(
        key=story.key,
        state=story.state,
        cause=story.cause,
        tiers=tuple(story.tiers),
        depth=story.depth,
        parent=story.parent,
        parent_key=story.parent_key,
        children=story.children,
        branched=story.branched,
        parts=story.parts,
        of_parts=reply.parts,
        block_tokens=reply.block_tokens,
        used_ago=story.used_ago,
        leases=story.leases,
        slot_bytes=story.slot_bytes,
        codec=story.codec,
        fidelity=story.fidelity,
        retention=story.retention,
        ghost=None if story.ghost is None else _ghost(story.ghost),
        chapters=tuple(map(_chapter, story.chapters)),
    )


def _ghost(ghost: GhostStory) -> Ghost:
    return Ghost(ghost.cause, ghost.ago_s, ghost.tier, ghost.policy, ghost.extra_bytes, ghost.reason, ghost.back)


def _chapter(chapter: ChapterStory) -> Chapter:
    return Chapter(chapter.ago_s, chapter.part, chapter.before, chapter.after, chapter.cause)
