"""The story of a key: where its block is, what became of it, and why a lookup of it misses now. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvstore.core.block import Block
from kvstore.core.misses import Misses
from kvstore.core.namespaces import NamespaceState
from kvstore.core.retention import FOREVER_NS, Retained
from kvstore.core.ssd_record import SsdBlock
from kvstore.core.state import StoreState
from kvstore.core.story import Chapter
from kvstore.core.tree import ORPHAN_DEPTH, descendants
from kvstore.format.constants import CodecId
from kvstore.protocol.keys import ROOT_KEY
from kvstore.protocol.messages import Reason, TierId
from kvstore.protocol.misses import MissCause
from kvstore.protocol.stories import ChapterStory, GhostStory, KeyStory

MOST_DESCENDANTS: Final = 65_536
"""Blocks behind those that are asked about, which are asked for their last use."""

MOST_CHAPTERS: Final = 8
"""Changes of state that are told of one key, the last ones."""


class Stories:
    """Tells them.

    Args:
        store: of the blocks.
        misses: what is remembered.
        would_load: of how many leading blocks of a chain in a namespace (its id) a match would not refuse the load.
    """

    def __init__(
        self,
        store: StoreState,
        misses: Misses,
        would_load: Callable[[int, list[Block | SsdBlock]], int] = lambda namespace_id, blocks: len(blocks),
    ) -> None:
        self._store = store
        self._misses = misses
        self._would_load = would_load

    def tell(self, namespace: NamespaceState, keys: list[bytes], now_ns: int, *, chained: bool) -> list[KeyStory]:
        """The story of each key.

        Args:
            namespace: a current one.
            keys: of blocks, whether they are there or not.
            now_ns: now.
            chained: they are a prompt's, from its first block on: each is of use only with all before it.
        """
        causes = self._causes(namespace, keys, chained=chained)
        chapters = self._chapters(set(keys))
        stories: list[KeyStory] = []
        depth = -1
        for index, (key, cause) in enumerate(zip(keys, causes, strict=True)):
            story = self._story(namespace, key, now_ns, MOST_DESCENDANTS // len(keys))
            story.cause = "" if cause is None else cause.value
            story.chapters = [_chapter(chapter, now_ns) for chapter in chapters.get(key, ())]
            if chained:
                if index and not story.parent:
                    story.parent_key = keys[index - 1]
                    story.parent = stories[-1].tiers[0] if stories[-1].tiers else _known(stories[-1].state)
                elif not index and not story.parent:
                    story.parent = "root"
                depth = story.depth if story.depth >= 0 else depth + 1
                story.depth = depth
            stories.append(story)
        return stories

    def _causes(self, namespace: NamespaceState, keys: list[bytes], *, chained: bool) -> list[MissCause | None]:
        """Why each key misses now, None where it hits."""
        if chained:
            found = self._store.leading_in_tiers(namespace.id, keys)
            hits = self._would_load(namespace.id, found)
            above = found[hits - 1] if hits else None
            refused = len(found) - hits
            causes = self._misses.causes(namespace, keys[hits:], above, matched=True, refused=refused)
            return [None] * hits + [cause for cause, _ in causes]
        causes_each: list[MissCause | None] = []
        for key in keys:
            if self._store.leading_in_tiers(namespace.id, [key]):
                causes_each.append(None)
            else:
                causes_each.append(self._misses.causes(namespace, [key], None, matched=False)[0][0])
        return causes_each

    def _chapters(self, keys: set[bytes]) -> dict[bytes, list[Chapter]]:
        found: dict[bytes, list[Chapter]] = {}
        for chapter in self._store.story.all():
            if chapter.key in keys:
                found.setdefault(chapter.key, []).append(chapter)
        return {key: chapters[-MOST_CHAPTERS:] for key, chapters in found.items()}

    def _story(self, namespace: NamespaceState, key: bytes, now_ns: int, most_behind: int) -> KeyStory:
        block = namespace.blocks.get(key)
        copy = None if namespace.ssd is None else namespace.ssd.tree.blocks.get(key)
        story = KeyStory(key=key, state=self._state(namespace, block, copy))
        known: list[Block | SsdBlock] = [one for one in (block, copy) if one is not None]
        for one in known:
            story.tiers.append("dram" if isinstance(one, Block) else "ssd")
            story.leases += one.leases
            story.slot_bytes += one.slot_bytes
        if known:
            self._place(namespace, story, known[0])
            records = [record for one in known for record in one.parts.values()]
            story.parts = len({record.part for record in records})
            worst = min(records, key=lambda record: record.fidelity)
            story.codec, story.fidelity = CodecId(worst.codec).text, worst.fidelity
            story.branched = any(one.branched for one in known)
        used = 0
        if block is not None and not block.retired:
            used = self._used(block, most_behind)
        elif copy is not None:
            used = copy.used
        if used > 0:
            story.used_ago = max(self._store.access - used, 0)
        retained = namespace.retained.get(key)
        if retained is not None:
            story.retention = _retention(retained, now_ns)
        self._misses.settle()
        place = self._misses.ghosts.find(namespace.salt, key)
        if place >= 0:
            self._remember(story, place, now_ns, there=bool(known))
        return story

    def _used(self, block: Block, most_behind: int) -> int:
        """Access number of a block's last use, which those behind it were used by as well; 0 where that is unknown."""
        used = self._store.policy.used(block)
        for number, below in enumerate(descendants(block)):
            if number >= most_behind:
                return 0
            if not below.retired:
                used = max(used, self._store.policy.used(below))
        return used

    @staticmethod
    def _state(namespace: NamespaceState, block: Block | None, copy: SsdBlock | None) -> str:
        if block is not None and block.complete:
            return "leaving" if block.retired else "resident"
        if block is None and copy is None:
            return "unknown"
        key = block.key if block is not None else copy.key if copy is not None else b""
        return "incomplete" if namespace.below(key) is None else "below"

    def _place(self, namespace: NamespaceState, story: KeyStory, block: Block | SsdBlock) -> None:
        """Where a block stands in its tree."""
        if block.depth < ORPHAN_DEPTH:
            story.depth = block.depth
        story.children = len(block.children or ())
        if block.parent_key == ROOT_KEY:
            story.parent = "root"
            return
        story.parent_key = block.parent_key
        if block.parent_key in namespace.blocks:
            story.parent = "dram"
        elif namespace.ssd is not None and block.parent_key in namespace.ssd.tree.blocks:
            story.parent = "ssd"
        elif self._misses.ghosts.find(namespace.salt, block.parent_key) >= 0:
            story.parent = "gone"

    def _remember(self, story: KeyStory, place: int, now_ns: int, *, there: bool) -> None:
        """Add what a ghost says."""
        ghosts = self._misses.ghosts
        ghost = ghosts.ghost(place)
        story.ghost = GhostStory(
            cause=ghost.cause.value,
            ago_s=max(now_ns - ghost.since_ns, 0) / 1e9,
            tier="" if ghost.tier is TierId.NONE else ghost.tier.name.lower(),
            policy=ghost.policy,
            extra_bytes=ghosts.extra_bytes(place) if ghosts.out[place] else 0,
            reason="" if ghost.reason is Reason.NONE else ghost.reason.name.lower(),
            back=ghost.back,
        )
        if not there:
            story.state = "gone"
            story.branched = ghost.branched
            if ghost.depth < ORPHAN_DEPTH:
                story.depth = ghost.depth


def _retention(retained: Retained, now_ns: int) -> str:
    """What a client asked for, for people."""
    if retained.expires_ns >= FOREVER_NS:
        return f"priority {retained.priority}"
    left_s = max(retained.expires_ns - now_ns, 0) / 1e9
    then = "then it is removed" if retained.drop else "then it is normal again"
    return f"priority {retained.priority} for {left_s:.1f} s more, {then}"


def _known(state: str) -> str:
    return "gone" if state == "gone" else ""


def _chapter(chapter: Chapter, now_ns: int) -> ChapterStory:
    return ChapterStory(
        ago_s=max(now_ns - chapter.now_ns, 0) / 1e9,
        part=chapter.part,
        before=chapter.before.name.lower(),
        after=chapter.after.name.lower(),
        cause=chapter.cause,
    )


def keys_with(prefix: str, keys: Sequence[bytes]) -> Iterator[bytes]:
    """Those of the keys that begin with some hexadecimal digits. To be asked of a copy, in any thread."""
    whole = bytes.fromhex(prefix[: len(prefix) // 2 * 2])
    for key in keys:
        if key.startswith(whole) and key.hex().startswith(prefix):
            yield key
