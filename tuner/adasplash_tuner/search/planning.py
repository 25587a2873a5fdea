"""Which searches a request asks for, in which order, and about how long each takes.

Times are first guessed from one run of each backend's default, and then learned from the searches that have ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasplash_core import plugins
from adasplash_core.errors import ArgumentError
from adasplash_core.spec import PASSES, AttentionSpec, Pass
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.measure.compiling import compiles_ahead, processes_for
from adasplash_tuner.search.space import candidates
from adasplash_tuner.shapes.shape import Shape, describe, profile

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionBackend, KernelConfig
    from adasplash_core.device import DeviceInfo
    from adasplash_tuner.search.events import Request
    from adasplash_tuner.search.search import Outcome
    from adasplash_tuner.storage.records import BestConfig

WORKLOAD_LAYERS = {"quick": 3, "full": 8}
"""Captured layers measured for one key, spread from the first to the last: sparsity differs most along the depth."""

ENOUGH = (32, 24, 16, 12)
"""Candidates that make a search worth its start: the most of these that there is time for in all searches. If there is not even time
for the fewest in each, the last searches are left to the next run."""

_RUNS_A_CANDIDATE = {"cpu": 2.2, "gpu": 12.0}  # to check and to time one; samples on a GPU are medians of several runs
_RUNS_A_FINAL = {"cpu": 90.0, "gpu": 240.0}
_START_S = 4.0  # inputs and the oracle
_FINAL_S = 2.0
_COMPILE_S = 6.0  # one candidate, on one core
_LAUNCH_S = 0.2  # loading the compiled kernels, capturing graphs, comparing to the oracle
_LEARNED = 0.5  # weight of the newest search among those learned from


@dataclass(eq=False)
class Problem:
    """One spec, and the inputs on which it is measured; ``layers`` are numbers of the workload's layers."""

    spec: AttentionSpec
    shape: str
    inputs: str
    sparsities: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def input_count(self) -> int:
        return max(len(self.sparsities) + len(self.layers), 1)

    def work(self, pass_: Pass) -> float:
        """Relative cost of one run on every input."""
        s = self.spec
        assert s.batch is not None
        assert s.q_len is not None
        assert s.kv_len is not None
        scores = s.batch * s.heads * s.q_len * s.kv_len * (0.5 if s.causal else 1.0)
        return scores * (s.head_dim + s.head_dim_v) * (1.5 if pass_ == "backward" else 1.0) * self.input_count


@dataclass(eq=False)
class Planning:
    """One search to be made."""

    problem: Problem
    backend: AttentionBackend
    pass_: Pass
    key: TuningKey
    space: list[KernelConfig]
    left: int = 0  # candidates not measured yet
    tuned: BestConfig | None = None  # what an earlier run chose on these inputs
    run_s: float = 0.0  # about how long one run on every input takes

    @property
    def label(self) -> str:
        return f"{self.problem.shape} {self.backend.name} {self.pass_}"

    @property
    def done(self) -> bool:
        """Whether nothing is left to measure."""
        return self.tuned is not None and self.left == 0


