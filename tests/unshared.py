"""Linux namespaces for tests: commands that run in a mount, pid or IPC namespace of their own."""

from __future__ import annotations

import functools
import subprocess

import pytest


@functools.cache
def _problem(flags: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            ["unshare", *flags, "--", "true"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def unshared(*flags: str) -> list[str]:
    """How a command line begins whose process gets namespaces of its own; skips the test where that is not allowed."""
    problem = _problem(flags)
    if problem:
        pytest.skip(f"unshare {' '.join(flags)} is not possible here: {problem}")
    return ["unshare", *flags, "--"]
