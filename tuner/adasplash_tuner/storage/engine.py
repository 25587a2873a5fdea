"""Opening the database: one engine a process, the pragmas, the schema, and every fault as a StoreError that says how to mend it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator

from sqlalchemy import Connection, Engine, create_engine, event, update
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from adasplash_core.errors import StoreError
from adasplash_tuner.storage.faults import fault
from adasplash_tuner.storage.location import DATABASE_VARIABLE, MODE_VARIABLE, Location, cache_mode
from adasplash_tuner.storage.models import META
from adasplash_tuner.storage.sqlite_file import Mode, connect, reading_mode
from adasplash_tuner.storage.upgrade import bring_up_to_date, schema_of


class EngineFactory:
    """The engines of one database. An engine is never shared with a forked child: connections do not survive a fork."""

    def __init__(self, location: Location, busy_timeout_s: float) -> None:
        self.location = location
        self.busy_timeout_s = busy_timeout_s
        self._engines: dict[tuple[int, Mode], Engine] = {}
        self._lock = threading.Lock()
        self._read_mode: Mode | None = None

    def _engine(self, mode: Mode) -> Engine:
        if self.location.path is None:
            mode = "write"  # PostgreSQL's connections are all alike
        key = (os.getpid(), mode)
        with self._lock:
            if key not in self._engines:
                self._engines[key] = self._postgres_engine() if self.location.path is None else self._sqlite_engine(mode)
            return self._engines[key]

    def _postgres_engine(self) -> Engine:
        try:
            return create_engine(
                self.location.url, pool_pre_ping=True, connect_args={"connect_timeout": max(2, int(self.busy_timeout_s))}
            )
        except ModuleNotFoundError as error:
            raise StoreError(
                str(self.location),
                f"needs a driver that is not installed ({error.name})",
                "Run `pip install 'adasplash-core[postgres]'`.",
            ) from error
        except (ArgumentError, ValueError) as error:
            raise StoreError(str(self.location), f"has no valid URL ({error})", f"Correct {DATABASE_VARIABLE}.") from error

    def _sqlite_engine(self, mode: Mode) -> Engine:
        assert self.location.path is not None
        path = self.location.path
        engine = create_engine("sqlite://", creator=lambda: connect(path, mode, self.busy_timeout_s), poolclass=NullPool)
        begin = "BEGIN IMMEDIATE" if mode in ("write", "migrate") else "BEGIN"  # a writer that starts as a reader can deadlock
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that commits at the end. Makes the file and the tables if they are not there, and upgrades older ones.

        Raises
        ------
        StoreError: whatever the database's fault is, with how to mend it.
        """
        self.location.require_writable()
        with self._faults():
            if self.location.path is not None:
                self.location.path.parent.mkdir(parents=True, exist_ok=True)
            with self._engine("write").begin() as connection:
                # Each time, as a newer release may have upgraded the database since, or somebody deleted the file.
                if self._is_ready(connection):
                    yield connection
                    return
            self._prepare()
            with self._engine("write").begin() as connection:
                yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection | None]:
        """A connection for reading, or None where there is no database yet. Makes no file. Raises StoreError as :meth:`writing`."""
        if self.location.is_snapshot:
            raise StoreError(
                str(self.location), "is a snapshot and no database", "`adasplash cache list` and `export` read it."
            )
        if not self.location.exists():
            yield None
            return
        with self._faults(), contextlib.ExitStack() as stack:
            connection = stack.enter_context(self._open_reader())
            found = schema_of(connection, self.location)
            if found is not None and found.is_older:
                stack.close()
                self._require_upgradable(found.version)
                self._prepare()
                connection = stack.enter_context(self._open_reader())
            elif found is not None:
                found.require_readable(self.location)
            yield None if found is None else connection

    def check_writable(self) -> None:
        """Open for writing, and write. Raises StoreError as :meth:`writing`, before a tuner has spent minutes on measuring."""
        with self.writing() as connection:
            connection.execute(update(META).where(META.c.name == "schema_version").values(value=META.c.value))

    def _open_reader(self) -> Connection:
        if self.location.path is not None and self._read_mode is None:
            self._read_mode = reading_mode(self.location.path, self.busy_timeout_s)
        return self._engine(self._read_mode or "read").connect()

    def _require_upgradable(self, version: int) -> None:
        if not cache_mode().writes:
            raise StoreError(
                str(self.location),
                f"has schema {version} and must be upgraded, which {MODE_VARIABLE}={cache_mode().value} forbids",
                f"Unset {MODE_VARIABLE} once, for `adasplash cache verify`.",
            )

    def _is_ready(self, connection: Connection) -> bool:
        """Whether the tables are those of this code. Raises StoreError for newer ones."""
        found = schema_of(connection, self.location)
        if found is not None:
            found.require_writable(self.location)
        return found is not None and found.stamped and not found.is_older

    def _prepare(self) -> None:
        """Make the tables, or upgrade them. Of many processes at once the first does it, the others see it done."""
        with self._engine("migrate").begin() as connection:
            bring_up_to_date(connection, self.location)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise fault(self.location, error) from error

    def dispose(self) -> None:
        with self._lock:
            for (pid, _), engine in self._engines.items():
                if pid == os.getpid():
                    engine.dispose()
            self._engines.clear()
