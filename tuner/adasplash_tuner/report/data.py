"""What a report shows, gathered from a tuning run or from the database, as plain values that the page only lays out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adasplash_tuner.storage.records import BestConfig, ConfigValues, Measurement, config_text

if TYPE_CHECKING:
    from adasplash_tuner.search.events import Report
    from adasplash_tuner.search.search import InputTimes
    from adasplash_tuner.storage.snapshot import Snapshot
    from adasplash_tuner.storage.store import TuningStore

_STAGES = ("final", "halving", "screening")


@dataclass(frozen=True)
class Tried:
    """One measured config. ``speed``: how many times as fast as the default; below 1 is slower."""

    config: ConfigValues
    ms: float
    speed: float
    error: float | None
    stage: str


@dataclass(frozen=True)
class Refused:
    """One config that was not admitted, and why."""

    config: ConfigValues
    why: str


@dataclass(frozen=True)
class SearchReport:
    """One key's search. ``default`` is None where nobody remembers which config it was."""

    best: BestConfig
    default: ConfigValues | None
    tried: tuple[Tried, ...]  # fastest first
    refused: tuple[Refused, ...] = ()
    error_bound: float | None = None
    gain_interval: tuple[float, float] | None = None
    by_input: tuple[InputTimes, ...] = ()
    left: int = 0  # candidates that there was no time for

    @property
    def is_default(self) -> bool:
        return self.default == self.best.config

    def is_winner(self, config: ConfigValues) -> bool:
        return config == self.best.config

    def varied(self) -> list[str]:
        """Fields of which several values were measured."""
        return [name for name in self.best.config if len({_known(t.config, name) for t in self.tried}) > 1]

    def marginals(self, name: str) -> list[tuple[Any, float, int]]:
        """For each measured value of a field, in order: the value, the best speed with it, and how many configs had it."""
        speeds: dict[Any, list[float]] = {}
        for tried in self.tried:
            if name in tried.config:
                speeds.setdefault(tried.config[name], []).append(tried.speed)
        return [(value, max(found), len(found)) for value, found in sorted(speeds.items(), key=lambda item: _order(item[0]))]

    def influence(self, name: str) -> float:
        """How much a field's value decides: the best speed with its best value over that with its worst, as a logarithm."""
        best = [speed for _, speed, _ in self.marginals(name)]
        return math.log(max(best) / min(best))


@dataclass(frozen=True)
class ReportData:
    """A whole report: searches by device, and notes on what is missing."""

    searches: tuple[SearchReport, ...]
    notes: tuple[str, ...] = ()
    devices: tuple[str, ...] = field(default=())

    @property
    def gain(self) -> float:
        """Geometric mean over the searches."""
        return statistics.geometric_mean(s.best.gain for s in self.searches) if self.searches else 1.0


def from_reports(reports: Sequence[Report]) -> ReportData:
    """Of a tuning run, straight from its outcomes: what the database could not keep is shown, too."""
    searches, notes = [], []
    for report in reports:
        for finished in report.finished:
            outcome = finished.outcome
            if outcome is None:
                notes.append(f"{finished.label}: {'left to the next run' if finished.postponed else finished.problem}")
                continue
            tried, refused = _sorted_out(outcome.measurements, outcome.default, outcome.best.default_ms)
            searches.append(
                SearchReport(
                    best=outcome.best,
                    default=outcome.default,
                    tried=tried,
                    refused=refused,
                    error_bound=outcome.error_bound,
                    gain_interval=outcome.gain_interval,
                    by_input=outcome.by_input,
                    left=outcome.left,
                )
            )
        notes += [f"not tuned: {text}" for text in report.passed_over]
    return ReportData(tuple(searches), tuple(notes), _devices(s.best for s in searches))


def from_store(store: TuningStore | Snapshot, backend: str | None = None, device: str | None = None) -> ReportData:
    """Of everything in a database, or of one backend or devices whose name contains a text. A snapshot has winners only."""
    searches, notes = [], []
    for row in store.rows():
        best = row.usable
        if best is None:
            notes.append(f"row {row.id} is not usable: {row.problem or (row.record.quarantined if row.record else '')}")
            continue
        if (backend and best.key.backend != backend) or (device and device.lower() not in best.key.device_name.lower()):
            continue
        found = store.measurements(best.key)
        measured = [m for m in found if (m.shape, m.inputs) == (best.shape, best.inputs)]
        default = _default_of(best, measured)
        tried, refused = _sorted_out(measured, default, best.default_ms)
        searches.append(SearchReport(best, default, tried, refused))
    return ReportData(tuple(searches), tuple(notes), _devices(s.best for s in searches))


def _sorted_out(
    measured: Iterable[Measurement], default: ConfigValues | None, default_ms: float
) -> tuple[tuple[Tried, ...], tuple[Refused, ...]]:
    """The last word on each config: of its latest stage, against the default in that stage, which was timed nearest to it."""
    by_config: dict[str, dict[str, Measurement]] = {}
    for m in measured:
        stages = by_config.setdefault(config_text(m.config), {})
        stages.pop(m.stage, None)
        stages[m.stage] = m  # the newest comes last
    of_default = by_config.get(config_text(default), {}) if default is not None else {}
    tried, refused = [], []
    for stages in by_config.values():
        newest = list(stages.values())[-1]
        if newest.status != "ok":
            refused.append(Refused(newest.config, newest.note))
            continue
        chosen = next(stages[stage] for stage in _STAGES if stage in stages and stages[stage].median_ms)
        before = of_default.get(chosen.stage)
        against = before.median_ms if before is not None and before.median_ms else default_ms
        assert chosen.median_ms is not None
        tried.append(Tried(chosen.config, chosen.median_ms, against / chosen.median_ms, chosen.error, chosen.stage))
    return tuple(sorted(tried, key=lambda t: -t.speed)), tuple(refused)


def _default_of(best: BestConfig, measured: Iterable[Measurement]) -> ConfigValues | None:
    """The database does not say which config was the default, but the default's time in the final is the winner's ``default_ms``."""
    for m in reversed(list(measured)):
        if m.stage == "final" and m.median_ms == best.default_ms:
            return m.config
    return None


def _devices(records: Iterable[BestConfig]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(record.key.machine() for record in records))


def _known(config: ConfigValues, name: str) -> Any:
    return config.get(name)


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 1, 0.0, str(value)
    return 0, float(value), ""
