"""The database of tuned configs and of every measurement, in terms of keys and records."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import Connection, and_, case, delete, func, or_, select, true, update

from adasplash_tuner.key import KEY_FIELDS, TuningKey, nearest, problem_fields, weight
from adasplash_tuner.storage.engine import EngineFactory
from adasplash_tuner.storage.location import Location, locate
from adasplash_tuner.storage.models import BEST, KEYS, MEASUREMENTS
from adasplash_tuner.storage.records import BEST_VALUES, BestConfig, Measurement, RecordError, config_text, parse_config, row_of
from adasplash_tuner.storage.records import Row as Row

TUNER_TIMEOUT_S = 30.0

MEASURED_VALUES = (
    "shape", "inputs", "stage", "status", "measured_at", "version", "median_ms", "spread_ms", "samples", "error", "note"
)  # fmt: skip

_WINNERS = select(*(KEYS.c[n] for n in KEY_FIELDS), KEYS.c.readable, *BEST.c).select_from(KEYS.join(BEST))


class TuningStore:
    """Reads and writes one database. Safe for threads and across forks. Every method raises StoreError for a fault of the database.

    Parameters
    ----------
    location: as :func:`~adasplash_tuner.storage.location.locate` takes it.
    busy_timeout_s: how long to wait for another process's lock.
    """

    def __init__(self, location: Location | str | None = None, *, busy_timeout_s: float = TUNER_TIMEOUT_S) -> None:
        self.location = location if isinstance(location, Location) else locate(location)
        self.engines = EngineFactory(self.location, busy_timeout_s)

    # -- reading ------------------------------------------------------------------------------------------------------------

    def rows_for_problem(self, key: TuningKey, alpha_classes: Sequence[str] = ()) -> list[Row]:
        """Winners of the same problem on any machine, by any code. Unknown sizes in ``key`` match every size.

        ``alpha_classes``: those to take instead of the key's own alone.
        """
        alphas = KEYS.c.alpha_class.in_(alpha_classes or (key.alpha_class,))
        return self._rows(alphas, *(KEYS.c[n] == getattr(key, n) for n in problem_fields(key)))

    def rows(self) -> list[Row]:
        """All winners, those in quarantine and those that do not parse included."""
        return self._rows()

    def row(self, id_: int) -> Row | None:
        return next(iter(self._rows(KEYS.c.id == id_)), None)

    def nearest(self, key: TuningKey, limit: int = 3) -> list[Row]:
        """Usable winners of the same backend and pass that differ from ``key`` in the fewest fields, the nearest first."""
        distance = sum(case((KEYS.c[n] != getattr(key, n), weight(n)), else_=0) for n in KEY_FIELDS)
        same = and_(KEYS.c.backend == key.backend, KEYS.c.pass_ == key.pass_, BEST.c.quarantined == "")
        return nearest(key, self._rows(same, order=(distance, BEST.c.measured_at.desc()), limit=8 * limit), limit)

    def measurements(self, key: TuningKey, *, shape: str | None = None, inputs: str | None = None) -> list[Measurement]:
        """What was measured under a key, oldest first; rows whose config does not parse are left out."""
        with self.engines.reading() as connection:
            if connection is None:
                return []
            query = select(MEASUREMENTS).join(KEYS).where(*(KEYS.c[n] == getattr(key, n) for n in KEY_FIELDS))
            if shape is not None:
                query = query.where(MEASUREMENTS.c.shape == shape)
            if inputs is not None:
                query = query.where(MEASUREMENTS.c.inputs == inputs)
            return list(_measurements(connection.execute(query.order_by(MEASUREMENTS.c.id))))

    def counts(self) -> dict[str, int]:
        """How many keys, winners, winners in quarantine and measurements there are."""
        with self.engines.reading() as connection:
            if connection is None:
                return dict.fromkeys(("keys", "best", "quarantined", "measurements"), 0)

            def count(query: Any) -> int:
                return int(connection.scalar(query) or 0)

            return {
                "keys": count(select(func.count()).select_from(KEYS)),
                "best": count(select(func.count()).select_from(BEST)),
                "quarantined": count(select(func.count()).select_from(BEST).where(BEST.c.quarantined != "")),
                "measurements": count(select(func.count()).select_from(MEASUREMENTS)),
            }

    def integrity_problems(self) -> list[str]:
        """What SQLite's own check of the file finds; nothing for PostgreSQL."""
        with self.engines.reading() as connection:
            if connection is None or self.location.path is None:
                return []
            found = [str(line) for (line,) in connection.exec_driver_sql("PRAGMA integrity_check")]
            return [] if found == ["ok"] else found

    def _rows(self, *conditions: Any, order: Sequence[Any] = (KEYS.c.id,), limit: int | None = None) -> list[Row]:
        with self.engines.reading() as connection:
            if connection is None:
                return []
            query = _WINNERS.where(true(), *conditions).order_by(*order).limit(limit)
            return [_row(found) for found in connection.execute(query).mappings()]

    # -- writing ------------------------------------------------------------------------------------------------------------

    def add_measurement(self, key: TuningKey, measured: Measurement) -> None:
        """Store one measurement, committed when this returns."""
        with self.engines.writing() as connection:
            values = {n: getattr(measured, n) for n in MEASURED_VALUES}
            row = {"key_id": _key_id(connection, key), "config": config_text(measured.config), **values}
            connection.execute(MEASUREMENTS.insert().values(row))

    def publish(self, best: BestConfig, *, contested: dict[str, Any] | None = None) -> bool:
        """Make ``best`` its key's winner unless the stored one should stay; returns whether it did.

        The stored winner is replaced if it is the one that ``best`` was measured against (``contested``), if it is in quarantine, or
        if it is slower. So of many processes that tune one key at once the fastest result remains, whatever their clocks say.
        """
        with self.engines.writing() as connection:
            return _upsert(connection, best, contested)

    def merge(self, records: Iterable[BestConfig]) -> int:
        """Take over records from elsewhere, all or none: each replaces a stored winner only if it is faster. Returns how many did."""
        with self.engines.writing() as connection:
            return sum(_upsert(connection, record, None) for record in records)

    def quarantine(self, id_: int, why: str, config: dict[str, Any] | None = None) -> bool:
        """Mark a winner as not to be used; with ``config`` only if it is still this one. Returns whether a row was marked."""
        with self.engines.writing() as connection:
            change = update(BEST).where(BEST.c.key_id == id_, BEST.c.quarantined == "").values(quarantined=why[:500])
            if config is not None:
                change = change.where(BEST.c.config == config_text(config))
            return connection.execute(change).rowcount > 0

    def delete(self, ids: Sequence[int]) -> int:
        """Delete keys with their winners and measurements; returns how many keys were there."""
        with self.engines.writing() as connection:
            deleted = 0
            for start in range(0, len(ids), 500):  # SQLite limits the number of bound values
                part = ids[start : start + 500]
                connection.execute(delete(MEASUREMENTS).where(MEASUREMENTS.c.key_id.in_(part)))
                connection.execute(delete(BEST).where(BEST.c.key_id.in_(part)))
                deleted += connection.execute(delete(KEYS).where(KEYS.c.id.in_(part))).rowcount
            return deleted


