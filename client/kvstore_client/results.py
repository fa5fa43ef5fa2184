"""What operations give back, where a plain Python type does not say enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.messages import TierName


@dataclass(frozen=True, slots=True)
class MatchResult:
    """Leading blocks that are there.

    Attributes:
        hits: how many; also ``len()``.
        tiers: where each of them lies: the nearest tier that has all of it.
        request: pass it as ``request=`` to the gets and puts of the same engine request, so that the eviction policy
            sees one access a block, and its tail leaves before its head.
        lease: id of the lease, 0 for none.
        lease_s: how long the lease holds from the answer on.
        fidelity: the lowest effective fidelity among the hits' records, 255 where all are exact: the lineage of what is
            computed on them.
        recompute: blocks behind the hits that are in a tier below, and are computed sooner than they are loaded.
    """

    hits: int
    tiers: list[TierName]
    request: int
    lease: int = 0
    lease_s: float = 0.0
    fidelity: int = FIDELITY_EXACT
    recompute: int = 0

    def __len__(self) -> int:
        return self.hits


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of blocks, or a part of one, in a list of what a tier holds.

    Attributes:
        digest: of its namespace's generation.
        namespace: the namespace's name.
        keys: parents first; what comes before the first is in a chain before it in the list, or nowhere.
    """

    digest: bytes
    namespace: str
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class WarmResult:
    """What became of the blocks of chains that were to come up into memory.

    Attributes:
        brought, brought_bytes: that came up, and their slots.
        there: that were in memory already.
        unknown: that no tier has.
        no_room: for which there was no room.
        failed: that could not be read.
        not_tried: for which the budget or the time was used up.
    """

    brought: int = 0
    brought_bytes: int = 0
    there: int = 0
    unknown: int = 0
    no_room: int = 0
    failed: int = 0
    not_tried: int = 0


@dataclass(slots=True)
class ReadBatch:
    """What became of a batch of reads in mapped memory.

    Attributes:
        lengths: of each key's data, None for a miss and for what is in ``asked``.
        asked: positions that must be asked for.
        missed: those of them that are not in mapped memory, and may be in a tier below it.
        access: the engine request.
    """

    keys: list[bytes]
    outs: list[object]
    access: int
    lengths: list[int | None]
    asked: list[int]
    missed: list[int] = field(default_factory=list)

    def arguments(self) -> tuple[list[bytes], list[object], list[bytes]]:
        """Keys and buffers of what must be asked for, and keys of what was missed."""
        asked = self.asked
        return [self.keys[at] for at in asked], [self.outs[at] for at in asked], [self.keys[at] for at in self.missed]

    def fill(self, lengths: list[int | None]) -> None:
        """Take over what was answered."""
        for at, length in zip(self.asked, lengths, strict=True):
            self.lengths[at] = length


@dataclass(frozen=True, slots=True)
class FlushResult:
    """What became of the ``wait=False`` puts since the last flush, counted in records.

    Attributes:
        stored, exists, throttled, rejected: answers.
        lost: unanswered, because the daemon went away.
        reasons: why records were throttled or rejected, by name.
    """

    stored: int = 0
    exists: int = 0
    throttled: int = 0
    rejected: int = 0
    lost: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