@dataclass
class CostModel:
    """About how many seconds a search takes: what its runs take, and what is learned from searches that have ended.

    Learned separately for each backend and pass, as the time beyond the runs.
    """

    on_gpu: bool
    compiling: int  # processes that compile
    _start: dict[tuple[str, str], float] = field(default_factory=dict)
    _candidate: dict[tuple[str, str], float] = field(default_factory=dict)
    _final: dict[tuple[str, str], float] = field(default_factory=dict)

    def seconds(self, planning: Planning, most_candidates: int | None = None) -> float:
        """Of the whole search, if it measures everything that is left, or at most so many candidates."""
        if planning.done:
            return 0.0
        name = _name(planning)
        candidates = planning.left if most_candidates is None else min(planning.left, most_candidates)
        a_candidate = self._candidate.get(name, self._first_guess_s(planning)) + self._runs_s(_RUNS_A_CANDIDATE, planning)
        final = self._final.get(name, _FINAL_S if self.on_gpu else 0.0) + self._runs_s(_RUNS_A_FINAL, planning)
        return self._start.get(name, _START_S) + candidates * a_candidate + final

    def share(self, ahead: Sequence[Planning], left_s: float) -> float:
        """How many of the seconds that are left the first of the searches ahead may take.

        In proportion to what each needs; but enough to be worth its start, even if nothing remains for the last ones. A search of which
        nothing is known but a guess gets little more than its turn.
        """
        wanted = [self.seconds(p) for p in ahead]
        fair = left_s * wanted[0] / sum(wanted) if sum(wanted) else left_s
        affordable = (most for most in ENOUGH if sum(self.seconds(p, most) for p in ahead) <= left_s)
        enough = self.seconds(ahead[0], next(affordable, ENOUGH[-1]))
        if _name(ahead[0]) not in self._candidate:
            enough = min(enough, 1.25 * left_s / max(sum(w > 0 for w in wanted), 1))
        return min(left_s, max(fair, enough))

    def least_seconds(self, planning: Planning) -> float:
        """With less time than this a search is better left to the next run; 0 while nothing like it was made."""
        name = _name(planning)
        return self._start[name] + 0.5 * self._final.get(name, 0.0) if name in self._start else 0.0

    def learn(self, planning: Planning, outcome: Outcome) -> None:
        if outcome.verdict == "kept":
            return
        name, costs = _name(planning), outcome.costs
        _blend(self._start, name, costs.start_s)
        _blend(self._final, name, max(costs.final_s - self._runs_s(_RUNS_A_FINAL, planning), 0.0))
        if costs.candidate_s:
            _blend(self._candidate, name, max(costs.candidate_s - self._runs_s(_RUNS_A_CANDIDATE, planning), 0.0))

    def _runs_s(self, runs: Mapping[str, float], planning: Planning) -> float:
        return runs["gpu" if self.on_gpu else "cpu"] * planning.run_s

    def _first_guess_s(self, planning: Planning) -> float:
        """Of a candidate, beyond its runs."""
        if not self.on_gpu:
            return 0.0
        return _LAUNCH_S + _COMPILE_S / (self.compiling if compiles_ahead(planning.backend) else 1)


def _name(planning: Planning) -> tuple[str, str]:
    return planning.backend.name, planning.pass_


def _blend(learned: dict[tuple[str, str], float], name: tuple[str, str], value: float) -> None:
    learned[name] = value if name not in learned else (1 - _LEARNED) * learned[name] + _LEARNED * value


def cost_model(request: Request, device: DeviceInfo) -> CostModel:
    return CostModel(device.type != "cpu", processes_for(request.width))


def problems_of(request: Request, device: DeviceInfo) -> list[Problem]:
    """What the request names, or the profile's shapes."""
    from adasplash_core.precision import knows_tf32

    effort = profile(device.type, request.profile)
    needs_grad = "backward" in request.passes
    shapes = request.shapes
    if not shapes and request.workload is None:
        shapes = tuple(map(Shape.parse, effort.shapes))
    if any(s.tf32 for s in shapes) and not knows_tf32(device.type):
        raise ArgumentError("TF32 is of NVIDIA's GPUs.", seen=f"tf32 in a shape to tune for {device.name}", hint="write fp32")
    warm = "" if request.cold_l2 or device.type == "cpu" else ", warm L2"
    label = f"random, {'+'.join(effort.sparsities)}{warm}"
    problems = [Problem(s.spec(device.type, needs_grad), str(s), label, sparsities=effort.sparsities) for s in shapes]
    if request.workload is not None:
        problems += _workload_problems(request, device, needs_grad, warm)
    return problems


