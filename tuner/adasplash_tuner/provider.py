"""The ConfigProvider: answers the core's look-ups from the user's database and from the configs shipped with the package.

The first look-up of a bucket asks the database, later ones a dictionary. A database that cannot be used costs one warning, never a
call; only where ``ADASPLASH_CACHE_MODE`` is ``frozen`` is it an error, because other processes count on it. SQLAlchemy is imported for
PostgreSQL and to write: Python's own driver looks up in a SQLite file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from adasplash_core.configs import FoundBackend, FoundConfig, Rung, warn_once
from adasplash_core.errors import ArgumentError, ConfigError, FrozenConfigsError, StoreError
from adasplash_core.spec import PASSES
from adasplash_tuner.key import (
    CODE_FIELDS,
    MACHINE_FIELDS,
    PROBLEM_FIELDS,
    SIZE_FIELDS,
    UNKNOWN,
    TuningKey,
    alpha_classes,
    distance,
    lends_config,
    of_any_size,
    steps,
    tuning_key,
)
from adasplash_tuner.storage.location import DATABASE_VARIABLE, MODE_VARIABLE, CacheMode, cache_mode, locate
from adasplash_tuner.storage.records import BestConfig, Row, config_text
from adasplash_tuner.storage.snapshot import Snapshot, shipped
from adasplash_tuner.storage.sqlite_file import SqliteLookup

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionBackend, KernelConfig
    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import AttentionSpec, Pass

T = TypeVar("T")

LOOKUP_TIMEOUT_S = 1.0
"""A call must not wait long for a database: it can do without."""

RETRY_S = 60.0
"""A database that failed is asked again after this long: a lock passes, and waiting for it at every new bucket would hurt."""

NEARBY_MARGIN = 1.02
"""How many times faster a backend must have been nearby to be taken: as much as a config must be faster than the default."""

_SAME_PROBLEM = tuple(n for n in PROBLEM_FIELDS if n != "alpha_class")


class Source(Protocol):
    """What is asked of a ``TuningStore``, a ``Snapshot`` or a ``SqliteLookup`` of :mod:`adasplash_tuner.storage`."""

    @property
    def location(self) -> object: ...
    def rows_for_problem(self, key: TuningKey, alpha_classes: Sequence[str] = ()) -> list[Row]: ...
    def nearest(self, key: TuningKey, limit: int = 3) -> list[Row]: ...


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
        self._lock = threading.RLock()
        self._rejected: set[tuple[TuningKey, str]] = set()
        self.clear()

    def clear(self) -> None:
        """Forget all answers, so that new results, another ``ADASPLASH_DB`` and another ``ADASPLASH_CACHE_MODE`` are seen."""
        with self._lock:
            self._answers: dict[TuningKey, FoundConfig] = {}
            self._fastest: dict[tuple[tuple[str, ...], bool, TuningKey], FoundBackend | None] = {}
            self._source: Source | None = None
            self._known_mode: CacheMode | None = None
            self._failed_at = -RETRY_S

    # -- the protocol -------------------------------------------------------------------------------------------------------

    def find(self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> FoundConfig | None:
        if self._mode is CacheMode.OFF:
            return FoundConfig(backend.default_config(spec, device, pass_), Rung.HEURISTIC, f"{MODE_VARIABLE} is 'off'")
        key = tuning_key(backend, spec, device, pass_)
        with self._lock:
            if (found := self._answers.get(key)) is None:
                found = self._answers[key] = self._find(backend, spec, device, pass_, key)
        return found

    def fastest(self, backends: Iterable[AttentionBackend], spec: AttentionSpec, device: DeviceInfo) -> FoundBackend | None:
        """The backend with the least time for forward and (if needed) backward, of those measured here, or on such a GPU.

        Only times on the same inputs are compared, and at least two backends must have them: a backend that was measured alone says
        nothing of the others. While lengths are unknown, the totals over the buckets that all of them were measured in are compared.
        Where nothing tells for this bucket, the nearest bucket that tells is asked, with the times of the configs that will be used.
        """
        ordered = sorted(backends, key=lambda b: b.name)
        if len(ordered) < 2 or self._mode is CacheMode.OFF:
            return None
        memory = (tuple(b.name for b in ordered), spec.needs_grad, tuning_key(ordered[0], spec, device, "forward"))
        with self._lock:
            if memory not in self._fastest:
                self._fastest[memory] = self._measured_fastest(ordered, spec, device)
            return self._fastest[memory]

    def reject(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig, why: str
    ) -> None:
        if self._mode is CacheMode.OFF:
            return
        key, values = tuning_key(backend, spec, device, pass_), config.to_dict()
        with self._lock:
            self._rejected.add((key, config_text(values)))
            self._answers.pop(key, None)
            fields = (*MACHINE_FIELDS, "alpha_class")  # one that was lent from another class may well run for its own
            for row in self._rows(key):
                if row.usable and row.usable.config == values and row.usable.key.same(key, fields):
                    self._quarantine(row, f"does not run: {why}")

    # -- the ladder ---------------------------------------------------------------------------------------------------------

    def _find(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, key: TuningKey
    ) -> FoundConfig:
        rows = self._rows(key)
        for rung, record in self._records(key, rows):
            if rung is Rung.NEARBY and not _lends(record, key, backend, spec, device, pass_):
                continue
            config = self._parse(backend, pass_, key, record, rows)
            if config is not None:
                return FoundConfig(config, rung, _account(record, key), record.median_ms)
        return FoundConfig(backend.default_config(spec, device, pass_), Rung.HEURISTIC, self._explain_miss(key, rows))

    def _records(self, key: TuningKey, rows: list[Row]) -> Iterator[tuple[Rung, BestConfig]]:
        """What may answer, best first. The shipped files are not read before they are needed."""
        stored = [r for row in rows if (r := row.usable) is not None and r.key.same(key, _SAME_PROBLEM)]
        here = [r for r in stored if r.key.same(key, MACHINE_FIELDS)]
        yield from _ranked(Rung.USER_DATABASE, (r for r in here if r.key.same(key, CODE_FIELDS)), key)
        if self._mode is CacheMode.FROZEN:
            return
        yield from _ranked(Rung.STALE, (r for r in here if not r.key.same(key, CODE_FIELDS)), key)
        found = shipped(self._pretuned).rows_for_problem(key, alpha_classes(key))
        for row in found:
            if row.record is None:
                warn_once(f"A tuned config shipped with the package is passed over ({row.readable}): {row.problem}")
        pretuned = [r for row in found if (r := row.usable) is not None and r.key.same(key, _SAME_PROBLEM)]
        yield from _ranked(Rung.SHIPPED, (r for r in pretuned if r.key.same(key, MACHINE_FIELDS)), key)
        for records in (self._own, self._pretuned_here):
            yield from _ranked(Rung.NEARBY, records(of_any_size(key)), key)
        yield from _ranked(Rung.SAME_CAPABILITY, (r for r in [*stored, *pretuned] if _alike(r.key, key)), key)

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

    def _explain_miss(self, key: TuningKey, rows: list[Row]) -> str:
        """Why nothing tuned answers: the key, and in which fields the nearest rows differ."""
        advice = "" if self._mode is not CacheMode.READWRITE else ": run `adasplash tune`"
        if UNKNOWN in (key.q_bucket, key.kv_bucket, key.batch_heads_bucket):
            return "configs are looked up by lengths and batch size, which are not known here"
        source = self._opened()
        if source is None:
            return f"nothing is tuned on this machine{advice}{_key_line(key)}"
        shelved = next((r.record.quarantined for r in rows if r.record is not None and r.record.key == key), "")
        if shelved:
            return f"the config tuned for this key is in quarantine ({shelved}){advice}{_key_line(key)}"
        nothing: list[Row] = []
        nearest = self._guarded(lambda: source.nearest(key), nothing)
        if not nearest:
            return f"nothing is tuned for {key.backend} {key.pass_} in {_named(source)}{advice}{_key_line(key)}"
        lines = []
        for row in nearest:
            assert row.record is not None
            differs = "; ".join(
                f"{name} is {theirs!r} there and {mine!r} here"
                for name, (mine, theirs) in key.differences(row.record.key).items()
            )
            lines.append(f"\n  near: row {row.id}: {differs or 'no field differs, but its config does not run here'}")
        frozen = f" ({MODE_VARIABLE} is 'frozen')" if self._mode is CacheMode.FROZEN else ""
        return f"nothing is tuned for this key in {_named(source)}{frozen}{advice}{_key_line(key)}{''.join(lines)}"

    def _measured_fastest(
        self, backends: list[AttentionBackend], spec: AttentionSpec, device: DeviceInfo
    ) -> FoundBackend | None:
        """By this machine's own measurements if they tell, else by those shipped for this GPU; else by either's nearby."""
        passes: tuple[Pass, ...] = PASSES if spec.needs_grad else PASSES[:1]
        keys = {b.name: [tuning_key(b, spec, device, pass_) for pass_ in passes] for b in backends}
        classes = alpha_classes(keys[backends[0].name][0])  # its own first
        sources = (self._own, self._pretuned_here) if self._mode is not CacheMode.FROZEN else (self._own_exact,)
        for records in sources:
            found = {name: [(key, records(key)) for key in wanted] for name, wanted in keys.items()}
            for alpha_class in classes:
                if (compared := _compared(found, alpha_class)) is not None:
                    return FoundBackend(compared.fastest)
        if self._mode is CacheMode.FROZEN:
            return None
        for records in sources:
            found = {
                b.name: [
                    (key, [_as_used(r, key, b, spec, device, pass_) for r in records(of_any_size(key))])
                    for key, pass_ in zip(keys[b.name], passes, strict=True)
                ]
                for b in backends
            }
            for alpha_class in classes:
                if (fastest := _fastest_nearby(found, alpha_class)) is not None:
                    return fastest
        return None

    def _own(self, key: TuningKey) -> list[BestConfig]:
        return [r for row in self._rows(key) if (r := row.usable) is not None and r.key.same(key, MACHINE_FIELDS)]

    def _own_exact(self, key: TuningKey) -> list[BestConfig]:
        return [r for r in self._own(key) if r.key.same(key, CODE_FIELDS)]

    def _pretuned_here(self, key: TuningKey) -> list[BestConfig]:
        rows = shipped(self._pretuned).rows_for_problem(key, alpha_classes(key))
        return [r for row in rows if (r := row.usable) is not None and r.key.same(key, MACHINE_FIELDS)]

    # -- the database -------------------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> CacheMode:
        if self._known_mode is None:
            try:
                self._known_mode = cache_mode()
            except ArgumentError as error:
                warn_once(f"{error} Until then nothing is written, as with 'read'.")
                self._known_mode = CacheMode.READ
        return self._known_mode

    def _opened(self) -> Source | None:
        """Whom to ask, or None where there is nothing yet or it failed a moment ago."""
        if self._source is None and time.monotonic() - self._failed_at >= RETRY_S:
            self._source = self._guarded(self._open, None)
        return self._source if time.monotonic() - self._failed_at >= RETRY_S else None

    def _open(self) -> Source | None:
        location = locate(self._location_text)
        frozen = self._mode is CacheMode.FROZEN
        if location.is_snapshot:
            return Snapshot.load(location)
        if not location.exists():
            if frozen:
                raise StoreError(str(location), "does not exist", "Make it with `adasplash cache export`.")
            return None
        if location.path is not None:
            lookup = SqliteLookup(location, LOOKUP_TIMEOUT_S)
            if (schema := lookup.schema()) is None:
                if frozen:
                    raise StoreError(str(location), "holds no tables yet", "Tune first, or import into it.")
                return None
            if not schema.is_older:
                schema.require_readable(location)
                return Snapshot(location, lookup.all_rows()) if frozen else lookup
        from adasplash_tuner.storage.store import TuningStore  # what only SQLAlchemy can do: PostgreSQL, and an upgrade

        store = TuningStore(location, busy_timeout_s=LOOKUP_TIMEOUT_S)
        return Snapshot(location, store.rows()) if frozen else store

    def _rows(self, key: TuningKey) -> list[Row]:
        source = self._opened()
        if source is None:
            return []
        nothing: list[Row] = []
        rows = self._guarded(lambda: source.rows_for_problem(key, alpha_classes(key)), nothing)
        for row in rows:
            if row.record is None and not row.shelved:
                self._quarantine(row, row.problem)
        return rows

    def _quarantine(self, row: Row, why: str) -> None:
        """Use a row no more, here and (where the mode and the database let us) elsewhere."""
        source = self._opened()
        if source is None:
            return
        warn_once(f"A tuned config in {source.location} is no longer used (row {row.id}): {why}")
        if self._mode.writes and not isinstance(source, Snapshot):
            from adasplash_tuner.storage.store import TuningStore

            try:
                TuningStore(locate(self._location_text), busy_timeout_s=LOOKUP_TIMEOUT_S).quarantine(row.id, why)
            except StoreError:
                return  # other processes will find out by themselves: that it is not used was said

    def _guarded(self, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except Exception as error:
            if self._mode is CacheMode.FROZEN:
                raise _refusal(error) from error
            if not isinstance(error, (StoreError, ArgumentError)):
                raise
            self._failed_at = time.monotonic()
            warn_once(f"{error} Until then attention uses each backend's default configs.")
            return otherwise


def _refusal(error: Exception) -> FrozenConfigsError:
    """What went wrong, and why it ends the call."""
    reason = f"while {MODE_VARIABLE} is 'frozen': no process of a job may go on with configs of its own"
    hint = f"Hint: check {DATABASE_VARIABLE} on this machine, or unset {MODE_VARIABLE}."
    if isinstance(error, StoreError):
        return FrozenConfigsError(error.url, f"{error.problem}, {reason}", f"{error.mend} {hint}")
    return FrozenConfigsError(f"that {DATABASE_VARIABLE} names", f"cannot be read ({error}), {reason}", hint)


def _named(source: Source) -> str:
    digest = source.digest if isinstance(source, Snapshot) else ""
    return f"{source.location} (sha256 {digest})" if digest else str(source.location)


def _ranked(rung: Rung, records: Iterable[BestConfig], key: TuningKey) -> Iterator[tuple[Rung, BestConfig]]:
    return ((rung, record) for record in sorted(records, key=lambda r: _preference(r, key)))


def _alike(stored: TuningKey, key: TuningKey) -> bool:
    """Another machine whose result is a better guess than none: the same compute capability, or this CPU with other threads."""
    if stored.device_type != key.device_type or stored.same(key, MACHINE_FIELDS):
        return False
    return stored.capability == key.capability if key.capability else stored.device_name == key.device_name


def _lends(
    record: BestConfig, key: TuningKey, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass
) -> bool:
    """Whether a result's config may serve a call of another bucket: by the keys, and by the backend, whose heuristic must see no
    difference between the two shapes."""
    if not lends_config(record.key, key):
        return False
    from adasplash_tuner.shapes.shape import Shape

    try:
        shape = Shape.parse(record.shape)
    except ArgumentError:  # one with features that a shape's text cannot say
        return False
    measured = replace(
        spec, batch=shape.batch, heads=shape.heads, kv_heads=shape.kv_heads, q_len=shape.q_len, kv_len=shape.kv_len
    )
    return backend.default_config(measured, device, pass_) == backend.default_config(spec, device, pass_)


def _as_used(
    record: BestConfig, key: TuningKey, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass
) -> BestConfig:
    """A result of another bucket with the time of the config that a call would use: the default's where none is lent."""
    return record if _lends(record, key, backend, spec, device, pass_) else replace(record, median_ms=record.default_ms)


