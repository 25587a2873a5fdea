"""Opening a SQLite file, and looking up tuned configs in it by Python's own driver.

A call that needs a config should not wait for SQLAlchemy, which takes longer to import than everything here together. What is written,
and what else is read, goes through :mod:`adasplash_tuner.storage.store`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from adasplash_tuner.key import KEY_FIELDS, TuningKey, nearest, problem_fields, weight
from adasplash_tuner.storage.faults import fault, sqlite_code
from adasplash_tuner.storage.location import Location
from adasplash_tuner.storage.records import BEST_VALUES, Row, row_of
from adasplash_tuner.storage.schema import Schema, read_schema

Mode = Literal["write", "migrate", "read", "recover", "immutable"]

_QUERIES = {"read": "mode=ro", "recover": "mode=rw", "immutable": "mode=ro&immutable=1"}
_UNWRITABLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)

_COLUMNS = ("readable", *KEY_FIELDS)
_VALUES = (*BEST_VALUES, "config", "quarantined")
WINNERS = (
    f"SELECT k.id, {', '.join(f'k.{n}' for n in _COLUMNS)}, {', '.join(f'b.{n}' for n in _VALUES)} "
    "FROM adasplash_keys k JOIN adasplash_best b ON b.key_id = k.id"
)
"""Every winner, in the order that :func:`winner` takes."""


def connect(path: Path, mode: Mode, timeout_s: float = 5.0) -> sqlite3.Connection:
    """A connection in autocommit. ``write`` and ``migrate`` make the file, and WAL its journal. Raises sqlite3.Error."""
    # isolation_level None: pysqlite would begin transactions late and not around DDL
    uri = f"file:{quote(str(path))}?{_QUERIES.get(mode, 'mode=rwc')}"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False)
    if mode not in _QUERIES:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            # A migration may copy a table and drop the old one, which must not take the rows that refer to it along.
            connection.execute(f"PRAGMA foreign_keys = {'OFF' if mode == 'migrate' else 'ON'}")
        except sqlite3.Error:
            connection.close()
            raise
    return connection


def reading_mode(path: Path, timeout_s: float) -> Mode:
    """How a file can be read. Raises sqlite3.Error if it cannot.

    SQLite's readers write, too: a WAL database needs its ``-shm`` file, and a transaction whose writer was killed must be rolled back.
    Where neither is possible (a read-only mount, a full disk) the file is read as immutable, without what only its WAL holds.
    """
    attempts: tuple[Mode, ...] = ("read", "recover")
    for mode in attempts:
        try:
            with closing(connect(path, mode, timeout_s)) as connection:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            if sqlite_code(error) not in _UNWRITABLE:
                raise
        else:
            return "read"
    return "immutable"


def winner(values: Sequence[Any]) -> Row:
    """A row of :data:`WINNERS`. Nothing in the file is trusted: what was edited to nonsense becomes a Row that says so."""
    id_, readable, *rest = values
    key = dict(zip(KEY_FIELDS, rest, strict=False))
    for name in ("causal", "deterministic"):
        key[name] = {0: False, 1: True}.get(key[name], key[name])  # SQLite has no booleans
    return row_of(id_, readable, key, dict(zip(_VALUES, rest[len(KEY_FIELDS) :], strict=True)))


class SqliteLookup:
    """Reads winners of one SQLite file. Every method raises StoreError for a fault of the file."""

    def __init__(self, location: Location, timeout_s: float) -> None:
        self.location = location
        self._timeout_s = timeout_s
        self._mode: Mode | None = None

    def schema(self) -> Schema | None:
        """The file's schema, None while it has no tables."""
        with self._open() as connection:
            return read_schema(connection.execute, self.location)

    def rows_for_problem(self, key: TuningKey, alpha_classes: Sequence[str] = ()) -> list[Row]:
        """As :meth:`TuningStore.rows_for_problem <adasplash_tuner.storage.store.TuningStore.rows_for_problem>`."""
        alphas = tuple(alpha_classes) or (key.alpha_class,)
        names = problem_fields(key)
        conditions = [f"k.{n} = ?" for n in names] + [f"k.alpha_class IN ({', '.join('?' * len(alphas))})"]
        return self._rows(
            f"{WINNERS} WHERE {' AND '.join(conditions)} ORDER BY k.id", [getattr(key, n) for n in names] + [*alphas]
        )

    def nearest(self, key: TuningKey, limit: int = 3) -> list[Row]:
        """As :meth:`TuningStore.nearest <adasplash_tuner.storage.store.TuningStore.nearest>`."""
        distance = " + ".join(f"{weight(n)} * (k.{n} != ?)" for n in KEY_FIELDS)
        query = (
            f"{WINNERS} WHERE k.backend = ? AND k.pass_ = ? AND b.quarantined = '' "
            f"ORDER BY {distance}, b.measured_at DESC LIMIT {8 * limit}"
        )
        return nearest(key, self._rows(query, [key.backend, key.pass_, *(getattr(key, n) for n in KEY_FIELDS)]), limit)

    def all_rows(self) -> list[Row]:
        """Every winner, as of one moment."""
        return self._rows(f"{WINNERS} ORDER BY k.id", ())

    def _rows(self, query: str, values: Sequence[Any]) -> list[Row]:
        with self._open() as connection:
            if (schema := read_schema(connection.execute, self.location)) is None:
                return []
            schema.require_readable(self.location)
            return [winner(found) for found in connection.execute(query, values)]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        assert self.location.path is not None
        try:
            if self._mode is None:
                self._mode = reading_mode(self.location.path, self._timeout_s)
            with closing(connect(self.location.path, self._mode, self._timeout_s)) as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise fault(self.location, error) from error
