"""Which steps of an engine count for the rate at which it computes prompts, and when that is told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvstore_client.integrations.prefill_times import CpuMark, PrefillTimes


@dataclass
class Device:
    """Its time, and how far it is behind the marks that were queued."""

    now: float = 0.0
    done: float = 0.0
    marks: list[float] = field(default_factory=list)

    def mark(self) -> DeviceMark:
        self.marks.append(self.now)
        return DeviceMark(self, self.now)

    def step(self, times: PrefillTimes, prefill: int, other: int, seconds: float) -> None:
        times.begin(prefill, other)
        self.now += seconds
        times.end()
        self.done = self.now


@dataclass
class DeviceMark:
    device: Device
    at: float

    def is_reached(self) -> bool:
        return self.at <= self.device.done

    def seconds_since(self, earlier: object) -> float:
        assert self.is_reached()
        assert isinstance(earlier, DeviceMark)
        return self.at - earlier.at


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def times(device: Device) -> PrefillTimes:
    return PrefillTimes(device.mark)


def test_steps_of_prompts_are_summed_up_to_a_second(device: Device, times: PrefillTimes) -> None:
    device.step(times, 2048, 0, 0.75)
    assert times.take() is None
    device.step(times, 1024, 30, 0.5)
    assert times.take() == (3072, 1.25)
    assert times.take() is None
    device.step(times, 4096, 4096, 1.0)
    assert times.take() == (4096, 1.0)


@pytest.mark.parametrize(("prefill", "other"), [(0, 64), (127, 0), (200, 201)])
def test_steps_that_say_little_of_prompts_do_not_count(
    device: Device, times: PrefillTimes, prefill: int, other: int
) -> None:
    for _ in range(5):
        device.step(times, prefill, other, 1.0)
    assert times.take() is None
    assert not device.marks


def test_steps_that_the_device_has_not_computed_are_waited_for_by_nobody(device: Device, times: PrefillTimes) -> None:
    times.begin(500, 0)
    device.now += 2.0
    times.end()
    assert times.take() is None
    device.done = device.now
    assert times.take() == (500, 2.0)


def test_a_step_that_never_ended_does_not_count(device: Device, times: PrefillTimes) -> None:
    times.begin(500, 0)
    device.now += 100.0
    device.step(times, 500, 0, 1.0)
    assert times.take() == (500, 1.0)
    times.end()
    assert times.take() is None


def test_a_device_that_hangs_costs_no_memory(device: Device, times: PrefillTimes) -> None:
    for _ in range(10_000):
        times.begin(500, 0)
        device.now += 1.0
        times.end()
    device.done = device.now
    taken = times.take()
    assert taken is not None
    assert taken[0] <= 500 * 1000


def test_on_a_cpu_a_mark_is_now() -> None:
    first, second = CpuMark(), CpuMark()
    assert first.is_reached()
    assert second.seconds_since(first) >= 0