def _preference(record: BestConfig, key: TuningKey) -> tuple[float, ...]:
    """Sorts the best guess first: the very class of alpha, nearest batch times heads, nearest code, nearest size of machine, newest."""
    another_alpha = record.key.alpha_class != key.alpha_class
    changed = sum(getattr(record.key, n) != getattr(key, n) for n in CODE_FIELDS)
    heads = steps(record.key, key, "batch_heads_bucket")
    return another_alpha, heads, changed, abs(record.key.multiprocessors - key.multiprocessors), -record.measured_at


def _account(record: BestConfig, key: TuningKey) -> str:
    """Where a result is from, how good it is, and in what it differs from what was asked for."""
    when = datetime.fromtimestamp(record.measured_at, UTC).strftime("%Y-%m-%d")
    words = (
        f"measured {when} by adasplash-core {record.version} on {record.shape}, {record.inputs}: "
        f"{record.gain:.2f} times as fast as the default"
    )
    differs = key.differences(record.key)
    if differs:
        words += "; " + ", ".join(f"{name} was {theirs!r} and is {mine!r}" for name, (mine, theirs) in differs.items())
    return words + _key_line(key)


def _key_line(key: TuningKey) -> str:
    return f"\n  key: {key.readable()}"


Pairs = list[tuple[TuningKey, list[BestConfig]]]
"""The key of each pass, and the results that may answer for it."""


