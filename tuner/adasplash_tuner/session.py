"""A tuning run on one device: which searches to make, in which order, for how long, and what becomes of them.

Requests, events and outcomes are plain values that cross processes, so that several devices can be tuned side by side.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adasplash_core import plugins
from adasplash_core.configs import ladder
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import ArgumentError, ConfigError, StoreError
from adasplash_core.spec import PASSES, AttentionSpec, Pass
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.location import Location, locate
from adasplash_tuner.records import BestConfig, Measurement
from adasplash_tuner.search import Outcome, Progress, Search
from adasplash_tuner.shapes import Shape, describe, profile
from adasplash_tuner.store import Row, TuningStore, package_version

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionBackend, KernelConfig
    from adasplash_tuner.measure import Bench, Case

MAX_SEEDS = 3
"""Earlier winners that compete beside the backend's candidates."""

WORKLOAD_LAYERS = {"quick": 3, "full": 8}
"""Captured layers measured for one key, spread from the first to the last: sparsity differs most along the depth."""

T = TypeVar("T")

_RUNS_A_CANDIDATE = 2.2  # one to check, one to time, and some that are looked at again
_FINAL_RUNS = 40
_PREPARE_S = 3.0  # inputs and the oracle
_COMPILE_S = 1.0


@dataclass(frozen=True)
class Request:
    """What to tune on one device. Empty ``shapes`` and no ``workload`` mean the profile's shapes."""

    device: str = "cpu"
    backends: tuple[str, ...] = ()  # empty: every capable one
    shapes: tuple[Shape, ...] = ()
    workload: str | None = None
    passes: tuple[Pass, ...] = PASSES
    profile: str = "quick"
    budget_s: float | None = None  # None: the profile's
    fresh: bool = False
    database: str | None = None  # None: ADASPLASH_DB, or the default place
    part: tuple[int, int] = (0, 1)  # this device's share: problem i if i % part[1] == part[0]


@dataclass(frozen=True)
class Planned:
    """The first event: how many searches there will be, and about how long they take."""

    device: DeviceInfo
    searches: tuple[str, ...]
    estimate_s: float
    budget_s: float
    passed_over: tuple[str, ...] = ()  # problems that no backend can do, with the reasons


@dataclass(frozen=True)
class Step:
    """One search began, or went on."""

    index: int
    label: str
    progress: Progress


@dataclass(frozen=True)
class Finished:
    """One search ended, or could not be made (``outcome`` None, with the reason)."""

    index: int
    label: str
    outcome: Outcome | None
    problem: str = ""


Event = Planned | Step | Finished
Observer = Callable[[Event], None]


@dataclass
class Report:
    """What a run leaves."""

    device: DeviceInfo
    database: str
    finished: list[Finished] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()
    store_problem: str = ""  # why results could not be kept
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.store_problem and all(f.outcome is not None for f in self.finished)


@dataclass(eq=False)
class Problem:
    """One spec, and the inputs on which it is measured; ``layers`` are numbers of the workload's layers."""

    spec: AttentionSpec
    shape: str
    inputs: str
    sparsities: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def work(self, pass_: Pass) -> float:
        """Relative cost of one run."""
        s = self.spec
        assert s.batch is not None
        assert s.q_len is not None
        assert s.kv_len is not None
        scores = s.batch * s.heads * s.q_len * s.kv_len * (0.5 if s.causal else 1.0)
        return (
            scores
            * (s.head_dim + s.head_dim_v)
            * (1.5 if pass_ == "backward" else 1.0)
            * max(len(self.sparsities) + len(self.layers), 1)
        )


@dataclass(eq=False)
class Planning:
    """One search to be made."""

    problem: Problem
    backend: AttentionBackend
    pass_: Pass
    key: TuningKey
    candidates: int
    seconds: float = 0.0  # about how long it takes

    @property
    def label(self) -> str:
        return f"{self.problem.shape} {self.backend.name} {self.pass_}"


class GuardedStore:
    """The store as a search sees it: a fault ends the keeping, not the tuning, and is reported at the end."""

    def __init__(self, location: Location) -> None:
        self.store = TuningStore(location)
        self.problem = ""

    def measurements(self, key: TuningKey, *, shape: str | None = None, inputs: str | None = None) -> list[Measurement]:
        return self._guarded(lambda: self.store.measurements(key, shape=shape, inputs=inputs), [])

    def add_measurement(self, key: TuningKey, measured: Measurement) -> None:
        self._guarded(lambda: self.store.add_measurement(key, measured), None)

    def publish(self, best: BestConfig, *, contested: dict[str, Any] | None = None) -> bool:
        return self._guarded(lambda: self.store.publish(best, contested=contested), False)

    def incumbent(self, key: TuningKey) -> BestConfig | None:
        return next((r for r in self.known(key) if r.key == key), None)

    def known(self, key: TuningKey) -> list[BestConfig]:
        """Winners of this problem, of this and other machines and versions, the newest first."""
        nothing: list[Row] = []
        rows = self._guarded(lambda: self.store.rows_for_problem(key), nothing)
        found = [row.usable for row in rows if row.usable is not None]
        return sorted(found, key=lambda r: -r.measured_at)

    def _guarded(self, ask: Callable[[], T], otherwise: T) -> T:
        if self.problem:
            return otherwise
        try:
            return ask()
        except StoreError as error:
            self.problem = str(error)
            return otherwise


