"""The search of one key: screening, successive halving, and a final in which the finalists and the default take turns.

Candidates are compiled in parallel while others are measured; one that does not compile, spills registers or asks for too much
shared memory never runs. Which candidate comes next is decided as results come (:mod:`adasplash_tuner.search.space`).

Every measurement is stored when it is made, so an interrupted search goes on where it stopped: a config that was measured under the
same key, shape and inputs is not screened again. The final is always measured anew, in turns, because times of different moments
are not comparable to the last percent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from adasplash_core.backend import KernelConfig
from adasplash_core.errors import ConfigError
from adasplash_tuner.key import TuningKey
from adasplash_tuner.measure.compiling import Preparation, Unprepared
from adasplash_tuner.measure.statistics import MIN_ROUNDS, Samples, compare, is_faster, is_no_faster
from adasplash_tuner.search.space import Neighbourhood, covering
from adasplash_tuner.storage.records import BestConfig, ConfigValues, Measurement, config_text

T = TypeVar("T")

FINALISTS = 3
SCREENING_SHARE = 0.55
"""The part of the time after the default's first sample that screening may take at least, more where the final is short."""

HALVING_SHARE = 0.33
"""Of the time that is left after screening."""

HOPELESS = 3.0
"""A config whose first run takes so many times the fastest first run is not timed again."""

MAX_FINAL_ROUNDS = 25
_SETTLED_ROUNDS = 9  # after so many rounds, measuring stops when the verdict is clear


class Contestants(Protocol):
    """What the search asks of a bench (:class:`adasplash_tuner.measure.bench.Bench`)."""

    default: KernelConfig
    labels: tuple[str, ...]  # what each input is called

    def check(self, config: KernelConfig) -> tuple[float, float]: ...
    def time(self, config: KernelConfig) -> list[float]: ...
    def error_bound(self) -> float: ...

    def is_fatal(self, failure: Exception) -> bool: ...

    @property
    def first_run_counts(self) -> bool: ...


class Memory(Protocol):
    """What the search asks of a store."""

    def measurements(self, key: TuningKey, *, shape: str | None = None, inputs: str | None = None) -> list[Measurement]: ...
    def add_measurement(self, key: TuningKey, measured: Measurement) -> None: ...
    def publish(self, best: BestConfig, *, contested: dict[str, Any] | None = None) -> bool: ...


@dataclass(frozen=True)
class Progress:
    """Where one search stands. Times in ms; ``best_ms`` is the least seen so far. Stages: preparing, screening, halving, final."""

    stage: str
    done: int
    total: int
    default_ms: float | None = None
    best_ms: float | None = None


Verdict = Literal["tuned", "default", "kept"]
"""``default``: the default is the best; ``kept``: everything had been measured before, and the stored winner stays."""


@dataclass(frozen=True)
class InputTimes:
    """Medians of the final on one input, in ms."""

    label: str
    default_ms: float
    best_ms: float


