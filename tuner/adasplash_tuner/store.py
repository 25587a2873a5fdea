"""The database of tuned configs and of every measurement, in terms of keys and records."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from adasplash_tuner.engine import EngineFactory
from adasplash_tuner.key import KEY_FIELDS, PROBLEM_FIELDS, SIZE_FIELDS, UNKNOWN, TuningKey
from adasplash_tuner.location import Location, locate
from adasplash_tuner.models import BestRow, KeyRow, MeasurementRow
from adasplash_tuner.records import BestConfig, Measurement, RecordError, config_text, parse_best, parse_config, parse_key

TUNER_TIMEOUT_S = 30.0
LOOKUP_TIMEOUT_S = 1.0
"""A call must not wait long for a database: it can do without."""

BEST_VALUES = ("median_ms", "spread_ms", "default_ms", "error", "shape", "inputs", "samples", "measured_at", "version")


@dataclass(frozen=True, slots=True)
class Row:
    """A stored winner: its id, and either the record or why it does not parse."""

    id: int
    readable: str
    record: BestConfig | None
    problem: str = ""

    @property
    def usable(self) -> BestConfig | None:
        return self.record if self.record is not None and not self.record.quarantined else None


class TuningStore:
    """Reads and writes one database. Safe for threads and across forks. Every method raises StoreError for a fault of the database.

    Parameters
    ----------
    location: as :func:`~adasplash_tuner.location.locate` takes it.
    busy_timeout_s: how long to wait for another process's lock.
    """

    def __init__(self, location: Location | str | None = None, *, busy_timeout_s: float = TUNER_TIMEOUT_S) -> None:
        self.location = location if isinstance(location, Location) else locate(location)
        self.engines = EngineFactory(self.location, busy_timeout_s)

    # -- reading ------------------------------------------------------------------------------------------------------------

    def rows_for_problem(self, key: TuningKey) -> list[Row]:
        """Winners of the same problem on any machine, by any code. Unknown sizes in ``key`` match every size."""
        names = [n for n in PROBLEM_FIELDS if not (n in SIZE_FIELDS and getattr(key, n) == UNKNOWN)]
        return self._rows(*(getattr(KeyRow, n) == getattr(key, n) for n in names))

    def rows(self) -> list[Row]:
        """All winners, those in quarantine and those that do not parse included."""
        return self._rows()

    def row(self, id_: int) -> Row | None:
        return next(iter(self._rows(KeyRow.id == id_)), None)

    def candidates_for_closest(self, key: TuningKey, limit: int = 500) -> list[TuningKey]:
        """Keys of the same backend and pass, newest first, among which the closest to ``key`` is looked for."""
        with self.engines.reading() as session:
            if session is None:
                return []
            query = (
                select(KeyRow)
                .join(BestRow)
                .where(KeyRow.backend == key.backend, KeyRow.pass_ == key.pass_, BestRow.quarantined == "")
                .order_by(BestRow.measured_at.desc())
                .limit(limit)
            )
            return [k for row in session.scalars(query) if (k := _key_or_none(row)) is not None]

    def measurements(self, key: TuningKey, *, shape: str | None = None, inputs: str | None = None) -> list[Measurement]:
        """What was measured under a key, oldest first; rows whose config does not parse are left out."""
        with self.engines.reading() as session:
            if session is None:
                return []
            query = select(MeasurementRow).join(KeyRow).where(*(getattr(KeyRow, n) == getattr(key, n) for n in KEY_FIELDS))
            if shape is not None:
                query = query.where(MeasurementRow.shape == shape)
            if inputs is not None:
                query = query.where(MeasurementRow.inputs == inputs)
            return list(_measurements(session.scalars(query.order_by(MeasurementRow.id))))

    def counts(self) -> dict[str, int]:
        """How many keys, winners, winners in quarantine and measurements there are."""
        with self.engines.reading() as session:
            if session is None:
                return dict.fromkeys(("keys", "best", "quarantined", "measurements"), 0)

            def count(query: Any) -> int:
                return int(session.scalar(query) or 0)

            return {
                "keys": count(select(func.count()).select_from(KeyRow)),
                "best": count(select(func.count()).select_from(BestRow)),
                "quarantined": count(select(func.count()).select_from(BestRow).where(BestRow.quarantined != "")),
                "measurements": count(select(func.count()).select_from(MeasurementRow)),
            }

    def integrity_problems(self) -> list[str]:
        """What SQLite's own check of the file finds; nothing for PostgreSQL."""
        with self.engines.reading() as session:
            if session is None or self.location.path is None:
                return []
            found = [str(line) for (line,) in session.connection().exec_driver_sql("PRAGMA integrity_check")]
            return [] if found == ["ok"] else found

    def _rows(self, *conditions: Any) -> list[Row]:
        with self.engines.reading() as session:
            if session is None:
                return []
            found = session.execute(select(KeyRow, BestRow).join(BestRow).where(*conditions).order_by(KeyRow.id)).all()
            return [_row(key, best) for key, best in found]

    # -- writing ------------------------------------------------------------------------------------------------------------

    def add_measurement(self, key: TuningKey, measured: Measurement) -> None:
        """Store one measurement, committed when this returns."""
        with self.engines.writing() as session:
            names = (
                "shape",
                "inputs",
                "stage",
                "status",
                "measured_at",
                "version",
                "median_ms",
                "spread_ms",
                "samples",
                "error",
                "note",
            )
            values = {n: getattr(measured, n) for n in names}
            session.add(MeasurementRow(key_id=_key_id(session, key), config=config_text(measured.config), **values))

    def publish(self, best: BestConfig, *, contested: dict[str, Any] | None = None) -> bool:
        """Make ``best`` its key's winner unless the stored one should stay; returns whether it did.

        The stored winner is replaced if it is the one that ``best`` was measured against (``contested``), if it is in quarantine, or
        if it is slower. So of many processes that tune one key at once the fastest result remains, whatever their clocks say.
        """
        with self.engines.writing() as session:
            return _upsert(session, best, contested)

    def merge(self, records: Iterable[BestConfig]) -> int:
        """Take over records from elsewhere, all or none: each replaces a stored winner only if it is faster. Returns how many did."""
        with self.engines.writing() as session:
            return sum(_upsert(session, record, None) for record in records)

    def quarantine(self, id_: int, why: str, config: dict[str, Any] | None = None) -> bool:
        """Mark a winner as not to be used; with ``config`` only if it is still this one. Returns whether a row was marked."""
        with self.engines.writing() as session:
            change = update(BestRow).where(BestRow.key_id == id_, BestRow.quarantined == "").values(quarantined=why[:500])
            if config is not None:
                change = change.where(BestRow.config == config_text(config))
            return _affected(session.execute(change)) > 0

    def delete(self, ids: Sequence[int]) -> int:
        """Delete keys with their winners and measurements; returns how many keys were there."""
        with self.engines.writing() as session:
            deleted = 0
            for start in range(0, len(ids), 500):  # SQLite limits the number of bound values
                part = ids[start : start + 500]
                session.execute(delete(MeasurementRow).where(MeasurementRow.key_id.in_(part)))
                session.execute(delete(BestRow).where(BestRow.key_id.in_(part)))
                deleted += _affected(session.execute(delete(KeyRow).where(KeyRow.id.in_(part))))
            return deleted


