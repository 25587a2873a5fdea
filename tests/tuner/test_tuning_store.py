"""The database: what replaces what, what is kept, and what a row that was edited to nonsense becomes."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from adasplash_core.errors import StoreError
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.storage.location import DATABASE_VARIABLE, locate
from adasplash_tuner.storage.records import Measurement
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, H200, SPEC, FakeBackend, record


def measurement(block_n: int = 128, **changes: object) -> Measurement:
    values = {
        "config": {"block_n": block_n},
        "shape": "s",
        "inputs": "i",
        "stage": "screening",
        "status": "ok",
        "measured_at": 1,
        "version": "1",
    }
    return Measurement(**(values | changes))  # type: ignore[arg-type]


def stored(store: TuningStore) -> list[object]:
    return [row.record for row in store.rows()]


def test_what_was_published_is_read_back_whole(store: TuningStore) -> None:
    best = record()
    assert store.publish(best)
    assert stored(store) == [best]
    assert stored(TuningStore(store.location)) == [best]


def test_reading_never_makes_a_file(store: TuningStore, database: Path, key: TuningKey) -> None:
    assert store.rows() == []
    assert store.measurements(key) == []
    assert store.counts() == {"keys": 0, "best": 0, "quarantined": 0, "measurements": 0}
    assert not database.exists()


def test_a_file_that_is_deleted_while_a_process_writes_is_made_anew(store: TuningStore, database: Path) -> None:
    store.publish(record())
    for path in database.parent.iterdir():
        path.unlink()
    assert store.publish(record(block_n=32, median_ms=5.0))
    assert stored(store) == [record(block_n=32, median_ms=5.0)]


def test_a_slower_result_does_not_replace_a_faster_one_whatever_the_clock_says(store: TuningStore) -> None:
    store.publish(record(block_n=128, median_ms=1.0, measured_at=2_000_000_000))
    assert not store.publish(record(block_n=64, median_ms=1.1, measured_at=2_100_000_000))
    assert store.publish(record(block_n=32, median_ms=0.9, measured_at=1_000_000_000))
    assert [row.record.config["block_n"] for row in store.rows() if row.record] == [32]


def test_a_result_measured_against_the_stored_one_replaces_it_though_its_time_is_longer(store: TuningStore) -> None:
    store.publish(record(block_n=128, median_ms=1.0))
    verdict = record(block_n=64, median_ms=1.1)  # both were slower today, and 64 won
    assert store.publish(verdict, contested=record(block_n=128).config)
    assert stored(store) == [verdict]


def test_a_result_measured_against_what_another_process_has_replaced_meanwhile_must_be_faster(store: TuningStore) -> None:
    store.publish(record(block_n=256, median_ms=0.8))
    assert not store.publish(record(block_n=64, median_ms=1.1), contested=record(block_n=128).config)


def test_keys_that_differ_in_one_field_are_rows_of_their_own(store: TuningStore) -> None:
    base = record()
    for change in ({"kv_bucket": 1}, {"code_hash": "new"}, {"toolchain": "new"}, {"device_name": H200.name}, {"causal": False}):
        store.publish(replace(base, key=replace(base.key, **change)))
    assert len(store.rows()) == 5


def test_a_quarantined_winner_is_replaced_by_any_result_and_is_not_usable(store: TuningStore) -> None:
    store.publish(record(median_ms=0.1))
    (row,) = store.rows()
    assert store.quarantine(row.id, "does not compile")
    assert store.rows()[0].usable is None
    assert store.publish(record(median_ms=5.0))
    assert store.rows()[0].usable is not None


def test_quarantine_spares_a_winner_that_has_been_replaced_meanwhile(store: TuningStore) -> None:
    store.publish(record(block_n=64))
    assert not store.quarantine(store.rows()[0].id, "does not compile", config={"block_n": 128, "iterations": 8})
    assert store.rows()[0].usable is not None


def test_every_measurement_is_kept_in_order_failures_too(store: TuningStore, key: TuningKey) -> None:
    first = measurement(median_ms=1.0, samples=3, error=1e-3)
    second = measurement(64, status="failed", note="out of shared memory")
    third = measurement(median_ms=0.5, samples=9, error=1e-3, stage="final")
    for m in (first, second, third):
        store.add_measurement(key, m)
    store.add_measurement(replace(key, code_hash="other"), measurement(median_ms=9.0))
    assert store.measurements(key) == [first, second, third]
    assert store.measurements(key, shape="another") == []


def test_merging_takes_only_what_is_faster(store: TuningStore) -> None:
    store.publish(record(median_ms=1.0))
    other = replace(record(), key=replace(record().key, kv_bucket=1024))
    assert store.merge([record(block_n=64, median_ms=2.0), other]) == 1
    assert {row.record.config["block_n"] for row in store.rows() if row.record} == {128}
    assert store.merge([record(block_n=32, median_ms=0.5), other]) == 1


def test_deleting_a_key_deletes_its_winner_and_measurements_and_no_others(store: TuningStore, key: TuningKey) -> None:
    store.publish(record())
    store.add_measurement(key, measurement())
    kept = replace(record(), key=replace(key, kv_bucket=1024))
    store.publish(kept)
    gone = next(row.id for row in store.rows() if row.record and row.record.key == key)
    assert store.delete([gone]) == 1
    assert store.counts() == {"keys": 1, "best": 1, "quarantined": 0, "measurements": 0}
    assert stored(store) == [kept]


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("UPDATE adasplash_best SET config = '{\"block_n\": '", "not JSON"),
        ("UPDATE adasplash_best SET config = '[1, 2]'", "must be an object"),
        ("UPDATE adasplash_best SET config = '{\"a b\": 1}'", "field named"),
        ("UPDATE adasplash_best SET config = '{\"block_n\": [1]}'", "block_n must be a number"),
        ("UPDATE adasplash_best SET median_ms = 'fast'", "median_ms must be a finite number"),
        ("UPDATE adasplash_best SET median_ms = -1.0", "median_ms must be a finite number"),
        ("UPDATE adasplash_best SET measured_at = 'yesterday'", "measured_at must be an integer"),
        ("UPDATE adasplash_best SET config = x'00ff'", "config must be an object"),
        ("UPDATE adasplash_keys SET head_dim = 'wide'", "key.head_dim must be int"),
        ("UPDATE adasplash_keys SET pass_ = 'sideways'", "key.pass_ must be forward or backward"),
    ],
)
def test_a_row_edited_to_nonsense_is_reported_and_spares_the_others(
    store: TuningStore, database: Path, statement: str, complaint: str
) -> None:
    store.publish(record())
    untouched = replace(record(), key=replace(record().key, kv_bucket=1024))
    store.publish(untouched)
    condition = "id = 1" if "_keys" in statement else "key_id = 1"
    with sqlite3.connect(database) as connection:
        connection.execute(f"{statement} WHERE {condition}")
    broken, fine = store.rows()
    assert broken.usable is None
    assert complaint in broken.problem
    assert fine.record == untouched


def test_the_table_refuses_nulls_in_the_key(store: TuningStore, database: Path) -> None:
    store.publish(record())
    with sqlite3.connect(database) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("UPDATE adasplash_keys SET capability = NULL")


@pytest.mark.parametrize("value", ["{path}", "sqlite:///{path}", "sqlite+pysqlite:///{path}"])
def test_the_variable_takes_a_path_or_a_sqlite_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    path = tmp_path / "with space & ?mark" / "tuned.db" if value == "{path}" else tmp_path / "tuned.db"
    monkeypatch.setenv(DATABASE_VARIABLE, value.format(path=path))
    store = TuningStore()
    store.publish(record())
    assert store.location.path == path
    assert path.exists()
    assert len(TuningStore().rows()) == 1


def test_a_postgresql_url_gets_the_installed_driver_and_hides_its_password() -> None:
    location = locate("postgresql://ada:secret@db.example/tuned")
    assert location.url == "postgresql+psycopg://ada:secret@db.example/tuned"
    assert str(location) == "postgresql+psycopg://ada@db.example/tuned"
    assert "secret" not in str(location)


@pytest.mark.parametrize("value", ["mysql://host/db", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused_with_what_is_accepted(value: str) -> None:
    with pytest.raises(StoreError, match=r"Set ADASPLASH_DB to a file path, sqlite:///FILE, or postgresql://"):
        locate(value)


def test_rows_of_a_problem_come_from_every_machine_and_code(store: TuningStore) -> None:
    keys = [tuning_key(FakeBackend(code=code), SPEC, device, "forward") for code in ("old", "new") for device in (H100, H200)]
    for k in keys:
        store.publish(record(k))
    store.publish(record(tuning_key(FakeBackend(), SPEC, H100, "backward")))
    found = store.rows_for_problem(keys[0])
    assert {row.record.key for row in found if row.record} == set(keys)
