"""The ConfigProvider: answers the core's look-ups from the user's database and from the configs shipped with the package.

The first look-up of a bucket asks the database, later ones a dictionary. A database that cannot be used costs one warning, never a
call. SQLAlchemy is imported when there is a database to ask.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from adasplash_core.configs import FoundConfig, Rung, warn_once
from adasplash_core.errors import ConfigError, StoreError
from adasplash_core.spec import PASSES
from adasplash_tuner.exchange import shipped_records
from adasplash_tuner.key import (
    CODE_FIELDS,
    MACHINE_FIELDS,
    PROBLEM_FIELDS,
    SIZE_FIELDS,
    UNKNOWN,
    TuningKey,
    closest,
    tuning_key,
)
from adasplash_tuner.location import locate
from adasplash_tuner.records import BestConfig, config_text

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionBackend, KernelConfig
    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import AttentionSpec, Pass
    from adasplash_tuner.store import Row, TuningStore

T = TypeVar("T")

RETRY_S = 60.0
"""A database that failed is asked again after this long: a lock passes, and waiting for it at every new bucket would hurt."""


class TunedConfigs:
    """Tuned configs of one database.

    Parameters
    ----------
    location: as ``ADASPLASH_DB``, which is read at the first look-up if this is None.
    pretuned: folder of shipped documents, the package's own by default.
    """

    name = "tuner"

    def __init__(self, location: str | None = None, pretuned: Path | None = None) -> None:
        self._location_text = location
        self._pretuned = pretuned
        self._store: TuningStore | None = None
        self._lock = threading.RLock()
        self._answers: dict[TuningKey, FoundConfig] = {}
        self._fastest: dict[tuple[tuple[str, ...], bool, TuningKey], str | None] = {}
        self._rejected: set[tuple[TuningKey, str]] = set()
        self._failed_at = -RETRY_S

    def clear(self) -> None:
        """Forget all answers, so that new results and another ``ADASPLASH_DB`` are seen."""
        with self._lock:
            self._answers.clear()
            self._fastest.clear()
            self._failed_at = -RETRY_S
            self._store = None

    # -- the protocol -------------------------------------------------------------------------------------------------------

    def find(self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> FoundConfig | None:
        key = tuning_key(backend, spec, device, pass_)
        with self._lock:
            if (found := self._answers.get(key)) is None:
                found = self._answers[key] = self._find(backend, spec, device, pass_, key)
        return found

    def fastest(self, backends: Iterable[AttentionBackend], spec: AttentionSpec, device: DeviceInfo) -> str | None:
        """The backend with the least time for forward and (if needed) backward, of those measured on this machine.

        Only times on the same inputs are compared, and at least two backends must have them: a backend that was measured alone says
        nothing of the others. While lengths are unknown, the totals over the buckets that all of them were measured in are compared.
        """
        ordered = sorted(backends, key=lambda b: b.name)
        if len(ordered) < 2:
            return None
        passes: tuple[Pass, ...] = PASSES if spec.needs_grad else PASSES[:1]
        memory = (tuple(b.name for b in ordered), spec.needs_grad, tuning_key(ordered[0], spec, device, "forward"))
        with self._lock:
            if memory not in self._fastest:
                times = {b.name: self._times(b, spec, device, passes) for b in ordered}
                self._fastest[memory] = _least(times)
            return self._fastest[memory]

    def reject(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig, why: str
    ) -> None:
        key, values = tuning_key(backend, spec, device, pass_), config.to_dict()
        with self._lock:
            self._rejected.add((key, config_text(values)))
            self._answers.pop(key, None)
            for row in self._rows(key):
                if row.usable and row.usable.config == values and row.usable.key.same(key, MACHINE_FIELDS):
                    self._quarantine(row, f"does not run: {why}")

    # -- the ladder ---------------------------------------------------------------------------------------------------------

    def _find(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, key: TuningKey
    ) -> FoundConfig:
        rows = self._rows(key)
        stored = [r for row in rows if (r := row.usable) is not None and r.key.same(key, PROBLEM_FIELDS)]
        shipped = [r for r in shipped_records(self._pretuned) if r.key.same(key, PROBLEM_FIELDS)]
        here = [r for r in stored if r.key.same(key, MACHINE_FIELDS)]
        by_rung = {
            Rung.USER_DATABASE: [r for r in here if r.key == key],
            Rung.STALE: [r for r in here if r.key != key],
            Rung.SHIPPED: [r for r in shipped if r.key.same(key, MACHINE_FIELDS)],
            Rung.SAME_CAPABILITY: [r for r in [*stored, *shipped] if _alike(r.key, key)],
        }
        for rung, records in by_rung.items():
            for record in sorted(records, key=lambda r: _preference(r, key)):
                config = self._parse(backend, pass_, key, record, rows)
                if config is not None:
                    return FoundConfig(config, rung, _account(record, key, rung), record.median_ms)
        return FoundConfig(backend.default_config(spec, device, pass_), Rung.HEURISTIC, self._explain_miss(key))

    def _parse(
        self, backend: AttentionBackend, pass_: Pass, key: TuningKey, record: BestConfig, rows: list[Row]
    ) -> KernelConfig | None:
        if (key, config_text(record.config)) in self._rejected:
            return None
        try:
            return backend.config_class(pass_).from_mapping(record.config)
        except ConfigError as error:
            # Another version's config may well have other fields; one of this version has been tampered with.
            if record.key.space_version == key.space_version:
                for row in rows:
                    if row.record is record:
                        self._quarantine(row, f"is no {backend.name} config: {error}")
            return None

    def _explain_miss(self, key: TuningKey) -> str:
        advice = "run `adasplash tune`"
        if UNKNOWN in (key.q_bucket, key.kv_bucket, key.batch_heads_bucket):
            return "configs are looked up by lengths and batch size, which are not known here"
        store = self._opened()
        if store is None:
            return f"nothing is tuned on this machine: {advice}"
        nearest = closest(key, self._guarded(lambda: store.candidates_for_closest(key), []))
        if nearest is None:
            return f"nothing is tuned for {key.backend} {key.pass_} in {store.location}: {advice}"
        differs = "; ".join(
            f"{name} is {theirs!r} there and {mine!r} here" for name, (mine, theirs) in key.differences(nearest).items()
        )
        if not differs:
            return f"the tuned config is not usable (`adasplash cache verify` says why): {advice}"
        return f"nothing is tuned for {key.problem()}; in the nearest tuned key {differs}: {advice}"

    def _times(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, passes: tuple[Pass, ...]
    ) -> dict[tuple[object, ...], float]:
        """Milliseconds by (bucket and inputs), all passes together, where every pass was measured."""
        by_bucket: dict[tuple[object, ...], dict[str, BestConfig]] = {}
        for pass_ in passes:
            key = tuning_key(backend, spec, device, pass_)
            here = [r for row in self._rows(key) if (r := row.usable) is not None and r.key.same(key, MACHINE_FIELDS)]
            for record in sorted(here, key=lambda r: _preference(r, key), reverse=True):  # the preferred one is written last
                bucket = (*(getattr(record.key, n) for n in SIZE_FIELDS), record.shape, record.inputs)
                by_bucket.setdefault(bucket, {})[pass_] = record
        return {b: sum(r.median_ms for r in found.values()) for b, found in by_bucket.items() if len(found) == len(passes)}

    # -- the database -------------------------------------------------------------------------------------------------------

    def _opened(self) -> TuningStore | None:
        """The store, or None where there is none yet or it failed a moment ago."""
        if time.monotonic() - self._failed_at < RETRY_S:
            return None
        if self._store is None:
            try:
                location = locate(self._location_text)
            except StoreError as error:
                self._failed(error)
                return None
            if not location.exists():
                return None
            from adasplash_tuner.store import LOOKUP_TIMEOUT_S, TuningStore

            self._store = TuningStore(location, busy_timeout_s=LOOKUP_TIMEOUT_S)
        return self._store

    def _rows(self, key: TuningKey) -> list[Row]:
        store = self._opened()
        if store is None:
            return []
        nothing: list[Row] = []
        rows = self._guarded(lambda: store.rows_for_problem(key), nothing)
        for row in rows:
            if row.record is None:
                self._quarantine(row, row.problem)
        return rows

    def _quarantine(self, row: Row, why: str) -> None:
        store = self._opened()
        if store is not None:
            warn_once(f"A tuned config in {store.location} is no longer used (row {row.id}): {why}")
            self._guarded(lambda: store.quarantine(row.id, why), False)

    def _guarded(self, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except StoreError as error:
            self._failed(error)
            return otherwise

    def _failed(self, error: StoreError) -> None:
        self._failed_at = time.monotonic()
        warn_once(f"{error} Until then attention uses each backend's default configs.")


def _alike(stored: TuningKey, key: TuningKey) -> bool:
    """Another machine whose result is a better guess than none: the same compute capability, or this CPU with other threads."""
    if stored.device_type != key.device_type or stored.same(key, MACHINE_FIELDS):
        return False
    return stored.capability == key.capability if key.capability else stored.device_name == key.device_name


def _preference(record: BestConfig, key: TuningKey) -> tuple[int, int, int]:
    """Sorts the best guess first: nearest code, then nearest size of machine, then newest."""
    changed = sum(getattr(record.key, n) != getattr(key, n) for n in CODE_FIELDS)
    return changed, abs(record.key.multiprocessors - key.multiprocessors), -record.measured_at


def _account(record: BestConfig, key: TuningKey, rung: Rung) -> str:
    when = datetime.fromtimestamp(record.measured_at, UTC).strftime("%Y-%m-%d")
    words = (
        f"measured {when} by adasplash-core {record.version} on {record.shape}, {record.inputs}: "
        f"{record.gain:.2f} times as fast as the default"
    )
    differs = key.differences(record.key)
    if rung is not Rung.USER_DATABASE and differs:
        words += "; " + ", ".join(f"{name} was {theirs!r} and is {mine!r}" for name, (mine, theirs) in differs.items())
    return f"{words}; key: {record.key.problem()}"


def _least(times: dict[str, dict[tuple[object, ...], float]]) -> str | None:
    measured = {name: found for name, found in times.items() if found}
    if len(measured) < 2:
        return None
    common = set.intersection(*(set(found) for found in measured.values()))
    if not common:
        return None
    totals = {name: sum(found[b] for b in common) for name, found in measured.items()}
    return min(totals, key=lambda name: (totals[name], name))
