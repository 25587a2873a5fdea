"""How long one run takes: wall clock on a CPU; on a GPU, CUDA events around replays of a graph with a cold L2 cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Run = Callable[[], Any]
Sampler = Callable[[], float]
"""Milliseconds of one run, nothing else on the device."""


class Timer(Protocol):
    first_run_counts: bool
    """Whether a first run takes about as long as later ones; False where it compiles."""

    def prepare(self, run: Run) -> Sampler:
        """Whatever makes later samples of ``run``, which has run before, precise."""
        ...

    def time_ms(self, run: Run) -> float:
        """One sample."""
        ...


class CpuTimer:
    """Wall clock: the least of a few runs, as other processes can only add to a run's time.

    Runs are repeated for ``least_ms``, and at least twice unless one takes longer than ``long_ms``.
    """

    first_run_counts = True

    def __init__(self, least_ms: float = 20.0, long_ms: float = 500.0, most_runs: int = 50) -> None:
        self.least_ms, self.long_ms, self.most_runs = least_ms, long_ms, most_runs

    def prepare(self, run: Run) -> Sampler:
        return lambda: self.time_ms(run)

    def time_ms(self, run: Run) -> float:
        best, total, runs = math.inf, 0.0, 0
        while total < self.least_ms or (runs < 2 and total < self.long_ms):
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e3
            best, total, runs = min(best, elapsed), total + elapsed, runs + 1
            if runs == self.most_runs:
                break
        return best


class GpuClock(Protocol):
    """All that is asked of the device itself."""

    def capture(self, run: Run) -> Run | None:
        """A replay of ``run`` as one CUDA graph; None if it cannot be captured."""
        ...

    def measure_ms(self, run: Run, repeats: int) -> list[float]:
        """Milliseconds on the device of each of ``repeats`` runs, caches as the clock prepares them."""
        ...


class GpuTimer:
    """Median of some runs by the device's own clock.

    A pass that can be captured is timed as a graph: launches that take longer than their kernels would hide what configs change.
    As many runs make a sample as fit in ``least_ms``, from ``fewest`` to ``most``; one that takes longer than ``long_ms`` is enough.
    """

    first_run_counts = False

    def __init__(self, clock: GpuClock, least_ms: float = 4.0, fewest: int = 3, most: int = 15, long_ms: float = 100.0) -> None:
        self.clock, self.least_ms, self.long_ms = clock, least_ms, long_ms
        self.fewest, self.most = fewest, most
        self.captured: bool | None = None
        """Whether the last prepared run was captured."""

    def prepare(self, run: Run) -> Sampler:
        replay = self.clock.capture(run)
        self.captured = replay is not None
        chosen = run if replay is None else replay
        return lambda: self.time_ms(chosen)

    def time_ms(self, run: Run) -> float:
        (first,) = self.clock.measure_ms(run, 1)
        if first > self.long_ms:
            return first
        repeats = min(self.most, max(self.fewest, math.ceil(self.least_ms / max(first, 1e-3)))) - 1
        return statistics.median([first, *self.clock.measure_ms(run, repeats)])


class CudaClock:
    """CUDA events around each run, after the L2 cache was overwritten, so that no run profits from what the one before left there."""

    def __init__(self, device: torch.device, cold_l2: bool = True) -> None:
        self.device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
        self._flush = torch.empty(max(l2_bytes * 2, 2**27), dtype=torch.int8, device=device) if cold_l2 else None

    def capture(self, run: Run) -> Run | None:
        # Not torch.cuda.graph: it empties the allocator's cache at each capture, which costs more than the measurement.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                run()  # what is set up on a first run of a stream is no part of the graph
                stream.synchronize()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
                graph.replay()
                stream.synchronize()
        except torch.OutOfMemoryError:  # a graph keeps memory of its own
            del graph
            torch.cuda.empty_cache()
            return None
        except RuntimeError as error:
            if "captur" not in str(error).lower():  # not "operation not permitted when stream is capturing" and the like
                raise
            torch.cuda.synchronize(self.device)
            return None
        return graph.replay

    def measure_ms(self, run: Run, repeats: int) -> list[float]:
        with torch.cuda.device(self.device):
            pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
            for start, end in pairs:
                if self._flush is not None:
                    self._flush.zero_()
                start.record()
                run()
                end.record()
            torch.cuda.synchronize(self.device)
            return [float(start.elapsed_time(end)) for start, end in pairs]


def timer_for(device: torch.device, cold_l2: bool = True) -> Timer:
    return GpuTimer(CudaClock(device, cold_l2)) if device.type == "cuda" else CpuTimer()
