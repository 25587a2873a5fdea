"""Timing: what is asked of a device's clock, and what is made of its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adasplash_tuner.measure.clocks import CpuTimer, GpuTimer, timer_for


class Clock:
    """A device on which each run takes the next of ``times``, and that may refuse to capture."""

    def __init__(self, *times: float, captures: bool = True) -> None:
        self.times, self.captures = list(times), captures
        self.ran: list[str] = []

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any] | None:
        run()
        return (lambda: self.ran.append("replay")) if self.captures else None

    def measure_ms(self, run: Callable[[], Any], repeats: int) -> list[float]:
        for _ in range(repeats):
            run()
        return [self.times.pop(0) for _ in range(repeats)]


def test_a_pass_that_captures_is_timed_as_a_graph() -> None:
    clock = Clock(*[2.0] * 6)
    timer = GpuTimer(clock, least_ms=4.0, fewest=3)
    sample = timer.prepare(lambda: clock.ran.append("launch"))
    assert timer.captured
    assert (sample(), sample()) == (2.0, 2.0)
    assert clock.ran == ["launch"] + ["replay"] * 6  # captured once, however many samples


def test_a_pass_that_does_not_capture_is_timed_as_it_is_launched() -> None:
    clock = Clock(2.0, 2.0, 2.0, captures=False)
    timer = GpuTimer(clock)
    assert timer.prepare(lambda: clock.ran.append("launch"))() == 2.0
    assert not timer.captured
    assert clock.ran == ["launch"] * 4


@pytest.mark.parametrize(("ms", "repeats"), [(0.001, 15), (0.5, 8), (10.0, 3), (400.0, 1)])
def test_short_runs_are_repeated_more_often(ms: float, repeats: int) -> None:
    clock = Clock(*[ms] * 20)
    assert GpuTimer(clock, least_ms=4.0, fewest=3, most=15).time_ms(lambda: None) == ms
    assert len(clock.times) == 20 - repeats


def test_a_sample_is_a_median_that_an_outlier_does_not_move() -> None:
    assert GpuTimer(Clock(2.0, 90.0, 2.1)).time_ms(lambda: None) == 2.1


def test_a_cpu_sample_is_the_least_of_a_few_runs() -> None:
    pauses = iter([0.03, 0.005, 0.02, *[0.005] * 50])
    assert 5 <= CpuTimer(least_ms=40).time_ms(lambda: time.sleep(next(pauses))) < 15
    assert timer_for(torch.device("cpu")).first_run_counts


def test_a_long_cpu_run_is_not_repeated() -> None:
    runs: list[int] = []

    def slow() -> None:
        runs.append(1)
        time.sleep(0.02)

    CpuTimer(least_ms=1, long_ms=10).time_ms(slow)
    assert len(runs) == 1
