"""What a segment is like: the class whose returns are counted together (``kvstore.policy.hazards``).

A *tail* is where one chat session may go on, *shared* segments have known ones below, and an *abandoned* one was
left behind by the last request that came by. Sizes are taken relative to what requests have in the mean, so that they
mean the same for any block size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from kvstore.policy.hazards import Cell
from kvstore.policy.segments import Segment

TAIL: Final = 0
SHARED: Final = 1
ABANDONED: Final = 2
GROUPS: Final = 3

_PROMPT_FROM: Final = 16
"""Known children from which on a segment is a prompt that is common to many."""
_PROMPTS: Final = 8
_EDITED_BELOW: Final = 4
"""With fewer children a new branch is taken for an edit of the same turn."""

_TURNS: Final = 6
_CHILDREN: Final = (2, 3, 4, 5, 8, 16)
_RETURNS: Final = (2, 3, 5, 9)
_FRESH: Final = (0.07, 0.14, 0.28, 0.56, 1.12)
_FRESH_SHARES: Final = (0.05, 0.1, 0.2, 0.4, 0.7, 0.99)
_GAPS_S: Final = (0.0, 3.0, 10.0, 30.0, 60.0, 120.0, 240.0)
_MEAN_GAPS_S: Final = tuple(0.5 * 2.0**octave for octave in range(13))
_GAP_WEIGHT: Final = 1 / 8
_FRESH_WEIGHT: Final = 1 / 500


def note_return(segment: Segment, gap_s: float) -> None:
    """A segment was used again after so many seconds."""
    segment.gap_s = gap_s
    segment.returns += 1
    segment.mean_gap_s += (gap_s - segment.mean_gap_s) * max(_GAP_WEIGHT, 1 / segment.returns)
    if not segment.children:
        segment.turn += 1


def begin_session(path: Sequence[Segment]) -> None:
    """The last segment of a path is new: a session of its own, or an edit of one that went on otherwise."""
    tip = path[-1]
    tip.turn, tip.gap_s = 1, -1.0
    if len(path) > 1:
        above = path[-2]
        if len(above.children or ()) < _EDITED_BELOW:
            tip.turn, tip.gap_s = above.turn, above.gap_s


class SegmentClasses:
    """Classes of the segments of one request after the other."""

    __slots__ = ("_free_prompts", "_mean_fresh", "_prompt", "_requests", "_share")

    def __init__(self) -> None:
        self._requests = 0
        self._mean_fresh = 0.0
        self._share = 0.0
        self._prompt = 0
        self._free_prompts = list(range(_PROMPTS, 0, -1))

    def begin(self, path: Sequence[Segment], fresh: int) -> None:
        """The segments that follow are of this path, of a request with so many new blocks."""
        self._requests += 1
        self._mean_fresh += (fresh - self._mean_fresh) * max(_FRESH_WEIGHT, 1 / self._requests)
        self._prompt = blocks = 0
        for segment in path:
            blocks += len(segment.keys)
            if segment.children and len(segment.children) >= _PROMPT_FROM:
                if not segment.prompt and self._free_prompts:
                    segment.prompt = self._free_prompts.pop()
                self._prompt = segment.prompt
        self._share = fresh / blocks

    def forgotten(self, segment: Segment) -> None:
        """Another prompt may have its number."""
        if segment.prompt:
            self._free_prompts.append(segment.prompt)
            segment.prompt = 0

    def of(self, segment: Segment) -> Cell:
        """A segment's class; if it is a tail, as the last of the path."""
        children = segment.children
        if children:
            stratum = bisect_right(_MEAN_GAPS_S, segment.mean_gap_s)
            return (SHARED, stratum, bisect_right(_CHILDREN, len(children)), bisect_right(_RETURNS, segment.returns))
        mean_fresh = self._mean_fresh or 1.0
        if segment.abandoned:
            return (ABANDONED, 0, bisect_right(_FRESH, len(segment.keys) / mean_fresh))
        return (
            TAIL,
            bisect_right(_GAPS_S, segment.gap_s),
            min(segment.turn, _TURNS) - 1,
            bisect_right(_FRESH, segment.fresh / mean_fresh),
            bisect_right(_FRESH_SHARES, self._share),
            self._prompt,
        )
