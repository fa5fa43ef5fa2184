"""Loading blocks: decoded straight from mapped slots, or from received records where that cannot be."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.errors import Throttled
from kvstore.mapped.context import CORRUPT, MISS, STALE
from kvstore_client.operations import Operations
from kvstore_client.session import Session
from kvstore_client.tensors.backends import Addresses, Backend
from kvstore_client.tensors.blocks import Blocks
from kvstore_client.tensors.plan import StorePlan
from kvstore_client.tensors.records import Problem, Run
from kvstore_client.tensors.results import Failure, LoadReport
from kvstore_client.tensors.work import Work

if TYPE_CHECKING:
    from kvstore_client.mapped_batches import HeldBatch
    from kvstore_client.mapped_session import MappedSession

__all__ = ["Loading"]

_MOST_BLOCKS: Final = 32
"""Blocks that are held at a time: half of the hazards of a client."""
_RECEIVE_BYTES: Final = 16 << 20
_ALIGNED: Final = 64

_WHY: Final[dict[int, Problem]] = {
    MISS: (Failure.MISS, "it is not there"),
    STALE: (Failure.MISS, "the namespace was invalidated"),
    CORRUPT: (Failure.CORRUPT, "its header is not that of the record that the index names"),
}


class Loading:
    """One call of ``load_blocks``.

    Args:
        session, operations: of the client, which is connected.
        plan: what is stored.
        backend: the kernels.
        blocks: what is loaded, and where to.
        lineage: effective fidelity of the blocks before the first.
        access: the engine request.
        sure: a miss in mapped memory is a miss; False where this client's puts are under way.
        stream: of a device, after whose work blocks are decoded.
    """

    def __init__(
        self,
        session: Session,
        operations: Operations,
        plan: StorePlan,
        backend: Backend,
        blocks: Blocks,
        lineage: int,
        access: int,
        sure: bool,
        stream: object,
    ) -> None:
        self._session = session
        self._operations = operations
        self._plan = plan
        self._backend = backend
        self._blocks = blocks
        self._lineage = lineage
        self._access = access
        self._sure = sure
        self._stream = stream
        self._brought_up = -1
        """Whether what was missed was asked for, so that a miss in mapped memory is one."""
        self._loaded = 0
        self._fidelities: list[int] = []
        self._stored_bytes = 0

    def run(self) -> Work[LoadReport]:
        """Load leading blocks until one cannot be."""
        problem: Problem | None = None
        while self._loaded < len(self._blocks.keys) and problem is None:
            before = self._loaded
            mapped = self._session.mapped
            if mapped is not None:
                problem = yield from self._from_slots(mapped)
            if problem is None and self._loaded == before:
                if mapped is not None and mapped.lower_tiers and self._brought_up != self._loaded:
                    yield from self._bring_up(mapped)
                else:
                    problem = yield from self._received(None if mapped is None else 1)
        fidelities = np.minimum.accumulate([self._lineage, *self._fidelities]).tolist()
        return LoadReport(
            loaded=self._loaded,
            fidelities=tuple(fidelities[1:]),
            lineage=fidelities[-1],
            failure=None if problem is None else problem[0],
            detail="" if problem is None else f"block {self._loaded}: {problem[1]}",
            raw_bytes=self._loaded * self._plan.layout.block_bytes,
            stored_bytes=self._stored_bytes,
        )

    def _count(self, runs: list[Run], fidelities: list[int], good: int) -> None:
        """Take over that the first ``good`` blocks of these runs were loaded."""
        self._stored_bytes += sum(int(run.section_bytes[: max(good - run.start, 0)].sum()) for run in runs)
        self._fidelities += fidelities[:good]
        self._loaded += good

    # -------------------------------------------------------------- from mapped memory

    def _from_slots(self, mapped: MappedSession) -> Work[Problem | None]:
        """Decode the next blocks in place; why the next one cannot be loaded, None where it has to be asked for."""
        from kvstore_client.mapped_batches import HeldBatch

        keys = self._blocks.keys[self._loaded : self._loaded + _MOST_BLOCKS]
        sure = self._brought_up == self._loaded or (self._sure and not mapped.lower_tiers)
        with HeldBatch(mapped, keys, self._plan.part, sure) as held:
            problem = _WHY.get(held.why)
            good = 0
            if held.count:
                runs, fidelities, unreadable = self._plan.readable.runs(held.headers)
                problem = unreadable or problem
                if fidelities:
                    good, torn = yield partial(self._decode_held, held, runs, len(fidelities))
                    problem = torn or problem
                    self._count(runs, fidelities, good)
            held.report(good, self._access)
        return problem

    def _bring_up(self, mapped: MappedSession) -> Work[None]:
        """Have all that mapped memory lacks of this call come up into it, as far as it does in time."""
        from kvstore_client.mapped_batches import fidelities

        found = fidelities(mapped, self._blocks.key_words[self._loaded :], self._plan.part)
        missed = [self._blocks.keys[self._loaded + at] for at in np.flatnonzero(found < 0).tolist()]
        self._brought_up = self._loaded
        if missed:
            yield self._operations.bring_up(missed)

    def _decode_held(self, held: HeldBatch, runs: list[Run], count: int) -> tuple[int, Problem | None]:
        """Decode the first ``count`` records that are held; how many leading ones count, and why the next does not."""
        payloads = held.payloads()
        if self._backend.reaches(held.mapped, payloads, held.lengths()):
            decoded, problem = self._decode(payloads, runs)
        else:
            decoded, problem = self._decode_copies([held.payload(index) for index in range(count)], runs)
        good = held.verify(decoded)
        if good < decoded:
            return good, (Failure.CORRUPT, "its bytes changed, or its checksum is wrong")
        if problem is not None and problem[0] is Failure.CORRUPT:
            held.suspect(decoded)
        return good, problem

    def _decode(self, payloads: Addresses, runs: list[Run]) -> tuple[int, Problem | None]:
        """Decode payloads into the next blocks; how many leading ones, and why not the next."""
        for run in runs:
            unable = self._backend.check(run.records.codec, self._blocks.kv)
            if unable:
                return run.start, (Failure.CODEC, unable)
            try:
                self._decode_run(payloads, run, run.start, run.stop)
            except ValueError:
                if run.records.fixed:
                    raise
                # One of them is no payload of its codec: find out which.
                for at in range(run.start, run.stop):
                    try:
                        self._decode_run(payloads, run, at, at + 1)
                    except ValueError as error:
                        return at, (Failure.CORRUPT, str(error))
        return runs[-1].stop, None

    def _decode_run(self, payloads: Addresses, run: Run, start: int, stop: int) -> None:
        pages = self._blocks.pages[self._loaded + start : self._loaded + stop]
        lengths = run.section_bytes[start - run.start : stop - run.start]
        self._backend.decode(run.records.codec, self._blocks.kv, pages, payloads[start:stop], lengths, self._stream)

    # -------------------------------------------------------------- received

    def _received(self, most: int | None) -> Work[Problem | None]:
        """Ask for the next blocks and decode what is received; why the one behind them cannot be loaded."""
        if most is None:
            most = max(1, _RECEIVE_BYTES // self._plan.records.max_payload_bytes)
        keys = self._blocks.keys[self._loaded : self._loaded + most]
        try:
            records = yield self._operations.get_records(keys, self._plan.part, self._access)
        except Throttled as error:
            return Failure.THROTTLED, str(error)
        there = next((index for index, record in enumerate(records) if record is None), len(records))
        problem = _WHY[MISS] if there < len(records) else None
        runs, fidelities, unreadable = self._plan.readable.runs_of([header for header, _ in records[:there]])
        problem = unreadable or problem
        if fidelities:
            payloads = [payload for _, payload in records[: len(fidelities)]]
            good, torn = yield partial(self._decode_copies, payloads, runs)
            problem = torn or problem
            self._count(runs, fidelities, good)
        return problem

    def _decode_copies(self, payloads: list[memoryview], runs: list[Run]) -> tuple[int, Problem | None]:
        """Decode payloads that lie where kernels cannot read them, or not aligned."""
        lengths = [-(-payload.nbytes // _ALIGNED) * _ALIGNED for payload in payloads]
        memory = self._backend.scratch.take(sum(lengths))
        try:
            begins = np.cumsum([0, *lengths[:-1]])
            for begin, payload in zip(begins.tolist(), payloads, strict=True):
                memory[begin : begin + payload.nbytes] = payload
            addresses = (int(memory.ctypes.data) + begins).astype(np.uint64)
            return self._decode(addresses, runs)
        finally:
            self._backend.scratch.put(memory)