def _workload_problems(request: Request, device: DeviceInfo, needs_grad: bool, warm: str) -> list[Problem]:
    """Layers of one bucket are one problem: a config is good over the depth of the model."""
    from adasplash_core.call import make_call
    from adasplash_core.workload import Workload

    assert request.workload is not None
    workload = Workload.load(request.workload)
    groups: dict[tuple[object, ...], list[tuple[int, AttentionSpec]]] = {}
    for layer in workload:
        spec = make_call(
            **layer.to(device.type if device.type == "cpu" else request.device).kwargs(), needs_grad=needs_grad
        ).spec
        groups.setdefault((spec.without_lengths(), spec.batch, spec.q_len, spec.kv_len), []).append((layer.index, spec))
    digest = file_digest(workload.path)
    problems = []
    for group in groups.values():
        layers = tuple(index for index, _ in _spread(group, WORKLOAD_LAYERS[request.profile]))
        spec = group[0][1]
        inputs = f"{workload.path.name} ({digest}), layers {','.join(map(str, layers))}{warm}"
        problems.append(Problem(spec, describe(spec), inputs[:500], layers=layers))
    return problems


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` items from the first to the last, evenly."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def share_of(problems: Sequence[Problem], part: tuple[int, int]) -> list[Problem]:
    """One device's share of the problems. Identical devices get about as much work each: the most work goes first, to the idlest."""
    number, count = part
    work = [0.0] * count
    mine = []
    for problem in sorted(problems, key=lambda p: -p.work("forward")):
        idlest = work.index(min(work))
        work[idlest] += problem.work("forward")
        if idlest == number:
            mine.append(problem)
    return mine


def plan(request: Request, device: DeviceInfo, problems: Sequence[Problem]) -> tuple[list[Planning], tuple[str, ...]]:
    """The searches, and the problems that nobody can do. Of several problems of one key the first is kept.

    Cheap ones come first: what they leave of their time goes to the long ones, and no long one can starve them. The passes of one
    problem follow each other, because they share their inputs.
    """
    plannings: dict[TuningKey, Planning] = {}
    passed_over = []
    for problem in problems:
        capable, reasons = _capable(request, problem.spec, device)
        if not capable:
            passed_over.append(f"{problem.shape}: {reasons}")
        for backend in capable:
            for pass_ in request.passes:
                key = tuning_key(backend, problem.spec, device, pass_)
                if key not in plannings:
                    plannings[key] = Planning(problem, backend, pass_, key, candidates(backend, problem.spec, device, pass_))
    if not plannings and request.part[1] == 1:  # of several devices one may have nothing to do
        raise ArgumentError(
            "Something must be left to tune.",
            seen="; ".join(passed_over) or "no shapes",
            hint="`adasplash backends` says what each backend can do",
        )
    order = {id(problem): number for number, problem in enumerate(sorted(problems, key=lambda p: p.work("forward")))}
    chosen = sorted(plannings.values(), key=lambda p: (order[id(p.problem)], PASSES.index(p.pass_)))
    return chosen, tuple(passed_over)


def _capable(request: Request, spec: AttentionSpec, device: DeviceInfo) -> tuple[list[AttentionBackend], str]:
    """Backends to tune for a spec. On a GPU the reference is left out if another can do it, unless it is asked for by name."""
    registry = plugins.registry()
    named = [registry.backend(name) for name in request.backends] or list(registry.backends.values())
    reasons = {b.name: b.not_supported_reasons(spec, device) for b in named}
    capable = [b for b in named if not reasons[b.name]]
    if not request.backends and device.type != "cpu" and any(b.priority > 0 for b in capable):
        capable = [b for b in capable if b.priority > 0]
    return capable, _sentence(reasons) or "no backend is registered"


def _sentence(reasons: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())


def set_run_times(plannings: Sequence[Planning], probe: Any) -> None:
    """Set about how long each search's runs take, in proportion to the work of the smallest problem that each backend has left.

    ``probe(planning)`` gives the seconds of one forward of the default on every input; it is asked once a backend.
    """
    seconds_a_work: dict[str, float] = {}
    for planning in sorted(plannings, key=lambda p: p.problem.work("forward")):
        name = planning.backend.name
        if name not in seconds_a_work:
            if planning.done:
                continue
            seconds_a_work[name] = probe(planning) / planning.problem.work("forward")
        planning.run_s = seconds_a_work[name] * planning.problem.work(planning.pass_)
