"""The stages of ``kvstore verify --stress`` and how the seconds are shared among them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from kvstore.cli.stress.crew import Crew
from kvstore.cli.stress.daemon_stages import DAEMON_STAGES, run_daemon_stage
from kvstore.cli.stress.index_stages import CONTROLS, INDEX_STAGES, run_index_stage
from kvstore.cli.stress.report import StageReport, StressReport

__all__ = ["run_stress"]

_INDEX_SHARE: Final = 0.35
_DAEMON_SHARE: Final = 0.55
_CONTROL_S: Final = 10.0
"""Most seconds of a control; each ends as soon as its fault is seen, within one or two."""


def run_stress(
    seconds: float, on_begin: Callable[[str], None], on_end: Callable[[StageReport], None], seed: int | None = None
) -> StressReport:
    """Run all stages.

    Args:
        seconds: how long they work in all; starting and clearing up come on top.
        on_begin: called with the name of each stage.
        on_end: called with what it found.
        seed: of everything random; None for another one each time.
    """
    rng = random.Random(seed)
    begin = time.monotonic()
    found: list[StageReport] = []
    index_s = seconds * _INDEX_SHARE / len(INDEX_STAGES)
    daemon_s = seconds * _DAEMON_SHARE / len(DAEMON_STAGES)
    with Crew() as crew:
        for stage in (*INDEX_STAGES, *CONTROLS):
            on_begin(f"{'control' if stage.is_control else 'index'}, {stage.name}")
            stage_s = _CONTROL_S if stage.is_control else index_s
            found.append(run_index_stage(crew, stage, stage_s, rng.getrandbits(30)))
            on_end(found[-1])
        for profile in DAEMON_STAGES:
            on_begin(f"daemon, {profile}")
            found.append(run_daemon_stage(crew, profile, daemon_s, rng.getrandbits(30)))
            on_end(found[-1])
    return StressReport(seconds=time.monotonic() - begin, ok=all(stage.ok for stage in found), stages=found)
