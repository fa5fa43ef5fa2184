"""What the stress found: one row a stage, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["StageReport", "StressReport", "stress_tables"]

Phase = Literal["index", "control", "daemon"]


class StageReport(msgspec.Struct, kw_only=True):
    """One stage.

    Attributes:
        phase: ``index``: readers and a writer on shared files, no daemon. ``control``: the same with a faulty variant,
            which must be seen to be wrong. ``daemon``: clients of a private daemon.
        reads, hits: records asked for, and those that came and were checked, every byte.
        retries: copies thrown away because the entry had changed meanwhile; None where nobody counts them.
        wrong_blocks, wrong_bytes: hits that were not what was put under their key.
        leaked_slots: slots that did not come back when everybody was gone.
        hangs: processes and operations that did not end in time.
        details: other counts of this stage.
        problems: what else is wrong, in words.
    """

    phase: Phase
    name: str
    processes: int
    seconds: float = 0.0
    reads: int = 0
    hits: int = 0
    retries: int | None = None
    wrong_blocks: int = 0
    wrong_bytes: int = 0
    leaked_slots: int = 0
    hangs: int = 0
    details: dict[str, int] = msgspec.field(default_factory=dict)
    problems: list[str] = msgspec.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether it came out as it must: a control wrong, anything else without a fault."""
        if self.problems or self.hangs:
            return False
        if self.phase == "control":
            return self.wrong_blocks > 0
        return self.hits > 0 and not self.wrong_blocks and not self.leaked_slots

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.problems:
            return f"FAILED: {self.problems[0].splitlines()[-1]}"
        if self.hangs:
            return "FAILED: something hung"
        if self.phase == "control":
            return "ok: the fault was seen" if self.wrong_blocks else "FAILED: the fault was not seen"
        if self.wrong_blocks:
            return f"FAILED: {self.wrong_blocks} wrong blocks"
        if self.leaked_slots:
            return f"FAILED: {self.leaked_slots} slots leaked"
        return "ok" if self.hits else "FAILED: nothing was read"


class StressReport(msgspec.Struct, kw_only=True):
    """The whole stress."""

    seconds: float
    ok: bool
    stages: list[StageReport]


def stress_tables(report: StressReport) -> RenderableType:
    """A row a stage, then every problem in full."""
    from rich.console import Group
    from rich.text import Text

    from kvstore.cli import render

    table = render.table(
        f"Stress: {render.duration(report.seconds)}",
        [
            "phase",
            render.text_column("stage"),
            "time",
            "checked reads",
            "hits",
            "retries",
            "wrong bytes",
            "leaked slots",
            "hangs",
            render.text_column("outcome"),
        ],
        key_columns=2,
    )
    for stage in report.stages:
        table.add_row(
            stage.phase,
            stage.name,
            render.duration(stage.seconds),
            render.count(stage.reads),
            render.count(stage.hits),
            render.NOTHING if stage.retries is None else render.count(stage.retries),
            render.count(stage.wrong_bytes),
            render.count(stage.leaked_slots),
            render.count(stage.hangs),
            render.plain(stage.outcome),
        )
    problems = [Text(f"{stage.name}: {problem}") for stage in report.stages for problem in stage.problems]
    return Group(table, "", Text("Problems", style="bold"), *problems) if problems else table
