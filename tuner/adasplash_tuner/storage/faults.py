"""What can be wrong with a database, as a StoreError that says how to mend it. Imports no SQLAlchemy."""

from __future__ import annotations

import os
import sqlite3

from adasplash_core.errors import StoreError
from adasplash_tuner.storage.location import DATABASE_VARIABLE, Location

_ELSEWHERE = f"or set {DATABASE_VARIABLE} to another place"
_LOCKED = (
    "is locked by another process, or on a file system whose locks do not work",
    f"Wait for that process to end, {_ELSEWHERE}.",
)

_SQLITE_FAULTS = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
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
        f"Check free space, the disk, and that its file system has locks, {_ELSEWHERE}.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "is corrupt",
        "Run `adasplash cache mend`: it sets the file aside and keeps every row that can still be read.",
    ),
    sqlite3.SQLITE_NOTADB: ("is not a SQLite database", f"Run `adasplash cache mend` to set the file aside, {_ELSEWHERE}."),
}


def sqlite_code(error: BaseException) -> int | None:
    """SQLite's primary result code, or None if the error is not SQLite's. SQLAlchemy's errors carry the driver's as ``orig``."""
    code = getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def fault(location: Location, error: Exception) -> StoreError:
    """What is wrong, in words, and how to mend it."""
    if isinstance(error, OSError):
        return StoreError(str(location), f"cannot be used ({error.strerror})", f"Mend that, {_ELSEWHERE}.")
    code, path = sqlite_code(error), location.path
    if code == sqlite3.SQLITE_CANTOPEN and path is not None and path.exists() and not os.access(path.parent, os.W_OK):
        code = sqlite3.SQLITE_READONLY  # what could not be opened is the -wal file that belongs beside it
    if code in _SQLITE_FAULTS:
        problem, mend = _SQLITE_FAULTS[code]
        return StoreError(str(location), problem, mend)
    cause = getattr(error, "orig", None) or error
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return StoreError(str(location), f"answered: {said}", f"Run `adasplash cache verify`, {_ELSEWHERE}.")
