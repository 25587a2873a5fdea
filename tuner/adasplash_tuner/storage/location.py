"""Where the tuned configs are and what may be done with them. Imports no SQLAlchemy: a machine never tuned pays nothing for asking.

``ADASPLASH_DB`` is a SQLAlchemy URL of SQLite or PostgreSQL, or a path: of a SQLite file, or (``*.json``) of a snapshot that
``adasplash cache export`` wrote. The default is ``tuned.db`` in the user's data folder. ``ADASPLASH_CACHE_MODE`` says how it is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from adasplash_core.errors import ArgumentError, StoreError

DATABASE_VARIABLE = "ADASPLASH_DB"
MODE_VARIABLE = "ADASPLASH_CACHE_MODE"

_HELP = f"Set {DATABASE_VARIABLE} to a file path, sqlite:///FILE, or postgresql://USER@HOST/NAME."
_HOMELESS = f"Set HOME, or {DATABASE_VARIABLE} to a path."


class CacheMode(StrEnum):
    """What a process may do with tuned configs."""

    READWRITE = "readwrite"
    READ = "read"  # looked up, never written: no tuning, no upgrade, no quarantine
    FROZEN = "frozen"  # as READ, and only what was measured for exactly this key, all of it read at once
    OFF = "off"  # every backend's heuristic

    @property
    def writes(self) -> bool:
        return self is CacheMode.READWRITE


def cache_mode() -> CacheMode:
    """The mode that ``ADASPLASH_CACHE_MODE`` names; ``readwrite`` if it is unset or empty.

    Raises
    ------
    ArgumentError: for another value.
    """
    value = os.environ.get(MODE_VARIABLE, "").strip().lower()
    try:
        return CacheMode(value or "readwrite")
    except ValueError as error:
        modes = ", ".join(mode.value for mode in CacheMode)
        raise ArgumentError(f"{MODE_VARIABLE} must be one of {modes}.", seen=repr(value)) from error


@dataclass(frozen=True, slots=True)
class Location:
    """A SQLite file or a snapshot (``path``), or the URL of a PostgreSQL database (``path`` None). ``str()`` hides the password."""

    url: str
    path: Path | None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        scheme, _, rest = self.url.partition("://")
        credentials, at, host = rest.rpartition("@")
        user = credentials.partition(":")[0]
        return f"{scheme}://{user}{at}{host.partition('?')[0]}"

    @property
    def is_snapshot(self) -> bool:
        """Whether this is a JSON document, which is read whole and never written: it needs no locks, so any file system will do."""
        return self.path is not None and self.path.suffix == ".json"

    def exists(self) -> bool:
        """Whether a look-up can find anything: a file that is not there is simply a miss."""
        return self.path is None or self.path.exists()

    def require_writable(self) -> None:
        """Raises StoreError where the mode or the kind of location forbids writing."""
        mode = cache_mode()
        if not mode.writes:
            raise StoreError(
                str(self),
                f"is not written while {MODE_VARIABLE} is {mode.value!r}",
                f"Unset {MODE_VARIABLE} to tune or change it.",
            )
        if self.is_snapshot:
            raise StoreError(
                str(self),
                "is a snapshot, which is only read",
                f"Set {DATABASE_VARIABLE} to a database; `adasplash cache import` takes a snapshot into one.",
            )


def locate(value: str | os.PathLike[str] | None = None) -> Location:
    """The database named by ``value``, else by ``ADASPLASH_DB``, else the default.

    Raises
    ------
    StoreError: for a URL of another database, one without a file, or a home directory that cannot be found.
    """
    text = os.fspath(value) if value is not None else os.environ.get(DATABASE_VARIABLE, "")
    if not text:
        return _file(default_path())
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _file(_expanded(text))
    dialect = scheme.partition("+")[0]
    if dialect == "sqlite":
        name = rest.removeprefix("/").partition("?")[0]
        if not name or name == ":memory:":
            raise StoreError(text, "names no file, and tuning results must outlive the process", _HELP)
        return _file(_expanded(name))
    if dialect in ("postgresql", "postgres"):
        driver = "+psycopg" if "+" not in scheme else "+" + scheme.partition("+")[2]
        return Location(f"postgresql{driver}://{rest}", None)
    raise StoreError(f"{scheme}://...", "is of a kind that is not supported", _HELP)


def default_path() -> Path:
    """``tuned.db`` in the user's data folder. Raises StoreError if nothing says where that is."""
    import platformdirs

    try:
        folder = Path(platformdirs.user_data_dir("adasplash", appauthor=False))
    except RuntimeError:  # newer versions say so, older ones leave "~" as it is
        folder = Path("~")
    if not folder.is_absolute():
        raise StoreError("in the user's data folder", "has no place: this user has no home directory", _HOMELESS)
    return folder / "tuned.db"


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise StoreError(name, f"cannot be found ({error})", f"Set {DATABASE_VARIABLE} to an absolute path.") from error


def _file(path: Path) -> Location:
    path = path.absolute()
    return Location(f"sqlite:///{path}", path)
