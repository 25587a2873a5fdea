"""Running one pass of one backend on given inputs: how long it takes, and how far it is from the fp64 oracle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import Pass
from adasplash_core.testing import oracle

MAX_ROWS = 64
_ORACLE_SCORES = 2**23
"""Scores that the oracle holds at once, each costing about 80 bytes."""


class Timer(Protocol):
    first_run_counts: bool
    """Whether a first run takes about as long as later ones; False where it compiles."""

    def time_ms(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one run, nothing else on the device."""
        ...


class CpuTimer:
    """Wall clock: the least of a few runs, as other processes can only add to a run's time.

    Runs are repeated for ``least_ms``, and at least twice unless one takes longer than ``long_ms``.
    """

    first_run_counts = True

    def __init__(self, least_ms: float = 20.0, long_ms: float = 500.0, most_runs: int = 50) -> None:
        self.least_ms, self.long_ms, self.most_runs = least_ms, long_ms, most_runs

    def time_ms(self, run: Callable[[], Any]) -> float:
        best, total, runs = math.inf, 0.0, 0
        while total < self.least_ms or (runs < 2 and total < self.long_ms):
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e3
            best, total, runs = min(best, elapsed), total + elapsed, runs + 1
            if runs == self.most_runs:
                break
        return best


class CudaTimer:
    """CUDA events around one run, after the L2 cache was overwritten.

    Overwriting it takes longer than launching the run does, so launches are hidden and the events see the device only.
    """

    first_run_counts = False

    def __init__(self, device: torch.device, cold_l2: bool = True) -> None:
        self.device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
        self._flush = torch.empty(max(l2_bytes * 2, 2**27), dtype=torch.int8, device=device) if cold_l2 else None

    def time_ms(self, run: Callable[[], Any]) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self._flush is not None:
                self._flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


@dataclass(eq=False)
class Case:
    """One input. ``call`` has no config yet; ``grad_out`` (B, H, Lq, Ev) is drawn where the backward is measured."""

    label: str
    call: AttentionCall

    def grad_out(self) -> torch.Tensor:
        call = self.call
        shape = (*call.query.shape[:3], call.value.shape[3])
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return drawn.to(call.query.device, call.query.dtype)


def sample_rows(call: AttentionCall) -> torch.Tensor:
    """Query rows on which errors are measured: evenly spread, first and last included, as many as the oracle can hold."""
    q_len = call.query.shape[2]
    scores_a_row = call.query.shape[0] * call.query.shape[1] * call.key.shape[2]
    count = min(q_len, MAX_ROWS, max(4, _ORACLE_SCORES // max(scores_a_row, 1)))
    rows = torch.linspace(0, q_len - 1, count, device=call.query.device).round().to(torch.int64)
    distinct: torch.Tensor = rows.unique()
    return distinct


class _MeasuredCase(Protocol):
    call: AttentionCall

    def __init__(self, backend: AttentionBackend, device: DeviceInfo, case: Case) -> None: ...
    def run(self, config: KernelConfig) -> Any: ...
    def error(self, result: Any) -> float: ...


class Bench:
    """One pass of one backend on some inputs.

    The backward starts from what the default forward config saved. Raises what the backend raises.
    """

    def __init__(self, backend: AttentionBackend, device: DeviceInfo, pass_: Pass, cases: Sequence[Case], timer: Timer) -> None:
        self.backend, self.device, self.pass_, self.timer = backend, device, pass_, timer
        spec = cases[0].call.spec
        self.default = backend.default_config(spec, device, pass_)
        kind = _ForwardCase if pass_ == "forward" else _BackwardCase
        self.cases: list[_MeasuredCase] = [kind(backend, device, case) for case in cases]

    def check(self, config: KernelConfig) -> tuple[float, float]:
        """Run once on every input: the largest relative error against the oracle, and the milliseconds of all runs."""
        error, elapsed = 0.0, 0.0
        with torch.no_grad():
            for case in self.cases:
                start = time.perf_counter()
                result = case.run(config)
                if case.call.query.is_cuda:
                    torch.cuda.synchronize(case.call.query.device)
                elapsed += (time.perf_counter() - start) * 1e3
                found = case.error(result)
                error = found if math.isnan(found) else max(error, found)
        return error, elapsed

    def time(self, config: KernelConfig) -> list[float]:
        """One sample in milliseconds for each input."""
        with torch.no_grad():
            return [self.timer.time_ms(lambda case=case: case.run(config)) for case in self.cases]  # type: ignore[misc]

    @property
    def first_run_counts(self) -> bool:
        return self.timer.first_run_counts

    @staticmethod
    def is_fatal(failure: Exception) -> bool:
        """Whether the device is lost to this process: after an illegal access every later call fails, too."""
        return isinstance(failure, torch.AcceleratorError)

    def error_bound(self) -> float:
        return self.backend.error_bound(self.cases[0].call.spec.dtype)


class _ForwardCase:
    def __init__(self, backend: AttentionBackend, _device: DeviceInfo, case: Case) -> None:
        self.backend, self.call = backend, case.call
        self.rows = sample_rows(case.call)
        self.exact = oracle.attention(case.call, self.rows).out

    def run(self, config: KernelConfig) -> ForwardResult:
        return self.backend.forward(replace(self.call, config=config))

    def error(self, result: ForwardResult) -> float:
        return oracle.relative_error(result.out[:, :, self.rows], self.exact)


class _BackwardCase:
    """dQ of the sampled rows is compared to the oracle. dK and dV, sums over all rows, are compared to the default config's."""

    def __init__(self, backend: AttentionBackend, device: DeviceInfo, case: Case) -> None:
        self.backend, self.call = backend, case.call
        self.rows = sample_rows(case.call)
        self.grad_out = case.grad_out()
        default_forward = backend.default_config(case.call.spec, device, "forward")
        with torch.no_grad():
            result = backend.forward(replace(case.call, config=default_forward))
        self.saved = result.saved
        self.out = result.out if backend.backward_needs_out else None
        self.exact = oracle.gradients(case.call, self.grad_out[:, :, self.rows], self.rows).query[:, :, self.rows]
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, config: KernelConfig) -> Gradients:
        return self.backend.backward(replace(self.call, config=config), self.grad_out, self.saved, self.out)

    def error(self, result: Gradients) -> float:
        error = oracle.relative_error(result.query[:, :, self.rows], self.exact)
        if self.reference is None:  # the default is checked first
            self.reference = (result.key, result.value)
            return error
        return max([error, *map(oracle.relative_error, (result.key, result.value), self.reference)])
