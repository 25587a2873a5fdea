"""Where the database of tuned configs is. Imports no SQLAlchemy, so that a machine that was never tuned pays nothing for asking.

``ADASPLASH_DB`` is a SQLAlchemy URL of SQLite or PostgreSQL, or the path of a SQLite file; the default is
``tuned.db`` in the user's data folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adasplash_core.errors import StoreError

DATABASE_VARIABLE = "ADASPLASH_DB"

_HELP = f"Set {DATABASE_VARIABLE} to a file path, sqlite:///FILE, or postgresql://USER@HOST/NAME."


@dataclass(frozen=True, slots=True)
class Location:
    """A SQLite file (``path``) or the URL of a PostgreSQL database (``path`` None). ``str()`` hides the password."""

    url: str
    path: Path | None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        scheme, _, rest = self.url.partition("://")
        credentials, at, host = rest.rpartition("@")
        user = credentials.partition(":")[0]
        return f"{scheme}://{user}{at}{host.partition('?')[0]}"

    def exists(self) -> bool:
        """Whether a look-up can find anything: a SQLite file that is not there is simply a miss."""
        return self.path is None or self.path.exists()


def locate(value: str | os.PathLike[str] | None = None) -> Location:
    """The database named by ``value``, else by ``ADASPLASH_DB``, else the default.

    Raises
    ------
    StoreError: for a URL of another database, or one without a file.
    """
    text = os.fspath(value) if value is not None else os.environ.get(DATABASE_VARIABLE, "")
    if not text:
        return _file(default_path())
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _file(Path(text).expanduser())
    dialect = scheme.partition("+")[0]
    if dialect == "sqlite":
        name = rest.removeprefix("/").partition("?")[0]
        if not name or name == ":memory:":
            raise StoreError(text, "names no file, and tuning results must outlive the process", _HELP)
        return _file(Path(name).expanduser())
    if dialect in ("postgresql", "postgres"):
        driver = "+psycopg" if "+" not in scheme else "+" + scheme.partition("+")[2]
        return Location(f"postgresql{driver}://{rest}", None)
    raise StoreError(f"{scheme}://...", "is of a kind that is not supported", _HELP)


def default_path() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("adasplash", appauthor=False)) / "tuned.db"


def _file(path: Path) -> Location:
    path = path.absolute()
    return Location(f"sqlite:///{path}", path)
