"""Settings of hypothesis, and checks that tests give back what they took.

Profiles of hypothesis: ``ci`` (default; the same examples in every run, nothing stored) and ``dev`` (new examples in
every run, failures remembered), ``nightly`` (as ``dev``, fifty times as many). Choose with
``--hypothesis-profile=dev`` or ``HYPOTHESIS_PROFILE=dev``.

Tests under ``tests/integration`` and ``tests/stress`` are checked for leaked descriptors, threads, child processes,
shared memory and asyncio tasks. Any other test can ask for that with the fixtures ``no_leaks`` and
``no_leaked_tasks``.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from leaks import GRACE_S, POLL_S, Snapshot

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", deadline=None, max_examples=5000, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

CHECKED = tuple(Path(__file__).parent / name for name in ("integration", "stress"))


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test when a descriptor, thread, child process or shared-memory file outlives it."""
    before = Snapshot.take()
    yield
    leaks = before.leaks_since()
    assert not leaks, f"the test left behind: {', '.join(leaks)}"


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fails an async test when a task that it started is still running after it and its fixtures are done."""
    before = asyncio.all_tasks()
    yield
    loop = asyncio.get_running_loop()
    end = loop.time() + GRACE_S
    while leaked := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if loop.time() >= end:
            raise AssertionError(f"the test left tasks behind: {', '.join(sorted(map(repr, leaked)))}")
        await asyncio.sleep(POLL_S)


@pytest.fixture(autouse=True)
def _leak_checks(request: pytest.FixtureRequest) -> None:
    if any(request.path.is_relative_to(directory) for directory in CHECKED):
        request.getfixturevalue("no_leaks")
        if inspect.iscoroutinefunction(getattr(request, "function", None)):
            request.getfixturevalue("no_leaked_tasks")


def pytest_configure() -> None:
    """A run in the background of a script inherits an ignored SIGINT, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