def _times(passes: Pairs, alpha_class: str) -> dict[tuple[Any, ...], float]:
    """Milliseconds by (bucket and inputs), all passes together, where every pass was measured."""
    by_bucket: dict[tuple[Any, ...], dict[str, float]] = {}
    for key, records in passes:
        for record in sorted(records, key=lambda r: _preference(r, key), reverse=True):  # the preferred one is written last
            if record.key.alpha_class == alpha_class:
                bucket = (*(getattr(record.key, n) for n in SIZE_FIELDS), record.shape, record.inputs)
                by_bucket.setdefault(bucket, {})[key.pass_] = record.median_ms
    return {bucket: sum(times.values()) for bucket, times in by_bucket.items() if len(times) == len(passes)}


@dataclass(frozen=True)
class _Comparison:
    """Milliseconds by backend, over all shapes and inputs on which every measured one was timed."""

    totals: dict[str, float]
    shapes: list[str]

    @property
    def fastest(self) -> str:
        return min(self.totals, key=lambda name: (self.totals[name], name))


def _compared(pairs: dict[str, Pairs], alpha_class: str) -> _Comparison | None:
    """None if fewer than two backends were measured, or on nothing in common."""
    times = {name: found for name, passes in pairs.items() if (found := _times(passes, alpha_class))}
    common = set.intersection(*map(set, times.values())) if len(times) > 1 else set()
    if not common:
        return None
    return _Comparison({name: sum(found[b] for b in common) for name, found in times.items()}, sorted({b[-2] for b in common}))


def _fastest_nearby(found: dict[str, Pairs], alpha_class: str) -> FoundBackend | None:
    """The backend that is clearly the fastest by the nearest results that compare at least two."""
    near_and_far = {
        d for pairs in found.values() for key, records in pairs for r in records if (d := distance(r.key, key)) is not None
    }
    for step in sorted(near_and_far):
        near = {
            name: [(key, [r for r in rs if distance(r.key, key) == step]) for key, rs in pairs] for name, pairs in found.items()
        }
        if (compared := _compared(near, alpha_class)) is not None:
            first, second, *_ = sorted(compared.totals.values())
            if second < NEARBY_MARGIN * first:
                return None
            times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(compared.totals.items()))
            where = f"measured fastest on this device at the nearest sizes, {'; '.join(compared.shapes)}: {times}"
            return FoundBackend(compared.fastest, where)
    return None
