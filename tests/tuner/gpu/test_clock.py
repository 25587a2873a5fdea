"""The device's clock: events, graphs, a cold cache, and passes that cannot be captured."""

from __future__ import annotations

import statistics

import torch

from adasplash_tuner.measure.clocks import CudaClock, GpuTimer, timer_for

DEVICE = torch.device("cuda:0")


def matrices(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.float16) for _ in range(2))
    return a, b


def test_a_graph_gives_the_kernels_time_and_not_the_launches() -> None:
    """Forty tiny kernels: launched one by one the host sets the time, in a graph the device does."""
    x = torch.zeros(1024, device=DEVICE)

    def run() -> None:
        for _ in range(40):
            x.add_(1.0)

    run()
    clock = CudaClock(DEVICE)
    replay = clock.capture(run)
    assert replay is not None
    before = float(x[0])
    graph = statistics.median(clock.measure_ms(replay, 9))
    assert float(x[0]) == before + 9 * 40  # replays compute
    launched = statistics.median(CudaClock(DEVICE, cold_l2=False).measure_ms(run, 9))
    assert graph < launched


def test_twice_the_work_takes_about_twice_the_time() -> None:
    timer = timer_for(DEVICE)
    a, b = matrices(4096)

    def once() -> torch.Tensor:
        return a @ b

    def twice() -> torch.Tensor:
        return a @ b @ b

    once(), twice()
    one, two = timer.prepare(once), timer.prepare(twice)
    ratios = [two() / one() for _ in range(5)]
    assert 1.7 < statistics.median(ratios) < 2.4


def test_a_cold_cache_is_slower_for_what_fits_into_it() -> None:
    x = torch.ones(4 * 2**20, device=DEVICE)  # 16 MiB
    cold, warm = (GpuTimer(CudaClock(DEVICE, cold_l2=cold)).prepare(x.sum) for cold in (True, False))
    assert statistics.median(cold() for _ in range(5)) > statistics.median(warm() for _ in range(5))


def test_a_pass_that_waits_for_the_device_is_timed_as_it_is_launched_and_the_device_is_well_afterwards() -> None:
    x = torch.ones(1024, device=DEVICE)

    def waits() -> float:
        return float(x.sum().item())

    clock = CudaClock(DEVICE)
    assert clock.capture(waits) is None
    timer = GpuTimer(clock)
    assert timer.prepare(waits)() > 0
    assert timer.captured is False
    assert clock.capture(x.sum) is not None
    assert waits() == 1024
    torch.cuda.empty_cache()
