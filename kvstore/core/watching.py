"""Who looks on while the store works: what was asked for, what became resident, what left and why.

Ghosts, recording and the live hit-ratio curve are watchers. They change nothing; what they do is on the store's way, so
it must be little.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvstore.core.block import Block
    from kvstore.core.events import Accessed, CommittedRecord
    from kvstore.core.namespaces import NamespaceState
    from kvstore.core.ssd_record import SsdBlock
    from kvstore.protocol.messages import Reason


class Cause(StrEnum):
    """Why a block left a tier."""

    EVICTED = "evicted"
    """For others."""
    QUOTA = "quota"
    """For others of its tenant, whose quota was used up."""
    EXPIRED = "expired"
    """Its time was over, as a client had wanted."""
    REMOVED = "removed"
    """By a client, by key."""
    CLEARED = "cleared"
    """By a client, with its whole namespace."""
    INVALIDATED = "invalidated"
    """Its namespace is in a later generation."""
    CORRUPT = "corrupt"
    """Its bytes were not what was committed."""


class Watcher(Protocol):
    """Is told what happens in DRAM. Must not raise, nor change the store."""

    def accessed(
        self,
        namespace_id: int,
        access: int,
        runs: Sequence[tuple[Block | SsdBlock, int]],
        asked: int,
        missing: Sequence[bytes],
    ) -> None:
        """One access report, before the policy hears of it.

        Args:
            namespace_id: where it was asked.
            access: access number of the engine request; its match, get and puts have the same one.
            runs: the hits, as runs of parents and children: each run's deepest block and its length.
            asked: keys asked for.
            missing: those that were not there, in order; of a mapped client the first few.
        """

    def stored(self, block: Block, access: int, *, promoted: bool) -> None:
        """A block became resident, with its first part; ``promoted``: from a tier below, not by a client."""

    def left(self, block: Block, cause: Cause) -> None:
        """A block leaves DRAM; it is still linked, and its parts are still there. It may be in a tier below."""


class Explainer(Protocol):
    """Gives misses their causes: is told, beside what watchers are, all that the causes take. Must not raise."""

    def committed(
        self, namespace: NamespaceState, records: Sequence[CommittedRecord], reasons: Sequence[Reason]
    ) -> None:
        """Records were committed; why each was refused, ``NONE`` where it was not."""

    def orphaned(self, block: Block) -> None:
        """A block was stored whose parent is in no tier."""

    def left(self, block: Block, cause: Cause) -> None:
        """As ``Watcher.left``."""

    def policy_changed(self) -> None:
        """What leaves from now on another policy chooses."""

    def reported(self, report: Accessed, access: int) -> None:
        """An access report, and the access number of its engine request."""

    def refused(self, namespace: NamespaceState, key: bytes, reason: Reason) -> None:
        """A put of a block was throttled or rejected."""

    def refused_behind(self, namespace: NamespaceState, parent_key: bytes, reason: Reason) -> None:
        """There was no slot for a block behind this one, whose key the client did not say."""

    def failed_load(self, namespace: NamespaceState, key: bytes) -> None:
        """A block that is below, or was till now, could not be brought up."""
