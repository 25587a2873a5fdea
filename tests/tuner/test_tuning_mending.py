"""What ``adasplash cache mend`` does: a damaged file is set aside, and what can be read of it is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adasplash_core.errors import ArgumentError, StoreError
from adasplash_tuner.storage import upkeep
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import record


def test_mending_sets_the_file_aside_and_starts_a_new_one(database: Path, store: TuningStore) -> None:
    database.parent.mkdir()
    database.write_bytes(b"nonsense" * 1000)
    mended = upkeep.mend(store)
    assert mended.saved == 0
    assert mended.set_aside.read_bytes() == b"nonsense" * 1000
    assert store.publish(record())
    assert len(store.rows()) == 1


def damaged(store: TuningStore, database: Path, content: bytes, page: int) -> bool:
    """Spoil one page; whether that hits rows rather than an index that a look-up does not read."""
    database.write_bytes(content[: page * 4096] + b"\xa5" * 4096 + content[(page + 1) * 4096 :])
    try:
        store.rows()
    except StoreError as error:
        return "is corrupt" in str(error)
    return False


def test_mending_saves_the_rows_that_can_be_read(database: Path, store: TuningStore) -> None:
    store.merge(replace(record(), key=replace(record().key, kv_bucket=number)) for number in range(120))
    content = database.read_bytes()
    pages = len(content) // 4096
    assert any(damaged(store, database, content, page) for page in range(pages // 2, pages)), "no page holds rows"
    mended = upkeep.mend(store)
    assert 60 < mended.saved < 120
    assert len(store.rows()) == mended.saved
    assert store.integrity_problems() == []


def test_there_must_be_a_file_to_mend(store: TuningStore) -> None:
    with pytest.raises(ArgumentError, match="does not exist"):
        upkeep.mend(store)
