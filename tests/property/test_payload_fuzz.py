"""Mutated payloads of every codec, under right checksums, against the kernels of the CPU in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import payload_fuzz
import pytest
from daemon_process import child_environment

MUTATIONS = 6_000


@pytest.mark.timeout(170)
def test_payloads_mutated_are_refused_or_decode_to_the_right_size():
    """A wrong read or write ends the process; where the reference gives numbers, so do the kernels, and the same."""
    command = [sys.executable, str(Path(payload_fuzz.__file__)), str(MUTATIONS), "6"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=160)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("grown_mib") < 32
    assert outcomes.pop("compared") > MUTATIONS / 10
    assert sum(outcomes.values()) == MUTATIONS
    assert min(outcomes.values()) > 50, outcomes
    assert {"fixed right size", "lossless refused", "lossless right size", "other lengths refused"} <= set(outcomes)
    assert "fixed refused" not in outcomes
