"""Making the tables, and upgrading older ones by Alembic after a copy of the file was put aside. Imports Alembic for an upgrade only.

A database without Alembic's table was made before there was one, with schema 1, and is stamped.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, delete, insert

from adasplash_core.errors import StoreError
from adasplash_tuner.storage.location import Location
from adasplash_tuner.storage.models import META, REVISION, metadata
from adasplash_tuner.storage.schema import READABLE_FROM, SCHEMA_VERSION, Schema, read_schema
from adasplash_tuner.storage.sqlite_file import connect

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x_AD_A5_91_A5  # PostgreSQL's advisory lock under which the schema is made; SQLite's writers have one lock anyway


def schema_of(connection: Connection, location: Location) -> Schema | None:
    """As :func:`~adasplash_tuner.storage.schema.read_schema`."""
    return read_schema(connection.exec_driver_sql, location)


def bring_up_to_date(connection: Connection, location: Location) -> None:
    """Make the tables, or upgrade them, inside the connection's transaction. A SQLite file is copied before an upgrade.

    Raises
    ------
    StoreError: for a newer schema, or if the copy cannot be made, or Alembic does not know the way; nothing is changed then.
    """
    if location.path is None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    found = schema_of(connection, location)
    if found is None:
        metadata.create_all(connection)  # what the migrations would make, which a test compares
        _stamp(connection, SCHEMA_VERSION)
        _declare(connection)
        return
    found.require_writable(location)
    if not found.stamped:
        REVISION.create(connection)
        _stamp(connection, found.version)
    if found.is_older:
        if location.path is not None:
            copy_aside(location.path, found.version)
        migrate(connection, location)
        _declare(connection)


def copy_aside(path: Path, version: int) -> Path:
    """A whole copy of a SQLite file beside it, what its WAL holds included; replaces an earlier copy of the same schema."""
    kept = path.with_name(f"{path.name}.schema-{version}")
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        with closing(connect(path, "read")) as source, closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)
        partial.replace(kept)
    finally:
        partial.unlink(missing_ok=True)
    return kept


def migrate(connection: Connection, location: Location) -> None:
    """Run the migrations that the database lacks, inside the connection's transaction."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, f"{SCHEMA_VERSION:04d}")
    except CommandError as error:
        raise StoreError(str(location), f"cannot be upgraded ({error})", "Run `adasplash cache mend`.") from error


def _stamp(connection: Connection, version: int) -> None:
    connection.execute(insert(REVISION).values(version_num=f"{version:04d}"))


def _declare(connection: Connection) -> None:
    """Write what :func:`~adasplash_tuner.storage.schema.read_schema` reads."""
    facts = {"schema_version": SCHEMA_VERSION, "readable_from": READABLE_FROM}
    connection.execute(delete(META).where(META.c.name.in_(facts)))
    connection.execute(insert(META), [{"name": name, "value": str(value)} for name, value in facts.items()])
