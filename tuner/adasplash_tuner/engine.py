"""Opening the database: one engine a process, the pragmas, the schema, and every fault as a StoreError that says how to mend it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from typing import Literal
from urllib.parse import quote

from sqlalchemy import Engine, create_engine, event, inspect, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from adasplash_core.errors import StoreError
from adasplash_tuner.location import DATABASE_VARIABLE, Location
from adasplash_tuner.models import SCHEMA_VERSION, Base, Meta

Mode = Literal["write", "read", "immutable"]

_ELSEWHERE = f"or set {DATABASE_VARIABLE} to another place"
_SCHEMA_LOCK = 0x_AD_A5_91_A5  # PostgreSQL's advisory lock under which the schema is made

_SQLITE_FAULTS = {
    sqlite3.SQLITE_BUSY: ("is locked by another process", f"Wait for that process to end, {_ELSEWHERE}."),
    sqlite3.SQLITE_LOCKED: ("is locked by another process", f"Wait for that process to end, {_ELSEWHERE}."),
    sqlite3.SQLITE_PROTOCOL: ("is on a file system whose locks do not work", f"Move it to a local disk, {_ELSEWHERE}."),
    sqlite3.SQLITE_READONLY: ("cannot be written: the file or its folder is read-only", f"Make it writable, {_ELSEWHERE}."),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", f"Check that its folder exists and is accessible, {_ELSEWHERE}."),
    sqlite3.SQLITE_PERM: ("cannot be opened: access is denied", f"Check its permissions, {_ELSEWHERE}."),
    sqlite3.SQLITE_FULL: (
        "cannot be written: the disk is full",
        f"Free some space (`adasplash cache prune` may help), {_ELSEWHERE}.",
    ),
    sqlite3.SQLITE_IOERR: (
        "cannot be read or written: the disk reports an error",
        f"Check free space and the disk, {_ELSEWHERE}.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "is corrupt",
        "Run `adasplash cache mend`: it sets the file aside and keeps every row that can still be read.",
    ),
    sqlite3.SQLITE_NOTADB: ("is not a SQLite database", f"Run `adasplash cache mend` to set the file aside, {_ELSEWHERE}."),
}


class EngineFactory:
    """The engines of one database. An engine is never shared with a forked child: connections do not survive a fork."""

    def __init__(self, location: Location, busy_timeout_s: float) -> None:
        self.location = location
        self.busy_timeout_s = busy_timeout_s
        self._engines: dict[tuple[int, Mode], Engine] = {}
        self._lock = threading.Lock()
        self._ready_in: int | None = None  # the process that has seen the schema
        self._read_mode: Mode = "read"

    def _engine(self, mode: Mode) -> Engine:
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
        query = {"write": "mode=rwc", "read": "mode=ro", "immutable": "mode=ro&immutable=1"}[mode]
        uri = f"file:{quote(str(self.location.path))}?{query}"

        def connect() -> sqlite3.Connection:
            # isolation_level None: transactions are begun below, as pysqlite would begin them late and not around DDL
            connection = sqlite3.connect(
                uri, uri=True, timeout=self.busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            if mode == "write":
                try:
                    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                        connection.execute(f"PRAGMA {pragma}")
                except sqlite3.Error:
                    connection.close()
                    raise
            return connection

        engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
        begin = "BEGIN IMMEDIATE" if mode == "write" else "BEGIN"  # a writer that starts as a reader can deadlock
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that commits at the end. Makes the file and the tables if they are not there.

        Raises
        ------
        StoreError: whatever the database's fault is, with how to mend it.
        """
        with self._faults():
            if self._ready_in != os.getpid():
                self._prepare()
                self._ready_in = os.getpid()
            with Session(self._engine("write"), expire_on_commit=False) as session, session.begin():
                yield session

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session | None]:
        """A session for reading, or None where there is no database yet. Never makes a file. Raises StoreError as :meth:`writing`.

        SQLite's readers write, too: a WAL database needs its ``-shm`` file. Where that cannot be made (a read-only mount, a full disk)
        the file is read as immutable, which misses only what no writer has checkpointed yet.
        """
        if not self.location.exists():
            yield None
            return
        with self._faults(), self._open_reader() as session:
            yield session if self._check_schema(session) else None

    def check_writable(self) -> None:
        """Open for writing, and write. Raises StoreError as :meth:`writing`, before a tuner has spent minutes on measuring."""
        with self.writing() as session:
            session.merge(Meta(name="schema_version", value=str(SCHEMA_VERSION)))

    def _open_reader(self) -> Session:
        if self.location.path is None:
            return Session(self._engine("read"))
        for mode in ("read", "immutable") if self._read_mode == "read" else ("immutable",):
            session = Session(self._engine(mode))
            try:
                session.execute(text("SELECT count(*) FROM sqlite_master"))
            except DBAPIError as error:
                session.close()
                unwritable = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)
                if mode == "immutable" or sqlite_code(error) not in unwritable:
                    raise
            else:
                self._read_mode = mode
                return session
        raise AssertionError("unreachable: the last mode raises")

    def _check_schema(self, session: Session) -> bool:
        """Whether there are tables to read. Raises StoreError for a schema this code does not know."""
        if not inspect(session.connection()).has_table(Meta.__tablename__):
            return False
        value = session.scalar(select(Meta.value).where(Meta.name == "schema_version"))
        if value is None or not value.isdecimal():
            raise StoreError(str(self.location), f"has no readable schema version ({value!r})", "Run `adasplash cache mend`.")
        if int(value) > SCHEMA_VERSION:
            raise StoreError(
                str(self.location),
                f"has schema {value}, written by a newer adasplash-core (this one knows up to {SCHEMA_VERSION}), and is left alone",
                f"Upgrade adasplash-core, {_ELSEWHERE}.",
            )
        return True

    def _prepare(self) -> None:
        """Make folder, file and tables. Many processes may do this at once: the first transaction wins, the others see its tables."""
        if self.location.path is not None:
            self.location.path.parent.mkdir(parents=True, exist_ok=True)
        with Session(self._engine("write")) as session, session.begin():
            if session.get_bind().dialect.name == "postgresql":
                session.execute(text(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})"))
            if not self._check_schema(session):
                Base.metadata.create_all(session.connection())
                session.merge(Meta(name="schema_version", value=str(SCHEMA_VERSION)))

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise self.fault(error) from error
        except OSError as error:
            raise StoreError(str(self.location), f"cannot be used ({error.strerror})", f"Mend that, {_ELSEWHERE}.") from error

    def fault(self, error: Exception) -> StoreError:
        """What is wrong, in words, and how to mend it."""
        code = sqlite_code(error)
        path = self.location.path
        if code == sqlite3.SQLITE_CANTOPEN and path is not None and path.exists() and not os.access(path.parent, os.W_OK):
            code = sqlite3.SQLITE_READONLY  # what could not be opened is the -wal file that belongs beside it
        if code in _SQLITE_FAULTS:
            problem, mend = _SQLITE_FAULTS[code]
            return StoreError(str(self.location), problem, mend)
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        return StoreError(str(self.location), f"answered: {said}", f"Run `adasplash cache verify`, {_ELSEWHERE}.")

    def dispose(self) -> None:
        with self._lock:
            for (pid, _), engine in self._engines.items():
                if pid == os.getpid():
                    engine.dispose()
            self._engines.clear()
            self._ready_in = None


def sqlite_code(error: Exception) -> int | None:
    """SQLite's primary result code, or None if the error is not SQLite's."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF
