"""A database that cannot be used: look-ups go on with defaults and warn once, writers get an error that says how to mend it."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adasplash_core.configs import ConfigLadder, Rung
from adasplash_core.errors import ArgumentError, StoreError
from adasplash_tuner import upkeep
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.store import TuningStore
from tests.tuner.fakes import H100, SPEC, FakeBackend, Warned, record

ROOT = Path(__file__).parents[2]


def rungs(passes: tuple[str, ...] = ("forward", "backward")) -> list[Rung]:
    ladder = ConfigLadder([TunedConfigs()])
    return [ladder.find(FakeBackend(), SPEC, H100, pass_).rung for pass_ in passes]  # type: ignore[arg-type]


def assert_defaults_and_one_warning(warned: Warned, *words: str) -> None:
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    text = warned.the_only_one()
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to have a header" * 100, b"SQLite format 3\0" + b"\xff" * 8000]
)
def test_a_file_that_is_no_database(database: Path, store: TuningStore, warned: Warned, content: bytes) -> None:
    database.parent.mkdir()
    database.write_bytes(content)
    assert_defaults_and_one_warning(warned, "Run `adasplash cache mend`", "default configs")
    with pytest.raises(StoreError, match="adasplash cache mend"):
        store.publish(record())
    assert database.read_bytes() == content  # never overwritten


def test_a_file_damaged_in_the_middle(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    store.engines.dispose()
    content = bytearray(database.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    database.write_bytes(content)
    assert_defaults_and_one_warning(warned, "is corrupt", "Run `adasplash cache mend`")


def test_an_empty_file_is_an_empty_database(database: Path, store: TuningStore, warned: Warned) -> None:
    database.parent.mkdir()
    database.touch()
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert warned == []
    assert store.publish(record())


def test_a_newer_schema_is_left_alone(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE adasplash_meta SET value = '2' WHERE name = 'schema_version'")
    assert_defaults_and_one_warning(warned, "has schema 2", "Upgrade adasplash-core")
    with pytest.raises(StoreError, match="Upgrade adasplash-core"):
        TuningStore().publish(record(block_n=32, median_ms=0.1))
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT config FROM adasplash_best").fetchall() == [('{"block_n":128,"iterations":8}',)]


def test_a_locked_database(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    with sqlite3.connect(database, isolation_level=None) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        holder.execute("UPDATE adasplash_best SET samples = 1")
        assert_defaults_and_one_warning(warned, "is locked by another process")
        with pytest.raises(StoreError, match="locked"):
            TuningStore(busy_timeout_s=0.1).publish(record(median_ms=0.1))
        holder.execute("ROLLBACK")


def test_a_writer_at_work_does_not_hinder_a_lookup(database: Path, store: TuningStore, warned: Warned) -> None:
    store.publish(record())
    store.publish(record(key=record().key))
    with store.engines.writing():
        assert rungs(("forward",)) == [Rung.USER_DATABASE]
    assert warned == []


def test_a_lock_that_passed_is_forgiven(
    database: Path, store: TuningStore, warned: Warned, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(record())
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("UPDATE adasplash_best SET samples = 1")
    provider = TunedConfigs()
    first = provider.find(FakeBackend(), SPEC, H100, "backward")
    assert first is not None
    assert first.rung is Rung.HEURISTIC
    holder.execute("ROLLBACK")
    holder.close()
    monkeypatch.setattr("adasplash_tuner.provider.RETRY_S", 0.0)
    second = provider.find(FakeBackend(), SPEC, H100, "forward")
    assert second is not None
    assert second.rung is Rung.USER_DATABASE


def mounted(folder: Path) -> bool:
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    return mount is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[Path]:
    """A folder that can be mounted read-only by :func:`seal`: root ignores permission bits."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if os.geteuid() == 0 and not mounted(folder):
        pytest.skip("as root a read-only folder needs a mount, which is not allowed here")
    yield folder
    if os.geteuid() == 0:
        subprocess.run(["umount", folder], check=True)
    else:
        folder.chmod(0o755)


def seal(folder: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)


