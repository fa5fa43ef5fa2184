"""Stages without a daemon: one process churns an index and an arena, others read and check. Controls included."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from kvstore.cli.stress.crew import Crew, Worker, WorkerDied
from kvstore.cli.stress.layout import stage_directory
from kvstore.cli.stress.report import StageReport
from kvstore.errors import DeadlineExceeded

__all__ = ["CONTROLS", "INDEX_STAGES", "IndexStage", "run_index_stage"]

_ANSWER_S: Final = 20.0
_ENOUGH: Final = 20
"""Wrong blocks that prove a control."""


@dataclass(frozen=True, slots=True)
class IndexStage:
    """One stage.

    Attributes:
        shape: see ``layout.SHAPES``.
        ways: how each reader reads, see ``readers.WAYS``.
        verify_every: which reads also check the checksum; 0 for none.
        fault: of the writer, see ``churn.Table``.
        is_control: whether the readers must find wrong blocks.
    """

    name: str
    shape: str
    ways: tuple[str, ...]
    verify_every: int = 0
    fault: str = ""
    is_control: bool = False


INDEX_STAGES: Final = (
    IndexStage("copy, 64 KiB", "64 KiB", ("copy", "copy")),
    IndexStage("copy, 1 MiB", "1 MiB", ("copy", "copy")),
    IndexStage("batch, verified, mixed", "mixed", ("batch", "batch"), verify_every=1),
    IndexStage("views, 64 KiB", "64 KiB", ("pinned", "pinned")),
    IndexStage("copy and views, mixed", "mixed", ("copy", "pinned")),
    IndexStage("copy and views, 8 slots", "tight", ("copy", "pinned")),
)
"""What must be right."""

CONTROLS: Final = (
    IndexStage("no check after the copy", "tight", ("unchecked", "unchecked"), is_control=True),
    IndexStage("hazards ignored", "tight", ("pinned", "pinned"), fault="ignore-hazards", is_control=True),
    IndexStage("hazards before invalidation", "tight", ("pinned", "pinned"), fault="scan-first", is_control=True),
)
"""What must be seen to be wrong, so that nothing wrong above means something."""


def run_index_stage(crew: Crew, stage: IndexStage, seconds: float, seed: int) -> StageReport:
    """Run one stage for about so long; a control ends as soon as its fault is proved."""
    report = StageReport(
        phase="control" if stage.is_control else "index", name=stage.name, processes=1 + len(stage.ways)
    )
    writer, *readers = crew.hire(report.processes)
    with stage_directory() as directory:
        try:
            _play(report, stage, writer, readers, str(directory), seconds, seed)
        except (WorkerDied, DeadlineExceeded) as error:
            report.hangs += isinstance(error, DeadlineExceeded)
            report.problems.append(str(error))
        finally:
            for worker in (writer, *readers):
                if worker.busy:
                    crew.dismiss(worker)
    return report


def _play(
    report: StageReport,
    stage: IndexStage,
    writer: Worker,
    readers: list[Worker],
    directory: str,
    seconds: float,
    seed: int,
) -> None:
    writer.begin(
        "churn",
        seconds,
        directory=directory,
        shape=stage.shape,
        readers=len(readers),
        verify_every=stage.verify_every,
        fault=stage.fault,
        seed=seed,
    )
    files = writer.wait("progress", time.monotonic() + _ANSWER_S)
    enough = _ENOUGH if stage.is_control else 0
    for number, (reader, way) in enumerate(zip(readers, stage.ways, strict=True)):
        how = {"files": files[number], "shape": stage.shape, "way": way, "seed": seed + 1 + number}
        reader.begin("read", seconds, seconds=seconds, enough=enough, **how)
    _collect(report, readers, seconds, enough)
    writer.stop()
    _add_writer(report, writer.wait("done", time.monotonic() + _ANSWER_S))


def _collect(report: StageReport, readers: Iterable[Worker], seconds: float, enough: int) -> None:
    """What the readers found; of a control, what the others found when the first had enough."""
    deadline = time.monotonic() + seconds + _ANSWER_S
    results: list[dict[str, Any]] = []
    for reader in readers:
        if results and enough and report.wrong_blocks >= enough:
            reader.stop()
        found = reader.wait("done", deadline)
        results.append(found)
        report.seconds = max(report.seconds, found["seconds"])
        report.reads += found["reads"]
        report.hits += found["hits"]
        report.wrong_blocks += found["wrong_blocks"]
        report.wrong_bytes += found["wrong_bytes"]
        for name in ("busy", "misses"):
            report.details[name] = report.details.get(name, 0) + found[name]
        if found["other"]:
            report.problems.append(f"{found['other']} reads ended in an answer that is none of hit, miss and retry")
        if found["held"]:
            report.problems.append(f"{found['held']} hazard words were set although nothing was read")
        if found["retries"] is not None:
            report.retries = (report.retries or 0) + found["retries"]


def _add_writer(report: StageReport, found: dict[str, int]) -> None:
    report.leaked_slots = found.pop("leaked_slots")
    report.details |= found
