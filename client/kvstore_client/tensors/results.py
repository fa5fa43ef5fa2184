"""What became of blocks that were saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvstore.errors import InvalidArgument
from kvstore.format.constants import FIDELITY_EXACT
from kvstore.protocol.messages import PutStatus

__all__ = ["Failure", "LoadReport", "SaveReport", "lineage_of"]


class Failure(StrEnum):
    """Why a block was not loaded.

    ``MISS``: it is not there, or the namespace was invalidated. ``THROTTLED``: the daemon would not send it now.
    ``LAYOUT``: its record is of another layout or dtype. ``CODEC``: it is of a codec, or of parameters of one, that
    this version does not know. ``LOSSY``: it is not exact and the namespace is. ``CORRUPT``: its bytes are not what its
    header says.
    """

    MISS = "miss"
    THROTTLED = "throttled"
    LAYOUT = "layout"
    CODEC = "codec"
    LOSSY = "lossy"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What ``load_blocks`` loaded; also ``len()``.

    What stands in the target for the blocks from ``loaded`` on is unspecified: they may have been decoded in part.

    Attributes:
        loaded: leading blocks that are in the target.
        fidelities: effective fidelity of each of them, the lowest of it and all blocks before it: 255 is exact.
        lineage: the effective fidelity of what is computed on them: pass the report to ``save_blocks`` as ``lineage``.
        failure: why the block behind them was not loaded, None where all were.
        detail: the same, for people.
        raw_bytes: KV that was loaded.
        stored_bytes: encoded payloads that it came from.
    """

    loaded: int
    fidelities: tuple[int, ...]
    lineage: int
    failure: Failure | None
    detail: str
    raw_bytes: int
    stored_bytes: int

    def __len__(self) -> int:
        return self.loaded


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What ``save_blocks`` stored.

    Attributes:
        statuses: of each block: ``STORED``, ``EXISTS`` (there already, at that or a better fidelity, and then it was
            not encoded), ``THROTTLED``, ``REJECTED``.
        reasons: why blocks were throttled or rejected, by position.
        void: positions of blocks with values that the codec cannot hold (nan, infinities, beyond its range); they went
            to the store by the exact codec.
        raw_bytes: KV of the blocks that were stored.
        stored_bytes: encoded payloads of them.
    """

    statuses: tuple[PutStatus, ...]
    reasons: Mapping[int, str] = field(default_factory=dict)
    void: tuple[int, ...] = ()
    raw_bytes: int = 0
    stored_bytes: int = 0

    @property
    def stored(self) -> int:
        """Blocks that were stored now."""
        return self.statuses.count(PutStatus.STORED)

    @property
    def exists(self) -> int:
        """Blocks that were there already."""
        return self.statuses.count(PutStatus.EXISTS)

    @property
    def complete(self) -> bool:
        """Whether every block is in the store now."""
        return self.stored + self.exists == len(self.statuses)


def lineage_of(given: object) -> int:
    """The fidelity of what blocks are computed on: a number, or the report of the load of it.

    Raises:
        InvalidArgument: neither.
    """
    if isinstance(given, LoadReport):
        return given.lineage
    if type(given) is not int or not 0 <= given <= FIDELITY_EXACT:
        raise InvalidArgument(f"lineage must be 0 to {FIDELITY_EXACT} or the report of a load, got {given!r}")
    return given
