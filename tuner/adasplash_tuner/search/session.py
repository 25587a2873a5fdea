"""A tuning run on one device: makes the planned searches one after the other within the budget, and tells how it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from adasplash_core.configs import ladder
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import ArgumentError, ConfigError, StoreError
from adasplash_tuner.key import TuningKey
from adasplash_tuner.measure.compiling import CompilePool, Compiler, Preparation, Unprepared, compiles_ahead
from adasplash_tuner.search.events import Event, Finished, Observer, Planned, Report, Request, Step, Trying
from adasplash_tuner.search.planning import CostModel, Planning, Problem, cost_model, plan, problems_of, set_run_times, share_of
from adasplash_tuner.search.search import Outcome, Progress, Search
from adasplash_tuner.shapes.shape import profile
from adasplash_tuner.storage.location import Location, locate
from adasplash_tuner.storage.records import BestConfig, Measurement, Row, config_text
from adasplash_tuner.storage.store import TuningStore, package_version

if TYPE_CHECKING:
    from adasplash_core.backend import KernelConfig
    from adasplash_tuner.measure.bench import Bench, Case

MAX_SEEDS = 3
"""Earlier winners that compete beside the backend's candidates."""

T = TypeVar("T")


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
    costs = cost_model(request, device)
    with CompilePool(costs.compiling) as pool:
        run = _Run(request, device, guarded, pool, costs, observe)
        run.all(request.started if request.started is not None else begun)
    report = run.report
    report.store_problem = guarded.problem
    report.seconds = time.monotonic() - begun
    _forget_answers()
    return report


