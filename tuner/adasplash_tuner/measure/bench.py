"""Running one pass of one backend on given inputs: how long it takes, and how far it is from the fp64 oracle."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.precision import as_in
from adasplash_core.spec import Pass
from adasplash_core.testing import oracle
from adasplash_tuner.measure.clocks import CpuTimer, Sampler, Timer, timer_for

MAX_ROWS = 64
_ORACLE_SCORES = 2**23
"""Scores that the oracle holds at once, each costing about 80 bytes."""

_PREPARED = 6
"""Configs whose samplers are kept: those of a final. A CUDA graph holds the memory of one run."""


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
        self.spec = cases[0].call.spec
        self.default = backend.default_config(self.spec, device, pass_)
        kind = _ForwardCase if pass_ == "forward" else _BackwardCase
        with as_in(self.spec):
            self.cases: list[_MeasuredCase] = [kind(backend, device, case) for case in cases]
        self.labels = tuple(case.label for case in cases)
        self._samplers: OrderedDict[KernelConfig, list[Sampler]] = OrderedDict()

    def check(self, config: KernelConfig) -> tuple[float, float]:
        """Run once on every input: the largest relative error against the oracle, and the milliseconds of all runs."""
        error, elapsed = 0.0, 0.0
        with torch.no_grad(), as_in(self.spec):
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
        """One sample in milliseconds for each input, of a config that was checked."""
        with torch.no_grad(), as_in(self.spec):
            samplers = self._samplers.get(config)
            if samplers is None:
                samplers = [self.timer.prepare(lambda case=case: case.run(config)) for case in self.cases]  # type: ignore[misc]
                self._samplers[config] = samplers
                while len(self._samplers) > _PREPARED:
                    self._samplers.popitem(last=False)
            self._samplers.move_to_end(config)
            return [sample() for sample in samplers]

    @property
    def first_run_counts(self) -> bool:
        return self.timer.first_run_counts

    @staticmethod
    def is_fatal(failure: Exception) -> bool:
        """Whether the device is lost to this process: after an illegal access every later call fails, too."""
        return isinstance(failure, torch.AcceleratorError)

    def error_bound(self) -> float:
        return self.backend.error_bound(self.spec.arithmetic)


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


__all__ = ["Bench", "Case", "CpuTimer", "Timer", "sample_rows", "timer_for"]