def tune(request: Request, observe: Observer = lambda _event: None) -> Report:
    """Tune one device. Results are in the database as they come; KeyboardInterrupt loses only what was being measured.

    Raises
    ------
    ArgumentError, UnknownBackendError: for a request that cannot be met.
    StoreError: if the database cannot be used at all; nothing was measured then.
    """
    begun = time.monotonic()
    device = device_info(request.device)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device.index)
    guarded = GuardedStore(locate(request.database))
    guarded.store.engines.check_writable()
    problems = [p for i, p in enumerate(_problems(request, device)) if i % request.part[1] == request.part[0]]
    plannings, passed_over = _plan(request, device, problems)
    budget = request.budget_s if request.budget_s is not None else profile(device.type, request.profile).budget_s
    deadline = begun + budget
    report = Report(device, str(guarded.store.location), passed_over=passed_over)
    _estimate(request, device, plannings)
    estimate = min(budget, sum(p.seconds for p in plannings))
    observe(Planned(device, tuple(p.label for p in plannings), estimate, budget, passed_over))
    for index, planning in enumerate(plannings):
        share = planning.seconds / sum(p.seconds for p in plannings[index:])
        left = max(deadline - time.monotonic(), 0.0)
        try:
            outcome = _search(
                request, device, guarded, planning, time.monotonic() + left * share, _stepper(observe, index, planning.label)
            )
            finished = Finished(index, planning.label, outcome)
        except (ArgumentError, StoreError):
            raise
        except Exception as failure:  # a backend whose default fails on this problem must not end the others' tuning
            finished = Finished(index, planning.label, None, f"{type(failure).__name__}: {failure}")
            if _is_fatal(failure):
                report.finished.append(finished)
                observe(finished)
                break
        report.finished.append(finished)
        observe(finished)
    report.store_problem = guarded.problem
    report.seconds = time.monotonic() - begun
    _forget_answers()
    return report


def _stepper(observe: Observer, index: int, label: str) -> Callable[[Progress], None]:
    return lambda progress: observe(Step(index, label, progress))


def _search(
    request: Request,
    device: DeviceInfo,
    guarded: GuardedStore,
    planning: Planning,
    deadline: float,
    observe: Callable[[Progress], None],
) -> Outcome:
    problem, backend, pass_ = planning.problem, planning.backend, planning.pass_
    observe(Progress("preparing", 0, planning.candidates))
    search = Search(
        key=planning.key,
        bench=_LazyBench(
            lambda: _bench(request, device, problem, backend, pass_), backend.default_config(problem.spec, device, pass_)
        ),
        candidates=[*_winners_elsewhere(guarded, planning), *backend.tuning_space(problem.spec, device, pass_)],
        shape=problem.shape,
        inputs=problem.inputs,
        memory=guarded,
        version=package_version(),
        deadline=deadline,
        incumbent=guarded.incumbent(planning.key),
        fresh=request.fresh,
        observe=observe,
    )
    return search.run()


def _winners_elsewhere(guarded: GuardedStore, planning: Planning) -> Iterator[KernelConfig]:
    """Configs that won with older code, another driver or on another machine, if they still parse: they compete first."""
    config_class = planning.backend.config_class(planning.pass_)
    for record in guarded.known(planning.key)[:MAX_SEEDS]:
        try:
            yield config_class.from_mapping(record.config)
        except ConfigError:  # its fields were others
            continue


class _LazyBench:
    """Makes inputs and oracle when the first config runs: a search that finds everything measured needs neither."""

    def __init__(self, make: Callable[[], Bench], default: Any) -> None:
        self._make, self.default = make, default
        self._bench: Bench | None = None

    def __getattr__(self, name: str) -> Any:
        if self._bench is None:
            self._bench = self._make()
        return getattr(self._bench, name)


def _bench(request: Request, device: DeviceInfo, problem: Problem, backend: AttentionBackend, pass_: Pass) -> Bench:
    import torch

    from adasplash_tuner.measure import Bench, timer_for

    target = torch.device(request.device)
    return Bench(backend, device, pass_, list(_cases(request, problem, target)), timer_for(target))


def _cases(request: Request, problem: Problem, target: Any) -> Iterator[Case]:
    from adasplash_core.call import make_call
    from adasplash_core.testing import inputs
    from adasplash_core.workload import Workload
    from adasplash_tuner.measure import Case

    for sparsity in problem.sparsities:
        yield Case(sparsity, inputs.make_call(problem.spec, sparsity, target))  # type: ignore[arg-type]
    for index in problem.layers:
        assert request.workload is not None
        layer = Workload.load(request.workload).layer(index).to(target)
        yield Case(f"layer {index}", make_call(**layer.kwargs(), needs_grad=problem.spec.needs_grad))


# -- planning -------------------------------------------------------------------------------------------------------------------


