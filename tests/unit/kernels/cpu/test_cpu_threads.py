"""Threads that work beside the caller's: kept, waited for only where they have begun, never left on its processor."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore_kernels import cpu
from kvstore_kernels.codecs import get_codec
from kvstore_kernels.cpu import threads
from kvstore_kernels.cpu.threads import run_jobs
from kvstore_kernels.layout import KVLayout
from kvstore_kernels.paged import PagedKV

_SOON_S = 10.0


class FakeJob:
    """A job that calls a function in each thread that runs it."""

    def __init__(self, call: Callable[[], object], plane_bytes: int = 1 << 30) -> None:
        self.plan = SimpleNamespace(place_bytes=64)
        self.plane_bytes = plane_bytes
        self._call = call
        self.places: list[int] = []

    def run(self, place: int) -> None:
        self.places.append(place)
        self._call()


def run(call: Callable[[], object], count: int, **options: Any) -> FakeJob:
    job = FakeJob(call, **options)
    run_jobs([job], count)  # type: ignore[list-item]
    return job


@pytest.fixture(scope="module", autouse=True)
def short_idleness() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threads, "_IDLE_S", 0.05)
        yield


@pytest.fixture(autouse=True)
def no_threads_left(short_idleness: None) -> None:
    """Each test begins without idle threads."""
    wait_for(lambda: not threads._idle)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 2 * _SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_each_thread_has_a_place_of_its_own() -> None:
    together = threading.Barrier(4)
    job = run(lambda: together.wait(_SOON_S), 4)
    assert len(set(job.places)) == 4
    assert all(place % 64 == 0 for place in job.places)


def test_a_thread_is_used_again_and_ends_when_it_was_idle() -> None:
    before = len(os.listdir("/proc/self/task"))
    seen: set[int] = set()
    for _ in range(20):
        together = threading.Barrier(2)
        run(lambda together=together: (seen.add(threading.get_native_id()), together.wait(_SOON_S)), 2)
    assert len(seen) == 2
    wait_for(lambda: len(os.listdir("/proc/self/task")) <= before)


def test_little_work_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_worker", lambda: pytest.fail("a thread was asked for"))
    assert len(run(lambda: None, 8, plane_bytes=(2 << 20) - 1).places) == 1


def test_a_thread_that_wakes_too_late_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Any] = []
    monkeypatch.setattr(threads, "_worker", lambda: SimpleNamespace(begin=late.append))
    ran = run(lambda: None, 3)
    assert len(ran.places) == 1
    assert len(late) == 2
    assert not any(share.belongs_to("a late thread") for share in late)


def test_what_goes_wrong_in_another_thread_is_raised_when_all_are_done() -> None:
    caller, done, together = threading.get_ident(), [], threading.Barrier(3)

    def call() -> None:
        together.wait(_SOON_S)
        if threading.get_ident() == caller:
            raise LookupError("the caller's")
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(LookupError, match="the caller's"):
        run(call, 3)
    assert len(done) == 2


def test_an_interrupt_leaves_nobody_at_work() -> None:
    caller, done, together = threading.get_ident(), [], threading.Barrier(2)

    def call() -> None:
        together.wait(_SOON_S)
        if threading.get_ident() == caller:
            raise KeyboardInterrupt
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        run(call, 2)
    assert done


def test_an_interrupt_while_others_are_waited_for_is_raised_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []

    class Share(threads._Share):
        """Whose lock is interrupted when it is waited for."""

        def __init__(self, call: Any) -> None:
            super().__init__(call)
            real = self.done

            def enter(lock: object) -> None:
                waits.append("wait")
                if len(waits) == 1:
                    raise KeyboardInterrupt
                real.acquire()

            lock = type(
                "Lock", (), {"__enter__": enter, "__exit__": lambda *_: real.release(), "release": real.release}
            )
            self.done = lock()

    monkeypatch.setattr(threads, "_Share", Share)
    together, done, caller = threading.Barrier(2), [], threading.get_ident()

    def call() -> None:
        together.wait(_SOON_S)
        if threading.get_ident() != caller:
            time.sleep(0.05)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        run(call, 2)
    assert done
    assert len(waits) == 2


def test_interrupts_at_any_moment_leave_nothing_locked_and_nobody_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that strikes in somebody's destructor is told to this hook, and may strike there as well.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    gc.disable()
    caller, working = threading.get_ident(), []
    interrupted = finished = 0

    def call() -> None:
        if threading.get_ident() == caller:
            time.sleep(0.0002)
            return
        working.append(1)
        time.sleep(0.0003)
        working.pop()

    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    until = time.monotonic() + 2
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        while time.monotonic() < until:
            try:
                armed = True
                run(call, 3)
                armed = False
                finished += 1
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
            assert not working
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert interrupted > 50
    assert finished > 50
    run(lambda: None, 3)


def test_callers_at_the_same_time_have_threads_of_their_own() -> None:
    together = threading.Barrier(6)
    callers = [threading.Thread(target=run, args=(lambda: together.wait(_SOON_S), 2)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(_SOON_S)
    assert not any(caller.is_alive() for caller in callers)
    assert not together.broken


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor")
def test_two_threads_begin_on_two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would often begin on one, and do when nobody steps aside."""
    allowed, cpu_of = os.sched_getaffinity(0), threads._current_cpu
    caller = threading.get_ident()
    for _ in range(50):
        home, places, together = cpu_of(), {}, threading.Barrier(2)

        def call(places: dict[bool, int] = places, together: threading.Barrier = together) -> None:
            places[threading.get_ident() == caller] = cpu_of()
            together.wait(_SOON_S)

        os.sched_setaffinity(0, {home})  # The caller stays, and a new thread is where it is.
        try:
            with monkeypatch.context() as patched:
                patched.setattr(os, "sched_getaffinity", lambda who: allowed)
                run(call, 2)
        finally:
            os.sched_setaffinity(0, allowed)
        assert places[True] == home != places[False]


