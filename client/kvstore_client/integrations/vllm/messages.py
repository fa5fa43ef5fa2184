"""What the scheduler's half of the connector tells the workers' halves with each step, and what they answer.

Both are pickled by the engine between its own processes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

__all__ = ["LoadJob", "SaveJob", "StepJobs", "StepReport"]

Pages = tuple[tuple[int, ...], ...]
"""For each KV group the pages of all store blocks of a job, in order; page 0 is no page."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Store blocks to be loaded for a request.

    Attributes:
        number: of the job; reports name it.
        request_id: of the engine's request.
        keys: of the store blocks.
        pages: where they belong.
        skip_tokens: tokens of the first block that the engine has already: their pages are in use and stay as they are.
        before: page of KV group 0 before the first block, 0 for none.
        wait: whether this step computes on them.
    """

    number: int
    request_id: str
    keys: tuple[bytes, ...]
    pages: Pages
    skip_tokens: int
    before: int
    wait: bool


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Store blocks whose KV is complete after this step.

    Attributes:
        number: of the job; reports name it.
        request_id: of the engine's request.
        keys: of the store blocks.
        parent: key of the block before the first, None for a prompt's beginning.
        pages: where they are.
        generation: of the namespace, as the scheduler knew it.
    """

    number: int
    request_id: str
    keys: tuple[bytes, ...]
    parent: bytes | None
    pages: Pages
    generation: int


@dataclass(slots=True)
class StepJobs(KVConnectorMetadata):
    """The work of one step.

    Attributes:
        generation: of the namespace; workers that are in an older one join it.
        loads, saves: see there.
        computed: for each request scheduled now, of KV group 0, the page before those that are written in this step, 0
            for none, and these.
        prefill_tokens, other_tokens: that this step computes, of prompts and behind them.
        flush: jobs whose pages are about to be used for something else.
        finished: requests whose pages are kept until their saves are done.
    """

    generation: int = -1
    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    computed: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    prefill_tokens: int = 0
    other_tokens: int = 0
    flush: frozenset[int] = frozenset()
    finished: frozenset[str] = frozenset()


@dataclass(slots=True)
class StepReport(KVConnectorWorkerMetadata):
    """What workers did since their last report; numbers of workers where it is counted.

    Attributes:
        saved: jobs that are over, whatever became of them.
        loaded: loads that are over.
        failed: those of them of which a block is missing.
    """

    saved: Counter[int] = field(default_factory=Counter)
    loaded: Counter[int] = field(default_factory=Counter)
    failed: set[int] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """This report with another worker's."""
        assert isinstance(other, StepReport)
        return StepReport(self.saved + other.saved, self.loaded + other.loaded, self.failed | other.failed)

    def __bool__(self) -> bool:
        return bool(self.saved or self.loaded or self.failed)