def test_a_read_only_place_is_still_read(read_only_mount: Path, monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setenv("ADASPLASH_DB", str(read_only_mount / "tuned.db"))
    store = TuningStore()
    store.publish(record())
    for leftover in read_only_mount.glob("tuned.db-*"):
        leftover.unlink()
    seal(read_only_mount)
    assert rungs() == [Rung.USER_DATABASE, Rung.HEURISTIC]
    assert warned == []
    with pytest.raises(StoreError, match="read-only"):
        TuningStore().publish(record(median_ms=0.1))


def test_a_place_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "file" / "folder" / "tuned.db"))
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert warned == []
    with pytest.raises(StoreError, match="cannot be used"):
        TuningStore().publish(record())


def run_with_file_limit(code: str, limit: int) -> str:
    """Run code in a process whose files cannot grow beyond ``limit`` bytes, as on a full disk."""

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, cwd=ROOT, preexec_fn=full
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_full_disk_stops_writers_with_a_reason_and_keeps_what_is_there(store: TuningStore, database: Path) -> None:
    store.publish(record())
    said = run_with_file_limit(
        "from adasplash_tuner.store import *; from tests.tuner.fakes import *; from adasplash_core.errors import StoreError\n"
        "try:\n    TuningStore().publish(record(block_n=32, median_ms=0.1))\n"
        "except StoreError as error: print('StoreError', error)",
        limit=1024,
    )
    assert "StoreError" in said
    assert "Free some space" in said or "Check free space" in said
    assert store.rows()[0].record == record()


def test_a_full_disk_does_not_hinder_lookups(store: TuningStore, database: Path) -> None:
    """A reader of a WAL database needs a small file of its own; without room for it the database is read as immutable."""
    store.publish(record())
    store.engines.dispose()
    for leftover in database.parent.glob("tuned.db-*"):
        leftover.unlink()
    said = run_with_file_limit(
        "from adasplash_core.configs import ConfigLadder; from adasplash_tuner.provider import TunedConfigs\n"
        "from tests.tuner.fakes import *\n"
        "print(ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, 'forward').rung.name)",
        limit=1024,
    )
    assert said.strip() == "USER_DATABASE"


def test_a_disk_that_fills_up_while_tuning_does_not_end_the_tuning(store: TuningStore, database: Path) -> None:
    store.publish(record())
    store.engines.dispose()
    limit = database.stat().st_size

    def nearly_full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [
        sys.executable,
        "-m",
        "adasplash_cli.main",
        "tune",
        "--device",
        "cpu",
        "--shapes",
        "H=1,L=512,D=8",
        "--budget",
        "4s",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, preexec_fn=nearly_full)
    assert done.returncode == 1
    assert "Nothing more was kept from the moment the database failed" in done.stderr
    assert "B=1,H=1,L=512,D=8,float32" in done.stdout  # what was measured is shown nevertheless
    assert store.integrity_problems() == []
    assert any(row.record == record() for row in store.rows())


def test_a_postgresql_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setenv("ADASPLASH_DB", "postgresql://ada:secret@127.0.0.1:9/tuned")
    assert rungs() == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert "postgresql+psycopg://ada@127.0.0.1:9/tuned" in warned.the_only_one()
    assert "secret" not in warned.the_only_one()


def test_a_url_of_another_database(monkeypatch: pytest.MonkeyPatch, warned: Warned) -> None:
    monkeypatch.setenv("ADASPLASH_DB", "mysql://host/db")
    assert_defaults_and_one_warning(warned, "Set ADASPLASH_DB to")


def test_many_threads_asking_a_broken_database_give_one_warning(database: Path, warned: Warned) -> None:
    database.parent.mkdir()
    database.write_bytes(b"nonsense" * 1000)
    provider = TunedConfigs()
    threads = [threading.Thread(target=provider.find, args=(FakeBackend(f"b{i}"), SPEC, H100, "forward")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    warned.the_only_one()


# -- mending ----------------------------------------------------------------------------------------------------------------------


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
    for number in range(120):
        store.publish(replace(record(), key=replace(record().key, kv_bucket=number)))
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