def _insert(connection: Connection, table: Any) -> Any:
    """INSERT with ON CONFLICT, which each dialect spells with its own construct."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def _key_id(connection: Connection, key: TuningKey) -> int:
    values = key.as_dict()
    connection.execute(
        _insert(connection, KEYS)
        .values(**values, readable=key.readable())
        .on_conflict_do_nothing(index_elements=list(KEY_FIELDS))
    )
    return int(connection.execute(select(KEYS.c.id).filter_by(**values)).scalar_one())


def _upsert(connection: Connection, best: BestConfig, contested: dict[str, Any] | None) -> bool:
    values = {
        "config": config_text(best.config),
        "quarantined": best.quarantined,
        **{n: getattr(best, n) for n in BEST_VALUES},
    }
    insert = _insert(connection, BEST).values(key_id=_key_id(connection, best.key), **values)
    replace = [BEST.c.quarantined != "", insert.excluded.median_ms < BEST.c.median_ms]
    if contested is not None:
        replace.append(BEST.c.config == config_text(contested))
    statement = insert.on_conflict_do_update(
        index_elements=["key_id"], set_={name: insert.excluded[name] for name in values}, where=or_(*replace)
    )
    # RETURNING says whether a row was written; the row count does not, with every driver.
    return connection.execute(statement.returning(BEST.c.key_id)).first() is not None


def _row(found: Any) -> Row:
    key = {n: found[n] for n in KEY_FIELDS}
    return row_of(found["key_id"], found["readable"], key, {n: found[n] for n in (*BEST_VALUES, "config", "quarantined")})


def _measurements(rows: Iterable[Any]) -> Iterator[Measurement]:
    for row in rows:
        try:
            config = parse_config(row.config)
        except RecordError:
            continue  # an unreadable measurement is one that was never made
        yield Measurement(config=config, **{n: getattr(row, n) for n in MEASURED_VALUES})


def package_version() -> str:
    try:
        return version("adasplash-core")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def now() -> int:
    return int(time.time())