def test_a_thread_runs_where_its_caller_may() -> None:
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    masks: list[set[int]] = []
    for mask in (allowed, one, allowed):
        os.sched_setaffinity(0, mask)
        try:
            together = threading.Barrier(2)
            run(lambda together=together: (masks.append(os.sched_getaffinity(0)), together.wait(_SOON_S)), 2)
        finally:
            os.sched_setaffinity(0, allowed)
        assert masks[-2:] == [mask, mask]


def test_processors_that_went_away_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(who: int, mask: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(threads, "_current_cpu", lambda: -1)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    together = threading.Barrier(2)
    assert len(run(lambda: together.wait(_SOON_S), 2).places) == 2


def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_IDLE_S", 1.0)
    codec, layout = get_codec("int8"), KVLayout(4, 2, 64, "bfloat16", 64)
    blocks = 64
    numbers = np.random.default_rng(3).standard_normal((4, 2, blocks * 64, 2, 64), np.float32)
    kv = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    pages = np.arange(blocks, dtype=np.int32)[:, None]
    size = sum(codec.max_section_bytes(layout))

    def encoded() -> bytes:
        memory = np.zeros((blocks, size), np.uint8)
        addresses = np.uint64(memory.ctypes.data) + np.arange(blocks, dtype=np.uint64) * np.uint64(size)
        cpu.encode(codec, PagedKV.from_tensor(layout, kv), pages, addresses, threads=3)
        return memory.tobytes()

    expected = encoded()
    wait_for(lambda: bool(threads._idle))
    child = os.fork()
    if child == 0:
        passed = False
        try:
            alone = len(os.listdir("/proc/self/task")) == 1
            passed = alone and encoded() == expected and len(os.listdir("/proc/self/task")) > 1
        finally:
            os._exit(not passed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert encoded() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_stretches_are_each_done_once(count: int, most: int) -> None:
    done: list[int] = []
    stretches: list[int] = []

    def work(first: int, number: int) -> None:
        stretches.append(number)
        done.extend(range(first, first + number))

    threads.share_out(work, count, most)
    assert sorted(done) == list(range(count))
    assert len(stretches) <= most
    assert all(stretches)