@dataclass(frozen=True)
class Costs:
    """What a search took, in seconds, for the planning of others; 0 where nothing was measured."""

    start_s: float = 0.0  # until the default was timed: inputs, the oracle, compiling the default
    candidate_s: float = 0.0  # one more candidate, compiling included
    final_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The result of one search."""

    best: BestConfig
    verdict: Verdict
    default: ConfigValues
    candidates: int
    measured: int  # in this run
    left: int = 0  # candidates for which there was no time
    refused: Mapping[str, str] = field(default_factory=dict)  # config to why it is not admitted
    error_bound: float = math.nan
    gain_interval: tuple[float, float] | None = None  # of the gain, as far as this final can tell
    by_input: tuple[InputTimes, ...] = ()
    measurements: tuple[Measurement, ...] = ()  # the last of each config and stage, of earlier runs, too
    costs: Costs = Costs()


@dataclass(eq=False)
class Search:
    """One key's search.

    Parameters
    ----------
    seeds: configs that run before all other candidates.
    incumbent: the stored winner of this key, if any; it competes again.
    deadline: ``time.monotonic()`` when the search should end; the final's least number of rounds may run past it.
    fresh: measure everything again.
    preparation: compiles candidates before they run.
    announce: called before the first run of a config, which may be the end of this process.
    """

    key: TuningKey
    bench: Contestants
    candidates: Iterable[KernelConfig]
    shape: str
    inputs: str
    memory: Memory
    version: str
    deadline: float
    seeds: Iterable[KernelConfig] = ()
    incumbent: BestConfig | None = None
    fresh: bool = False
    preparation: Preparation = field(default_factory=Unprepared)
    observe: Callable[[Progress], None] = lambda _progress: None
    announce: Callable[[KernelConfig], None] = lambda _config: None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start = self.clock()
        default = self.bench.default
        self._default_text = config_text(default.to_dict())
        self._configs = {self._default_text: default}
        if (held := self._parsed_incumbent()) is not None:
            self._configs.setdefault(config_text(held.to_dict()), held)
        for config in self.seeds:
            self._configs.setdefault(config_text(config.to_dict()), config)
        first = len(self._configs)
        for config in self.candidates:
            self._configs.setdefault(config_text(config.to_dict()), config)
        self._fields = {text: config.to_dict() for text, config in self._configs.items()}
        self._neighbourhood = Neighbourhood(self._fields)
        texts = list(self._configs)
        space = [self._fields[text] for text in texts[first:]]
        covered = covering(space, [self._fields[text] for text in texts[:first]])
        self._first = [*texts[1:first], *(texts[first + index] for index in covered)]
        self._times: dict[str, float] = {}
        self._errors: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._seen: dict[tuple[str, str], Measurement] = {}  # the last of each config and stage
        self._warm: set[str] = set()  # configs that this process has run
        self._submitted: set[str] = set()
        self._pending: set[str] = set()  # submitted, and not ready yet
        self._measured = 0
        self._start_s = self._candidate_s = self._final_s = 0.0

    def run(self) -> Outcome:
        """Search, store, and say what came out.

        Raises
        ------
        Whatever the bench raises for the default config: without it there is nothing to compare to.
        """
        finished = self._recall()
        if finished and self.incumbent is not None and not self.fresh:
            return self._outcome(self.incumbent, "kept")
        self._screen()
        return self._final(self._halve())

    # -- stages -------------------------------------------------------------------------------------------------------------

    def _recall(self) -> bool:
        """Take over earlier measurements; returns whether nothing is left to measure."""
        if self.fresh:
            return False
        final = False
        for m in self.memory.measurements(self.key, shape=self.shape, inputs=self.inputs):
            text = config_text(m.config)
            self._seen[text, m.stage] = m
            if m.status != "ok":
                self._refused[text] = m.note
            elif m.median_ms is not None:
                self._refused.pop(text, None)
                self._times[text] = m.median_ms
                self._errors[text] = m.error if m.error is not None else math.inf
                final = final or m.stage == "final"
        known = set(self._times) | set(self._refused)
        same = self.incumbent is not None and (self.incumbent.shape, self.incumbent.inputs) == (self.shape, self.inputs)
        return final and same and known >= set(self._configs)

    def _screen(self) -> None:
        """Check and time candidates once each, compiling ahead, while there is time."""
        text = self._default_text
        self._refused.pop(text, None)
        self._submit(math.inf)  # they compile while inputs are made and the default runs
        self.announce(self.bench.default)
        self._errors[text], fastest_first = self.bench.check(self.bench.default)
        self._warm.add(text)
        before = self.clock()
        self._sample(text, "screening")
        until = self._screening_until(self.clock() - before)
        begun, first_measured = self.clock(), self._measured
        self._start_s = begun - self._start
        while True:
            self._submit(until)
            if not self._pending or (ready := self.preparation.next(until - self.clock())) is None:
                break
            config, why_not = ready
            candidate = config_text(config.to_dict())
            self._pending.discard(candidate)
            if why_not:
                self._refuse(candidate, "failed", why_not)
                continue
            if self.clock() >= until:
                break
            if (elapsed := self._admit(candidate)) is None:
                continue
            if self.bench.first_run_counts and elapsed > HOPELESS * fastest_first:
                self._note(candidate, "screening", Samples([[elapsed]]), note="timed by its first run")
                continue
            fastest_first = min(fastest_first, elapsed)
            self._sample(candidate, "screening")
        if (count := self._measured - first_measured) > 0:
            self._candidate_s = (self.clock() - begun) / count

    def _submit(self, until: float) -> None:
        """Keep as many candidates on their way as can be made ready at a time."""
        while len(self._pending) < self.preparation.width and self.clock() < until:
            if (upcoming := self._upcoming()) is None:
                break
            self._submitted.add(upcoming)
            self._pending.add(upcoming)
            self.preparation.submit(self._configs[upcoming])

    def _upcoming(self) -> str | None:
        """The candidate to make ready next: first those that show every value, then the nearest to the best one."""
        known = {self._default_text} | self._submitted | set(self._times) | set(self._refused)
        while self._first:
            if (text := self._first.pop(0)) not in known:
                return text
        left = [text for text in self._configs if text not in known]
        best = next(iter(self._ranked()), self._default_text)
        return self._neighbourhood.nearest(left, self._fields[best]) if left else None

    def _screening_until(self, sample_s: float) -> float:
        """Leaves time for the final, whose cost follows from the default's; at least its share is for screening."""
        now = self.clock()
        final_s = (FINALISTS + 2) * _SETTLED_ROUNDS * sample_s
        return max(now + SCREENING_SHARE * (self.deadline - now), self.deadline - 1.3 * final_s)

    def _halve(self) -> list[str]:
        """Keep the better third and look again, until the finalists are left."""
        now = self.clock()
        until = now + HALVING_SHARE * (self.deadline - now)
        alive = self._ranked()
        while len(alive) > FINALISTS:
            alive = alive[: max(FINALISTS, math.ceil(len(alive) / 3))]
            if len(alive) > FINALISTS and self.clock() < until:
                contestants = self._warmed(list(dict.fromkeys([self._default_text, *alive])))
                rounds = self._interleave(contestants, "halving", at_least=2, at_most=2, until=until)
                alive = sorted(rounds, key=lambda t: rounds[t].median_ms)
        return alive

    def _final(self, finalists: list[str]) -> Outcome:
        """The finalists, the stored winner and the default take turns; the default wins ties."""
        contestants = [self._default_text, *(t for t in finalists if t != self._default_text)]
        held = None if self.incumbent is None else config_text(self.incumbent.config)
        if held in self._configs and held not in contestants and held not in self._refused:
            contestants.append(held)
        if self.clock() >= self.deadline:
            del contestants[2:]  # late: only the default and its first challenger
        begun = self.clock()
        contestants = self._warmed(contestants)
        # With nobody to compare to, one more round of the default is enough to know its time.
        least = MIN_ROUNDS if len(contestants) > 1 else 1
        rounds = self._interleave(contestants, "final", at_least=least, at_most=MAX_FINAL_ROUNDS, until=self.deadline)
        default = rounds[self._default_text]
        challengers = sorted((t for t in rounds if t != self._default_text), key=lambda t: rounds[t].median_ms)
        winner = next((t for t in challengers if is_faster(rounds[t], default)), self._default_text)
        record = BestConfig(
            key=self.key,
            config=self._configs[winner].to_dict(),
            median_ms=rounds[winner].median_ms,
            spread_ms=rounds[winner].spread_ms,
            default_ms=default.median_ms,
            error=self._errors[winner],
            shape=self.shape,
            inputs=self.inputs,
            samples=len(default),
            measured_at=int(time.time()),
            version=self.version,
        )
        # A stored winner that did not run here although it could have stays unless it was slower.
        beaten = held in rounds or held in self._refused or held not in self._configs
        self.memory.publish(record, contested=self.incumbent.config if self.incumbent is not None and beaten else None)
        self._final_s = self.clock() - begun
        outcome = self._outcome(record, "default" if winner == self._default_text else "tuned")
        low, high = compare(rounds[winner], default).interval
        times = zip(self.bench.labels, default.medians_ms, rounds[winner].medians_ms, strict=True)
        return replace(outcome, gain_interval=(1 / high, 1 / low), by_input=tuple(InputTimes(*t) for t in times))

    # -- measuring ----------------------------------------------------------------------------------------------------------

    def _admit(self, text: str) -> float | None:
        """Run a config once and compare it to the oracle. Milliseconds of that run, or None if the config is refused."""
        self.announce(self._configs[text])
        checked = self._attempt(text, lambda: self.bench.check(self._configs[text]))
        if checked is None:
            return None
        error, elapsed = checked
        bound, of_default = self.bench.error_bound(), self._errors[self._default_text]
        # On inputs where the default itself misses the bound, no candidate may be much worse than it.
        limit = bound if of_default <= bound else 2 * of_default
        if not error <= limit:  # NaN is not admitted either
            self._refuse(text, "inaccurate", f"relative error {error:.2g} exceeds {limit:.2g}", error)
            return None
        self._errors[text] = error
        self._warm.add(text)
        return elapsed

    def _warmed(self, texts: list[str]) -> list[str]:
        """Of configs known from an earlier run, those that this process can run, too."""
        return [t for t in texts if t in self._warm or self._admit(t) is not None]

    def _sample(self, text: str, stage: str) -> None:
        if (times := self._attempt(text, lambda: self.bench.time(self._configs[text]))) is not None:
            self._note(text, stage, Samples([times]))

    def _interleave(self, texts: list[str], stage: str, *, at_least: int, at_most: int, until: float) -> dict[str, Samples]:
        """Time configs in turns; a config that fails leaves. What was measured is stored even if this is interrupted."""
        rounds = {text: Samples() for text in texts}
        try:
            for number in range(at_most):
                if number >= at_least and (self.clock() >= until or (number >= _SETTLED_ROUNDS and self._settled(rounds))):
                    break
                for text in list(rounds)[:: 1 if number % 2 == 0 else -1]:
                    times = self._attempt(text, lambda config=self._configs[text]: self.bench.time(config))  # type: ignore[misc]
                    if times is None:
                        del rounds[text]
                    else:
                        rounds[text].add(times)
                self._report(stage, number + 1, at_most)
        finally:
            for text, samples in rounds.items():
                if len(samples):
                    self._note(text, stage, samples)
        return rounds

    def _attempt(self, text: str, run: Callable[[], T]) -> T | None:
        """Run a config; whatever it raises is its result, unless it is the default or the device is lost."""
        try:
            return run()
        except Exception as failure:
            if text == self._default_text:
                raise
            self._refuse(text, "failed", f"{type(failure).__name__}: {failure}")
            if self.bench.is_fatal(failure):
                raise
            return None

    def _settled(self, rounds: Mapping[str, Samples]) -> bool:
        default = rounds.get(self._default_text)
        if default is None:
            return False
        others = [samples for samples in rounds.values() if samples is not default]
        return any(is_faster(s, default) for s in others) or all(is_no_faster(s, default) for s in others)

    def _note(self, text: str, stage: str, samples: Samples, note: str = "") -> None:
        self._times[text] = samples.median_ms
        self._store(
            text,
            stage,
            "ok",
            median_ms=samples.median_ms,
            spread_ms=samples.spread_ms,
            samples=len(samples),
            error=self._errors.get(text),
            note=note,
        )
        if stage == "screening":
            self._measured += 1
            self._report(stage, len(self._times) + len(self._refused), len(self._configs))

    def _refuse(self, text: str, status: str, why: str, error: float | None = None) -> None:
        self._times.pop(text, None)
        self._refused[text] = why
        self._measured += 1
        finite = error if error is not None and math.isfinite(error) else None
        self._store(text, "screening", status, note=why[:500], error=finite)
        self._report("screening", len(self._times) + len(self._refused), len(self._configs))

    def _store(self, text: str, stage: str, status: str, **values: Any) -> None:
        measured = Measurement(
            config=self._configs[text].to_dict(),
            shape=self.shape,
            inputs=self.inputs,
            stage=stage,
            status=status,
            measured_at=int(time.time()),
            version=self.version,
        )
        measured = replace(measured, **values)
        self._seen.pop((text, stage), None)  # the newest comes last
        self._seen[text, stage] = measured
        self.memory.add_measurement(self.key, measured)

    # -- small things -------------------------------------------------------------------------------------------------------

    def _parsed_incumbent(self) -> KernelConfig | None:
        if self.incumbent is None:
            return None
        try:
            return type(self.bench.default).from_mapping(self.incumbent.config)
        except ConfigError:
            return None  # no contestant; `adasplash cache verify` reports it

    def _ranked(self) -> list[str]:
        """Admitted configs of this space, fastest first."""
        return sorted((t for t in self._times if t in self._configs and t not in self._refused), key=self._times.__getitem__)

    def _report(self, stage: str, done: int, total: int) -> None:
        ranked = self._ranked()
        default_ms = self._times.get(self._default_text)
        self.observe(Progress(stage, min(done, total), total, default_ms, self._times[ranked[0]] if ranked else None))

    def _outcome(self, best: BestConfig, verdict: Verdict) -> Outcome:
        known = set(self._times) | set(self._refused)
        return Outcome(
            best=best,
            verdict=verdict,
            default=self.bench.default.to_dict(),
            candidates=len(self._configs),
            measured=self._measured,
            left=len(set(self._configs) - known),
            refused={t: why for t, why in self._refused.items() if t in self._configs},
            error_bound=self.bench.error_bound(),
            measurements=tuple(m for (text, _), m in self._seen.items() if text in self._configs),
            costs=Costs(self._start_s, self._candidate_s, self._final_s),
        )