class _Run:
    """The searches of one call of :func:`tune`."""

    def __init__(
        self, request: Request, device: DeviceInfo, store: GuardedStore, pool: CompilePool, costs: CostModel, observe: Observer
    ) -> None:
        self.request, self.device, self.store = request, device, store
        self.pool, self.costs, self.observe = pool, costs, observe
        self.inputs = _Inputs(request, device)
        self.report = Report(device, str(store.store.location))

    def all(self, started: float) -> None:
        request = self.request
        problems = share_of(problems_of(request, self.device), request.part)
        plannings, self.report.passed_over = plan(request, self.device, problems)
        for planning in plannings:
            self._look_up(planning)
        plannings.sort(key=lambda p: p.tuned is not None)  # what was never tuned comes before what can be tuned further
        set_run_times([p for p in plannings if p.label not in request.given_up], self._probe_s)
        budget = request.budget_s if request.budget_s is not None else profile(self.device.type, request.profile).budget_s
        deadline = started + budget
        estimate = min(budget, sum(map(self.costs.seconds, plannings)))
        self.observe(Planned(self.device, tuple(p.label for p in plannings), estimate, budget, self.report.passed_over))
        for index, planning in enumerate(plannings):
            must = planning.problem is plannings[0].problem  # however short the budget, one problem is tuned in all its passes
            finished, fatal = self._one(index, planning, plannings[index:], deadline, must)
            self.report.finished.append(finished)
            self.observe(finished)
            if fatal:
                self.report.device_lost = True
                break

    def _probe_s(self, planning: Planning) -> float:
        self._announce(0, planning, planning.space[0])
        return self.inputs.probe_s(planning)

    def _announce(self, index: int, planning: Planning, config: KernelConfig) -> None:
        problem, is_default = planning.problem, config == planning.space[0]
        self.observe(Trying(index, planning.label, planning.key, problem.shape, problem.inputs, config.to_dict(), is_default))

    def _look_up(self, planning: Planning) -> None:
        """How much of a search an earlier run has made."""
        planning.left = len(planning.space)
        if self.request.fresh:
            return
        problem = planning.problem
        measured = self.store.measurements(planning.key, shape=problem.shape, inputs=problem.inputs)
        known = {config_text(m.config) for m in measured}
        planning.left = sum(config_text(c.to_dict()) not in known for c in planning.space)
        best = self.store.incumbent(planning.key)
        same = best is not None and (best.shape, best.inputs) == (problem.shape, problem.inputs)
        planning.tuned = best if same and any(m.stage == "final" for m in measured) else None

    def _one(
        self, index: int, planning: Planning, ahead: Sequence[Planning], deadline: float, must: bool
    ) -> tuple[Finished, bool]:
        """One search, and whether it took the device from this process."""
        left = deadline - time.monotonic()
        if planning.label in self.request.given_up:
            return Finished(index, planning.label, None, "its default config ended the process"), False
        if not (planning.done or must) and left < self.costs.least_seconds(planning):
            return self._postponed(index, planning, left), False
        begun = time.monotonic()
        needed = self.costs.seconds(planning)
        share = self.costs.share(ahead, max(left, 0.0))
        until = begun + share
        after = min(sum(map(self.costs.seconds, ahead[1:])), max(left - share, 0.0))
        early = [p for p in ahead[1:] if not p.done and compiles_ahead(p.backend)][:1]

        def step(progress: Progress) -> None:
            if progress.stage == "final" and early:
                self._compile_early(early.pop())
            now = time.monotonic()
            own = min(until - now, needed - (now - begun))  # its share of the time, or less if it needs less
            self.observe(Step(index, planning.label, progress, max(own, 0.0) + after))

        try:
            outcome = self._search(index, planning, until, step)
        except (ArgumentError, StoreError):
            raise
        except Exception as failure:  # a backend whose default fails on this problem must not end the others' tuning
            problem = f"{type(failure).__name__}: {failure}"
            return Finished(index, planning.label, None, problem, left_s=after), _is_fatal(failure)
        self.costs.learn(planning, outcome)
        return Finished(index, planning.label, outcome, left_s=after), False

    def _postponed(self, index: int, planning: Planning, left: float) -> Finished:
        """There is no time. What an earlier run chose stays, though not everything was measured."""
        if planning.tuned is None:
            return Finished(index, planning.label, None, postponed=True, left_s=max(left, 0.0))
        known = self.store.measurements(planning.key, shape=planning.problem.shape, inputs=planning.problem.inputs)
        outcome = Outcome(
            best=planning.tuned,
            verdict="kept",
            default=planning.space[0].to_dict(),
            candidates=len(planning.space),
            measured=0,
            left=planning.left,
            error_bound=planning.backend.error_bound(planning.problem.spec.arithmetic),
            measurements=tuple(known),
        )
        return Finished(index, planning.label, outcome, left_s=max(left, 0.0))

    def _search(self, index: int, planning: Planning, deadline: float, step: Callable[[Progress], None]) -> Outcome:
        problem, backend = planning.problem, planning.backend
        step(Progress("preparing", 0, len(planning.space)))
        default = planning.space[0]
        bench = _LazyBench(lambda: self.inputs.bench(planning), default, backend.error_bound(problem.spec.arithmetic))
        with contextlib.closing(self._preparation(planning)) as preparation:
            search = Search(
                key=planning.key,
                bench=bench,
                candidates=planning.space,
                seeds=_winners_elsewhere(self.store, planning),
                shape=problem.shape,
                inputs=problem.inputs,
                memory=self.store,
                version=package_version(),
                deadline=deadline,
                incumbent=self.store.incumbent(planning.key),
                fresh=self.request.fresh,
                preparation=preparation,
                observe=step,
                announce=lambda config: self._announce(index, planning, config),
                clock=time.monotonic,
            )
            return search.run()

    def _compile_early(self, planning: Planning) -> None:
        """In a final nobody compiles: the next search's default, for which the device would wait, and its first candidates can be."""
        for config in planning.space[: self.pool.processes]:
            job = (planning.backend, planning.problem.spec, self.device, planning.pass_, config)
            self.pool.submit(job, lambda _report: None)

    def _preparation(self, planning: Planning) -> Preparation:
        problem, backend = planning.problem, planning.backend
        if planning.done or not compiles_ahead(backend):
            return Unprepared()
        return Compiler(self.pool, backend, problem.spec, self.device, planning.pass_, planning.space[0])


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

    def __init__(self, make: Callable[[], Bench], default: Any, bound: float) -> None:
        self._make, self.default, self._bound = make, default, bound
        self._bench: Bench | None = None

    def error_bound(self) -> float:
        return self._bound

    def __getattr__(self, name: str) -> Any:
        if self._bench is None:
            self._bench = self._make()
        return getattr(self._bench, name)


