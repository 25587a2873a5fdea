"""The profiles on a simulated H100, whose clock is what compiling and running take: whether budgets are kept, and spent well."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from adasplash_core import plugins
from adasplash_core.backend import KernelConfig
from adasplash_core.plugins import Registry
from adasplash_tuner.key import TuningKey
from adasplash_tuner.search import planning, session
from adasplash_tuner.search.events import Report, Request
from adasplash_tuner.search.planning import Planning
from adasplash_tuner.storage.records import BestConfig, Measurement
from tests.tuner.fakes import H100, BlockConfig, FakeBackend

START_S = 14.0  # two processes that import torch
PREPARE_S = 3.5
FIRST_RUN_S = 8.0  # the default's kernels are compiled
CHECK_S = 0.45  # a candidate's share of compiling, loading and the oracle
SAMPLE_S = 0.08


class Simulated(FakeBackend):
    """A space of 120 configs, of which a middle one is 1.5 times as fast as the default."""

    dtypes = frozenset({"bfloat16", "float16", "float32"})
    features = frozenset({"backward", "causal", "gqa", "alpha_other", "alpha_tensor"})
    priority = 50

    def not_supported_reasons(self, spec: Any, device: Any = None) -> list[str]:
        return []

    def tuning_space(self, spec: Any, device: Any, pass_: Any) -> Iterator[KernelConfig]:
        return (BlockConfig(16 * n, iterations) for n in range(1, 21) for iterations in range(3, 9))


@dataclass
class Machine:
    """The clock, and a store in memory."""

    now: float = 0.0
    measured: dict[TuningKey, list[Measurement]] = field(default_factory=dict)
    best: dict[TuningKey, BestConfig] = field(default_factory=dict)
    problem: str = ""

    def monotonic(self) -> float:
        return self.now

    # what a session asks of its store

    def measurements(self, key: TuningKey, *, shape: str | None = None, inputs: str | None = None) -> list[Measurement]:
        return [m for m in self.measured.get(key, []) if (m.shape, m.inputs) == (shape, inputs)]

    def add_measurement(self, key: TuningKey, measured: Measurement) -> None:
        self.measured.setdefault(key, []).append(measured)

    def publish(self, best: BestConfig, *, contested: Any = None) -> bool:
        self.best[best.key] = best
        return True

    def incumbent(self, key: TuningKey) -> BestConfig | None:
        return self.best.get(key)

    def known(self, key: TuningKey) -> list[BestConfig]:
        return [self.best[key]] if key in self.best else []


class Bench:
    labels = ("dense", "moderate", "sparse")
    first_run_counts = False
    default = BlockConfig()

    def __init__(self, machine: Machine, run_s: float) -> None:
        self.machine, self.run_s = machine, run_s
        self.fresh = True
        machine.now += PREPARE_S

    def seconds(self, config: BlockConfig) -> float:
        return self.run_s * (1 + abs(config.block_n - 160) / 192 + abs(config.iterations - 5) / 10)

    def check(self, config: BlockConfig) -> tuple[float, float]:
        self.machine.now += FIRST_RUN_S if self.fresh else CHECK_S + self.seconds(config)
        self.fresh = False
        return 1e-4, 1e3 * self.seconds(config)

    def time(self, config: BlockConfig) -> list[float]:
        self.machine.now += SAMPLE_S + 8 * self.seconds(config)
        return [1e3 * self.seconds(config)] * 3

    def is_fatal(self, _failure: Exception) -> bool:
        return False


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    registry = Registry()
    registry.backends["fake"] = Simulated()
    monkeypatch.setattr(plugins, "registry", lambda: registry)
    monkeypatch.setattr(session, "time", types.SimpleNamespace(monotonic=machine.monotonic))
    monkeypatch.setattr(session, "device_info", lambda _name: H100)

    def run_s(planning: Planning) -> float:
        return planning.problem.work(planning.pass_) / 1.4e14  # 8 ms for three classes of 32 x 8192 x 128

    monkeypatch.setattr(session._Inputs, "bench", lambda _self, planning: Bench(machine, run_s(planning)))
    monkeypatch.setattr(session._Inputs, "probe_s", lambda _self, planning: run_s(planning))
    return machine


def run(machine: Machine, profile: str, budget_s: float | None = None) -> Report:
    """One call of the command: its processes start, then it tunes."""
    started = machine.now
    machine.now += START_S
    request = Request(device="cuda:0", profile=profile, budget_s=budget_s, started=started)
    costs = planning.cost_model(request, H100)
    one = session._Run.__new__(session._Run)
    one.request, one.device, one.store, one.costs = request, H100, machine, costs  # type: ignore[assignment]
    one.observe, one.inputs = (lambda _event: None), session._Inputs(request, H100)
    one.report = Report(H100, "memory")
    one.all(started)
    one.report.seconds = machine.now - started
    return one.report


def gains(report: Report) -> list[float]:
    return [f.outcome.best.gain for f in report.finished if f.outcome is not None]


def test_quick_ends_within_five_minutes_with_every_search_made(machine: Machine) -> None:
    report = run(machine, "quick")
    assert report.seconds < 270
    assert [f.postponed for f in report.finished] == [False] * 8
    assert min(gains(report)) > 1.35  # of 1.8 that the whole space holds


def test_full_ends_within_sixteen_minutes(machine: Machine) -> None:
    report = run(machine, "full")
    assert report.seconds < 16 * 60
    assert len(report.finished) == 28
    assert report.postponed == []
    assert min(gains(report)) > 1.3


def test_full_in_two_calls_of_eight_minutes_goes_on_where_it_stopped(machine: Machine) -> None:
    first = run(machine, "full", budget_s=480.0)
    assert first.seconds < 500
    assert 0 < len(first.postponed) < 14  # each that was made had time for enough candidates
    assert min(gains(first)) > 1.35
    measured = sum(map(len, machine.measured.values()))
    second = run(machine, "full", budget_s=480.0)
    assert second.seconds < 500
    assert second.postponed == []
    assert sum(map(len, machine.measured.values())) > 1.5 * measured
    assert min(gains(second)) > 1.35
    screened = [
        (key, m.config["block_n"], m.config["iterations"])
        for key, found in machine.measured.items()
        for m in found
        if m.stage == "screening"
    ]
    repeated = len(screened) - len(set(screened))
    assert repeated <= 28  # the default alone is screened again


def test_a_budget_that_is_far_too_short_makes_the_cheap_searches_and_leaves_the_rest(machine: Machine) -> None:
    report = run(machine, "full", budget_s=75.0)
    assert report.seconds < 95
    made = [f for f in report.finished if f.outcome is not None]
    assert 2 <= len(made) < 28
    assert len(made) + len(report.postponed) == 28
    assert report.ok