def _problems(request: Request, device: DeviceInfo) -> list[Problem]:
    effort = profile(device.type, request.profile)
    needs_grad = "backward" in request.passes
    problems: list[Problem] = []
    shapes = request.shapes
    if not shapes and request.workload is None:
        shapes = tuple(map(Shape.parse, effort.shapes))
    for shape in shapes:
        label = f"random, {'+'.join(effort.sparsities)}"
        problems.append(Problem(shape.spec(device.type, needs_grad), str(shape), label, sparsities=effort.sparsities))
    if request.workload is not None:
        problems += _workload_problems(request, device, needs_grad)
    return problems


def _workload_problems(request: Request, device: DeviceInfo, needs_grad: bool) -> list[Problem]:
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
    digest = _file_digest(workload.path)
    problems = []
    for group in groups.values():
        layers = tuple(index for index, _ in _spread(group, WORKLOAD_LAYERS[request.profile]))
        spec = group[0][1]
        inputs = f"{workload.path.name} ({digest}), layers {','.join(map(str, layers))}"
        problems.append(Problem(spec, describe(spec), inputs[:500], layers=layers))
    return problems


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` items from the first to the last, evenly."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _plan(request: Request, device: DeviceInfo, problems: list[Problem]) -> tuple[list[Planning], tuple[str, ...]]:
    """The searches, and the problems that nobody can do. Of several problems of one key the first is kept."""
    plannings: dict[TuningKey, Planning] = {}
    passed_over = []
    for problem in problems:
        capable, reasons = _capable(request, problem.spec, device)
        if not capable:
            passed_over.append(f"{problem.shape}: {reasons}")
        for backend in capable:
            for pass_ in request.passes:
                key = tuning_key(backend, problem.spec, device, pass_)
                configs = {
                    *backend.tuning_space(problem.spec, device, pass_),
                    backend.default_config(problem.spec, device, pass_),
                }
                plannings.setdefault(key, Planning(problem, backend, pass_, key, len(configs)))
    if not plannings and request.part[1] == 1:  # of several devices one may have nothing to do
        raise ArgumentError(
            "Something must be left to tune.",
            seen="; ".join(passed_over) or "no shapes",
            hint="`adasplash backends` says what each backend can do",
        )
    # Cheap ones first: what they leave of their time goes to the long ones, and no long one can starve them.
    return sorted(plannings.values(), key=lambda p: p.problem.work(p.pass_)), tuple(passed_over)


def _capable(request: Request, spec: AttentionSpec, device: DeviceInfo) -> tuple[list[AttentionBackend], str]:
    """Backends to tune for a spec. On a GPU the reference is left out if another can do it, unless it is asked for by name."""
    registry = plugins.registry()
    named = [registry.backend(name) for name in request.backends] or list(registry.backends.values())
    reasons = {b.name: b.not_supported_reasons(spec, device) for b in named}
    capable = [b for b in named if not reasons[b.name]]
    if not request.backends and device.type != "cpu" and any(b.priority > 0 for b in capable):
        capable = [b for b in capable if b.priority > 0]
    return capable, "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items()) or "no backend is registered"


def _estimate(request: Request, device: DeviceInfo, plannings: list[Planning]) -> None:
    """Set about how long each search takes, from one run of each backend's default on its smallest problem."""
    import torch

    from adasplash_tuner.measure import timer_for

    timer = timer_for(torch.device(request.device))
    compiling = 0.0 if timer.first_run_counts else _COMPILE_S
    seconds_a_work: dict[str, float] = {}
    for planning in sorted(plannings, key=lambda p: (p.problem.work("forward"), p.pass_ != "forward")):
        name = planning.backend.name
        if name not in seconds_a_work:
            seconds_a_work[name] = _probe_s(request, device, planning, timer) / planning.problem.work("forward")
        runs = planning.candidates * _RUNS_A_CANDIDATE + _FINAL_RUNS
        run_s = seconds_a_work[name] * planning.problem.work(planning.pass_)
        planning.seconds = _PREPARE_S + runs * run_s + compiling * planning.candidates


def _probe_s(request: Request, device: DeviceInfo, planning: Planning, timer: Any) -> float:
    import dataclasses

    import torch

    default = planning.backend.default_config(planning.problem.spec, device, "forward")
    with torch.no_grad():
        case = next(_cases(request, planning.problem, torch.device(request.device)))
        call = dataclasses.replace(case.call, config=default)
        try:
            planning.backend.forward(call)
            one = float(timer.time_ms(lambda: planning.backend.forward(call)))
        except Exception as failure:  # its search will report it
            if _is_fatal(failure):
                raise
            return 0.0
    inputs = len(planning.problem.sparsities) + len(planning.problem.layers)
    return one / 1e3 * inputs


def _is_fatal(failure: Exception) -> bool:
    from adasplash_tuner.measure import Bench

    return Bench.is_fatal(failure)


def _forget_answers() -> None:
    """Let this process see what was tuned."""
    configs = ladder()
    for provider in configs.providers:
        if (clear := getattr(provider, "clear", None)) is not None:
            clear()
    configs.clear()


__all__ = ["Event", "Finished", "Planned", "Report", "Request", "Step", "tune"]
