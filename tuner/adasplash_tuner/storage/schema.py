"""Which schema a database has, and what this code may do with it. Imports no SQLAlchemy; ``upgrade`` changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from adasplash_core.errors import StoreError
from adasplash_tuner.storage.location import DATABASE_VARIABLE, Location

SCHEMA_VERSION = 1
READABLE_FROM = 1
"""The oldest schema whose code can still read a database of this one. Nothing but a change of what is there raises it."""

META_TABLE = "adasplash_meta"
REVISION_TABLE = "adasplash_revision"  # Alembic's

Ask = Callable[[str], Iterable[Any]]
"""Runs a query without arguments on some connection and returns its rows."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema that a database has.

    ``readable_from``: the oldest schema whose code can read it. ``stamped``: whether Alembic's table says which it is.
    """

    version: int
    readable_from: int
    stamped: bool

    @property
    def is_older(self) -> bool:
        return self.version < SCHEMA_VERSION

    def require_readable(self, location: Location) -> None:
        """Raises StoreError for a schema that this code cannot read."""
        if self.readable_from > SCHEMA_VERSION:
            raise self._newer(location, "is left alone")

    def require_writable(self, location: Location) -> None:
        """Raises StoreError for a newer schema: what this code would write might lack what that one needs."""
        self.require_readable(location)
        if self.version > SCHEMA_VERSION:
            raise self._newer(location, "is only read")

    def _newer(self, location: Location, so: str) -> StoreError:
        return StoreError(
            str(location),
            f"has schema {self.version}, written by a newer adasplash-core (this one knows up to {SCHEMA_VERSION}), and {so}",
            f"Upgrade adasplash-core, or set {DATABASE_VARIABLE} to another place.",
        )


def read_schema(ask: Ask, location: Location) -> Schema | None:
    """The schema of a database, None if it has no tables. Raises StoreError if it does not say which."""
    if not _has_table(ask, META_TABLE, location):
        return None
    facts = {str(name): str(value) for name, value in ask(f"SELECT name, value FROM {META_TABLE}")}
    version = facts.get("schema_version", "")
    readable_from = facts.get("readable_from", version)
    if not (version.isdecimal() and readable_from.isdecimal()):
        raise StoreError(str(location), f"has no readable schema version ({version!r})", "Run `adasplash cache mend`.")
    return Schema(int(version), int(readable_from), _has_table(ask, REVISION_TABLE, location))


def _has_table(ask: Ask, name: str, location: Location) -> bool:
    if location.path is None:  # not to_regclass(), which may remember that a table was not there before another process made it
        return any(
            ask(f"SELECT 1 FROM pg_catalog.pg_tables WHERE schemaname = ANY (current_schemas(false)) AND tablename = '{name}'")
        )
    return any(ask(f"SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{name}'"))
