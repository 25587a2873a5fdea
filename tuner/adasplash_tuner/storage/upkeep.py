"""Looking after the database: what is wrong with its rows, what may go, and how to get a broken file out of the way."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adasplash_core.device import DeviceInfo
from adasplash_core.errors import ArgumentError, ConfigError, StoreError
from adasplash_core.plugins import Registry
from adasplash_core.spec import PASSES, Pass
from adasplash_tuner.key import TuningKey, space_version
from adasplash_tuner.storage.location import Location, cache_mode
from adasplash_tuner.storage.records import BestConfig, Row
from adasplash_tuner.storage.snapshot import Snapshot
from adasplash_tuner.storage.sqlite_file import WINNERS, SqliteLookup, connect, winner
from adasplash_tuner.storage.store import TuningStore

DAY_S = 86_400


@dataclass(frozen=True)
class Finding:
    """The state of one row: "ok", "stale", "unknown backend", "quarantined" or "broken", and why."""

    row: Row
    state: str
    why: str = ""


def verify(store: TuningStore | Snapshot, registry: Registry) -> list[Finding]:
    """Look at every row; those that do not parse are put in quarantine where that may be written."""
    findings = [_judge(row, registry) for row in store.rows()]
    if not isinstance(store, Snapshot) and cache_mode().writes:
        try:
            for finding in findings:
                if finding.state == "broken":
                    store.quarantine(finding.row.id, finding.why)
        except StoreError:
            return findings  # a place that can only be read: what is wrong is told all the same
    return findings


def _judge(row: Row, registry: Registry) -> Finding:
    record = row.record
    if record is None:
        return Finding(row, "quarantined" if row.shelved else "broken", row.problem)
    if record.quarantined:
        return Finding(row, "quarantined", record.quarantined)
    backend = registry.backends.get(record.key.backend)
    if backend is None:
        return Finding(row, "unknown backend", f"no backend {record.key.backend!r} is registered")
    pass_: Pass = "forward" if record.key.pass_ == PASSES[0] else "backward"
    same_space = record.key.space_version == space_version(backend, pass_)
    try:
        backend.config_class(pass_).from_mapping(record.config)
    except ConfigError as error:
        return Finding(row, "broken" if same_space else "stale", str(error))
    if record.key.code_hash != backend.code_hash():
        return Finding(row, "stale", f"measured with code {record.key.code_hash}, now it is {backend.code_hash()}")
    return Finding(row, "ok")


def prunable(
    rows: Iterable[Row],
    registry: Registry,
    *,
    older_than_s: float | None = None,
    devices: Sequence[DeviceInfo] | None = None,
    stale: bool = False,
    quarantined: bool = False,
) -> dict[int, list[str]]:
    """Which rows may go, and why: those too old, those of GPUs that are not among ``devices``, those of other code, those not usable.

    Rows that do not parse have no age and no device, so only ``quarantined`` chooses them.
    """
    chosen: dict[int, list[str]] = {}
    for row in rows:
        if row.record is None:
            if quarantined:
                chosen[row.id] = [f"cannot be read: {row.problem}"]
            continue
        reasons = [f"in quarantine: {row.record.quarantined}"] if quarantined and row.record.quarantined else []
        age_s = time.time() - row.record.measured_at
        if older_than_s is not None and age_s > older_than_s:
            reasons.append(f"{age_s / DAY_S:.0f} days old")
        if devices is not None and _gpu_is_missing(row.record.key, devices):
            reasons.append(f"{row.record.key.device_name} is not in this machine")
        if stale and (finding := _judge(row, registry)).state == "stale":
            reasons.append(finding.why)
        if reasons:
            chosen[row.id] = reasons
    return chosen


def _gpu_is_missing(key: TuningKey, devices: Sequence[DeviceInfo]) -> bool:
    return key.device_type != "cpu" and all((d.type, d.name) != (key.device_type, key.device_name) for d in devices)


# -- mending ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mended:
    """Where a broken file was put, and how many configs were saved from it into a new one."""

    set_aside: Path
    saved: int


def mend(store: TuningStore) -> Mended:
    """Put the file aside under another name (nothing is deleted), and start a new one with the configs that can still be read.

    Raises
    ------
    ArgumentError: for PostgreSQL, or if there is no file.
    StoreError: if the new file cannot be written.
    """
    path = store.location.path
    if path is None:
        raise ArgumentError("Only a SQLite file can be mended.", seen=str(store.location), hint="use PostgreSQL's own tools")
    if not path.exists():
        raise ArgumentError("There must be a file to mend.", seen=f"{path} does not exist")
    store.location.require_writable()
    _require_no_newer(store.location)
    store.engines.dispose()
    saved = salvage(path)
    aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}x")
    for suffix in ("", "-wal", "-shm"):  # SQLite looks for these two beside the file, by name
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    store.merge(saved)
    return Mended(aside, len(saved))


def _require_no_newer(location: Location) -> None:
    """Raises StoreError for a database of a newer release, in which nothing is broken and much would be lost."""
    try:
        schema = SqliteLookup(location, timeout_s=5.0).schema()
    except StoreError:
        return  # this is what mending is for
    if schema is not None:
        schema.require_writable(location)


def salvage(path: Path) -> list[BestConfig]:
    """The winners that can still be read from a damaged file: rows are read from both ends until the damage."""
    found: dict[int, BestConfig] = {}
    try:
        with closing(connect(path, "read")) as connection:
            for order in ("ASC", "DESC"):
                for values in _until_damage(connection.execute(f"{WINNERS} ORDER BY k.id {order}")):
                    if (record := winner(values).record) is not None:
                        found[values[0]] = record
    except sqlite3.Error:
        return list(found.values())  # the file is damaged: that is why we are here
    return list(found.values())


def _until_damage(cursor: sqlite3.Cursor) -> Iterable[tuple[Any, ...]]:
    while True:
        try:
            row = cursor.fetchone()
        except sqlite3.Error:
            return
        if row is None:
            return
        yield row
