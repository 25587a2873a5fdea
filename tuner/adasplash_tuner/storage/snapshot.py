"""Tuned configs in memory, asked as the store is: exported snapshots, the files shipped with the package, a frozen database.

Imports no SQLAlchemy. Records of a file are parsed when they are asked for, since a call needs two of them and a file holds hundreds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasplash_core.configs import warn_once
from adasplash_core.errors import ArgumentError, StoreError
from adasplash_tuner.key import TuningKey, nearest, problem_fields
from adasplash_tuner.storage.exchange import load_document, read_bytes
from adasplash_tuner.storage.location import DATABASE_VARIABLE, Location, locate
from adasplash_tuner.storage.records import Measurement, RecordError, Row, parse_best

if TYPE_CHECKING:
    from adasplash_tuner.storage.store import TuningStore

_INDEX = ("backend", "pass_", "dtype", "head_dim")


def open_source(location: Location | None = None) -> TuningStore | Snapshot:
    """What is at a location (by default the one that the environment names), to be read. Raises StoreError if it cannot be."""
    location = locate() if location is None else location
    if location.is_snapshot:
        return Snapshot.load(location)
    from adasplash_tuner.storage.store import TuningStore

    return TuningStore(location)


class Snapshot:
    """Winners that do not change while the process lives.

    Parameters
    ----------
    location: where they are from, for a person.
    entries: rows, or the untrusted records of a document.
    digest: SHA-256 of the document (12 hex digits), by which processes can see that they have the same.
    """

    def __init__(self, location: Location | str, entries: Iterable[Row | Any], digest: str = "") -> None:
        self.location, self.digest = location, digest
        self._entries = list(entries)
        self._index: dict[tuple[object, ...], list[int]] = {}
        for number, entry in enumerate(self._entries):
            if (place := _place(entry)) is not None:
                self._index.setdefault(place, []).append(number)

    @classmethod
    def load(cls, location: Location) -> Snapshot:
        """The snapshot in a file. Raises StoreError if it is not there, or is no document of tuned configs."""
        assert location.path is not None
        try:
            content = read_bytes(location.path)
            entries = load_document(content, location.path)
        except ArgumentError as error:
            help_ = f"Export it again, or set {DATABASE_VARIABLE} to another place."
            raise StoreError(str(location), f"cannot be read as a snapshot ({error.seen})", help_) from error
        return cls(location, entries, hashlib.sha256(content).hexdigest()[:12])

    def rows(self) -> list[Row]:
        """All winners, those that do not parse included."""
        return [self._row(number) for number in range(len(self._entries))]

    def row(self, id_: int) -> Row | None:
        return next((row for row in self.rows() if row.id == id_), None)

    def rows_for_problem(self, key: TuningKey, alpha_classes: Sequence[str] = ()) -> list[Row]:
        """As :meth:`TuningStore.rows_for_problem <adasplash_tuner.storage.store.TuningStore.rows_for_problem>`."""
        names = problem_fields(key)
        alphas = alpha_classes or (key.alpha_class,)
        rows = [self._row(number) for number in self._index.get(tuple(getattr(key, n) for n in _INDEX), ())]
        return [r for r in rows if r.record is None or (r.record.key.alpha_class in alphas and r.record.key.same(key, names))]

    def nearest(self, key: TuningKey, limit: int = 3) -> list[Row]:
        """As :meth:`TuningStore.nearest <adasplash_tuner.storage.store.TuningStore.nearest>`."""
        rows = (row for row in self.rows() if row.usable is not None)
        return nearest(key, (r for r in rows if r.record is not None and r.record.key.same(key, ("backend", "pass_"))), limit)

    def measurements(self, _key: TuningKey) -> list[Measurement]:
        """None: a snapshot holds winners only."""
        return []

    def counts(self) -> dict[str, int]:
        rows = self.rows()
        quarantined = sum(row.usable is None for row in rows)
        return {"keys": len(rows), "best": len(rows), "quarantined": quarantined, "measurements": 0}

    def integrity_problems(self) -> list[str]:
        """None: a document that is damaged cannot be loaded."""
        return []

    def _row(self, number: int) -> Row:
        entry = self._entries[number]
        if not isinstance(entry, Row):
            entry = self._entries[number] = _parsed(entry, number + 1)
        return entry


def _parsed(values: Any, id_: int) -> Row:
    try:
        if not isinstance(values, Mapping):
            raise RecordError(f"the record must be an object, got {type(values).__name__}")
        record = parse_best(values)
    except RecordError as error:
        return Row(id_, f"record {id_}", None, str(error))
    return Row(id_, record.key.readable(), record)


def _place(entry: Row | Any) -> tuple[object, ...] | None:
    """Where an entry belongs in the index, None where no key can ask for it."""
    if isinstance(entry, Row):
        return None if entry.record is None else tuple(getattr(entry.record.key, n) for n in _INDEX)
    key = entry.get("key") if isinstance(entry, Mapping) else None
    if not isinstance(key, Mapping):
        return None
    place = tuple(key.get(n) for n in _INDEX)
    return place if all(isinstance(part, (str, int)) for part in place) else None


@cache
def shipped(folder: Path | None = None) -> Snapshot:
    """The configs shipped with the package; a file that is no document of tuned configs is passed over with a warning."""
    root = Path(__file__).parents[1] / "pretuned" if folder is None else folder
    entries: list[Any] = []
    if root.is_dir():
        for entry in sorted(root.iterdir(), key=lambda e: e.name):
            if entry.name.endswith(".json"):
                try:
                    entries += load_document(entry.read_bytes(), entry)
                except ArgumentError as error:
                    warn_once(f"A shipped file of tuned configs is passed over. {error}")
    return Snapshot("the package", entries)