def _insert(session: Session, model: Any) -> Any:
    """INSERT with ON CONFLICT, which each dialect spells with its own construct."""
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(model)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(model)


def _key_id(session: Session, key: TuningKey) -> int:
    values = key.as_dict()
    session.execute(
        _insert(session, KeyRow)
        .values(**values, readable=key.readable())
        .on_conflict_do_nothing(index_elements=list(KEY_FIELDS))
    )
    return int(session.scalars(select(KeyRow.id).filter_by(**values)).one())


def _upsert(session: Session, best: BestConfig, contested: dict[str, Any] | None) -> bool:
    values = {
        "config": config_text(best.config),
        "quarantined": best.quarantined,
        **{n: getattr(best, n) for n in BEST_VALUES},
    }
    insert = _insert(session, BestRow).values(key_id=_key_id(session, best.key), **values)
    replace = [BestRow.quarantined != "", insert.excluded.median_ms < BestRow.median_ms]
    if contested is not None:
        replace.append(BestRow.config == config_text(contested))
    statement = insert.on_conflict_do_update(
        index_elements=["key_id"], set_={name: insert.excluded[name] for name in values}, where=or_(*replace)
    )
    # RETURNING says whether a row was written; the row count does not, with every driver.
    return session.execute(statement.returning(BestRow.key_id)).first() is not None


def _affected(result: Any) -> int:
    return int(result.rowcount)


def _row(key_row: KeyRow, best: BestRow) -> Row:
    """Nothing in the file is trusted: a row that was edited to nonsense becomes a Row that says so."""
    readable = str(key_row.readable)
    try:
        values = {n: getattr(best, n) for n in BEST_VALUES}
        key = {n: getattr(key_row, n) for n in KEY_FIELDS}
        record = parse_best({"key": key, "config": best.config, "quarantined": best.quarantined, **values})
    except RecordError as error:
        return Row(int(best.key_id), readable, None, str(error))
    return Row(int(best.key_id), readable, record)


def _key_or_none(row: KeyRow) -> TuningKey | None:
    try:
        return parse_key({n: getattr(row, n) for n in KEY_FIELDS})
    except RecordError:
        return None  # `rows()` reports it with its reason


def _measurements(rows: Iterable[MeasurementRow]) -> Iterator[Measurement]:
    for row in rows:
        try:
            config = parse_config(row.config)
        except RecordError:
            continue  # an unreadable measurement is one that was never made
        yield Measurement(
            config=config,
            shape=row.shape,
            inputs=row.inputs,
            stage=row.stage,
            status=row.status,
            measured_at=row.measured_at,
            version=row.version,
            median_ms=row.median_ms,
            spread_ms=row.spread_ms,
            samples=row.samples,
            error=row.error,
            note=row.note,
        )


def package_version() -> str:
    try:
        return version("adasplash-core")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def now() -> int:
    return int(time.time())