class _Inputs:
    """Makes benches, and keeps the inputs of the last problem: its other passes and backends are measured on the same."""

    def __init__(self, request: Request, device: DeviceInfo) -> None:
        self.request, self.device = request, device
        self._problem: Problem | None = None
        self._cases: list[Case] = []

    def bench(self, planning: Planning) -> Bench:
        import torch

        from adasplash_tuner.measure.bench import Bench, timer_for

        target = torch.device(self.request.device)
        cases = self.cases(planning.problem)
        if target.type == "cuda":
            torch.cuda.empty_cache()  # graphs of the search before have freed their memory by now
        return Bench(planning.backend, self.device, planning.pass_, cases, timer_for(target, self.request.cold_l2))

    def cases(self, problem: Problem) -> list[Case]:
        from adasplash_core.precision import as_in

        if self._problem is not problem:
            self._problem, self._cases = None, []  # the old ones go first: both might not fit
            with as_in(problem.spec):
                self._cases = list(_cases(self.request, problem))
            self._problem = problem
        return self._cases

    def probe_s(self, planning: Planning) -> float:
        """Seconds of one forward of the default on every input; 0 if it fails, which its search will report."""
        import torch

        from adasplash_core.precision import as_in
        from adasplash_tuner.measure.bench import timer_for

        problem, backend = planning.problem, planning.backend
        try:
            call = replace(self.cases(problem)[0].call, config=backend.default_config(problem.spec, self.device, "forward"))
            with torch.no_grad(), as_in(problem.spec):
                backend.forward(call)
                timer = timer_for(torch.device(self.request.device), self.request.cold_l2)
                return timer.time_ms(lambda: backend.forward(call)) / 1e3 * problem.input_count
        except Exception as failure:
            if _is_fatal(failure) or isinstance(failure, ArgumentError):
                raise
            return 0.0


def _cases(request: Request, problem: Problem) -> Iterator[Case]:
    import torch

    from adasplash_core.call import make_call
    from adasplash_core.testing import inputs
    from adasplash_core.workload import Workload
    from adasplash_tuner.measure.bench import Case

    target = torch.device(request.device)
    if problem.sparsities:
        # Drawn once: the classes differ in the query's size only.
        base = inputs.make_call(problem.spec, "dense", target)
        for sparsity in problem.sparsities:
            factor = inputs.QUERY_SCALE[sparsity] / inputs.QUERY_SCALE["dense"]  # type: ignore[index]
            yield Case(sparsity, base if factor == 1 else replace(base, query=base.query * factor))
    if problem.layers:
        assert request.workload is not None
        workload = Workload.load(request.workload)
        for index in problem.layers:
            layer = workload.layer(index).to(target)
            yield Case(f"layer {index}", make_call(**layer.kwargs(), needs_grad=problem.spec.needs_grad))


def _is_fatal(failure: Exception) -> bool:
    from adasplash_tuner.measure.bench import Bench

    return Bench.is_fatal(failure)


def _forget_answers() -> None:
    """Let this process see what was tuned."""
    configs = ladder()
    for provider in configs.providers:
        if (clear := getattr(provider, "clear", None)) is not None:
            clear()
    configs.clear()


__all__ = ["Event", "Finished", "Planned", "Report", "Request", "Step", "Trying", "tune"]
