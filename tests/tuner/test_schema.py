"""The schema: what Alembic makes is what the code expects, older databases are upgraded after a copy, newer ones are left alone."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adasplash_cli.main import cli
from adasplash_core.configs import ConfigLadder, FoundConfig, Rung
from adasplash_core.errors import StoreError
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage.models import metadata
from adasplash_tuner.storage.records import Measurement
from adasplash_tuner.storage.schema import SCHEMA_VERSION
from adasplash_tuner.storage.store import TuningStore
from adasplash_tuner.storage.upgrade import copy_aside, migrate
from tests.tuner import releases
from tests.tuner.fakes import H100, SPEC, BlockConfig, FakeBackend, Warned, record

OPEN_AND_WRITE = """
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import record
from dataclasses import replace
store = TuningStore()
store.publish(replace(record(), key=replace(record().key, kv_bucket=int(sys.argv[2]))))
"""


@pytest.fixture
def unversioned(database: Path) -> Path:
    """A database that was made before there was Alembic."""
    database.parent.mkdir()
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript((Path(__file__).parent / "unversioned.sql").read_text())
    return database


def facts(path: Path) -> dict[str, Any]:
    """What a database says of its schema, and how many rows its tables have."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found: dict[str, Any] = dict(connection.execute("SELECT name, value FROM adasplash_meta").fetchall())
        if "adasplash_revision" in tables:
            found["revision"] = connection.execute("SELECT version_num FROM adasplash_revision").fetchall()
        for name in ("keys", "best", "measurements"):
            (found[name],) = connection.execute(f"SELECT count(*) FROM adasplash_{name}").fetchone()
        found["leftovers"] = [name for name in tables if name.startswith("_alembic")]
    return found


def copies(database: Path) -> list[str]:
    return sorted(path.name for path in database.parent.iterdir() if ".schema-" in path.name)


def look_up() -> FoundConfig:
    return ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, "forward")


def test_the_migrations_make_the_tables_that_the_code_expects(store: TuningStore, database: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine

    with create_engine("sqlite://").begin() as connection:
        migrate(connection, store.location)
        context = MigrationContext.configure(connection, opts={"version_table": "adasplash_revision"})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == f"{SCHEMA_VERSION:04d}"
        migrated = dict(connection.exec_driver_sql("SELECT name, sql FROM sqlite_master").all())
    store.publish(record())
    with closing(sqlite3.connect(database)) as made:
        assert dict(made.execute("SELECT name, sql FROM sqlite_master").fetchall()) == migrated


def test_a_new_database_says_which_schema_it_has(store: TuningStore, database: Path) -> None:
    store.publish(record())
    found = facts(database)
    assert (found["schema_version"], found["readable_from"], found["revision"]) == ("1", "1", [("0001",)])
    assert copies(database) == []


def test_a_database_from_before_alembic_is_read_as_it_is_and_stamped_when_written(unversioned: Path) -> None:
    assert look_up().config == BlockConfig(128, 8)
    assert "revision" not in facts(unversioned)
    store = TuningStore()
    assert [row.usable is not None for row in store.rows()] == [True, False]
    assert [m.config["block_n"] for m in store.measurements(record().key)] == [128, 512]
    assert store.publish(record(block_n=32, median_ms=0.5))
    found = facts(unversioned)
    assert (found["schema_version"], found["revision"]) == ("1", [("0001",)])
    assert (found["keys"], found["best"], found["measurements"]) == (2, 2, 2)
    assert copies(unversioned) == []  # nothing was changed that would need one


def test_an_upgrade_keeps_every_row_and_puts_a_copy_aside(unversioned: Path, tmp_path: Path) -> None:
    later = releases.later_release(tmp_path)
    # A winner that only the journal holds: a copy of the file alone would lack it.
    with closing(sqlite3.connect(unversioned)) as reader, closing(sqlite3.connect(unversioned)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        reader.execute("SELECT count(*) FROM adasplash_best").fetchone()
        writer.execute("UPDATE adasplash_best SET samples = 77 WHERE key_id = 1")
        writer.commit()
        releases.run(later, OPEN_AND_WRITE, "1024")
    found = facts(unversioned)
    assert (found["schema_version"], found["readable_from"], found["revision"]) == ("2", "1", [("0002",)])
    assert (found["keys"], found["best"], found["measurements"], found["leftovers"]) == (2, 2, 2, [])
    assert copies(unversioned) == ["tuned.db.schema-1"]
    copy = unversioned.with_name("tuned.db.schema-1")
    before = facts(copy)
    assert (before["schema_version"], before["keys"], before["best"], before["measurements"]) == ("1", 2, 2, 2)
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT samples FROM adasplash_best ORDER BY key_id").fetchone() == (77,)
    # Nothing is done twice, and the copy is a database that this release takes as its own.
    content = copy.read_bytes()
    releases.run(later, OPEN_AND_WRITE, "2048")
    assert copy.read_bytes() == content
    assert len(TuningStore(str(copy)).rows()) == 2


def test_looking_up_upgrades_too(unversioned: Path, tmp_path: Path) -> None:
    code = (
        "from adasplash_core.configs import ConfigLadder; from adasplash_tuner.provider import TunedConfigs\n"
        "from tests.tuner.fakes import *\n"
        "print(ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, 'forward').rung.name)"
    )
    assert releases.run(releases.later_release(tmp_path), code).strip() == "USER_DATABASE"
    assert facts(unversioned)["schema_version"] == "2"


def test_many_processes_upgrade_one_database_once(unversioned: Path, tmp_path: Path) -> None:
    later = releases.later_release(tmp_path)
    # One process imports, then as many as are wanted fork: they start at the same moment.
    code = """
import os
from adasplash_tuner.storage.store import TuningStore
import alembic.command
from dataclasses import replace
from tests.tuner.fakes import record
children = []
for number in range(12):
    if (child := os.fork()) == 0:
        TuningStore().publish(replace(record(), key=replace(record().key, kv_bucket=10 + number)))
        os._exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    assert releases.run(later, code).strip() == str([0] * 12)
    found = facts(unversioned)
    assert (found["schema_version"], found["keys"], found["best"], found["measurements"]) == ("2", 14, 14, 2)
    assert copies(unversioned) == ["tuned.db.schema-1"]


def test_an_upgrade_that_is_killed_leaves_the_old_schema_or_the_new_one(unversioned: Path, tmp_path: Path) -> None:
    later = releases.later_release(tmp_path)
    pristine = tmp_path / "pristine.db"
    shutil.copy(unversioned, pristine)
    code = """
import os, random, shutil, signal, time
from pathlib import Path
from adasplash_tuner.storage.store import TuningStore
import alembic.command
path, pristine, moments = Path(sys.argv[2]), sys.argv[3], random.Random(0)
for number in range(25):
    target = path.with_name(f"round-{number}.db")
    shutil.copy(pristine, target)
    if (child := os.fork()) == 0:
        TuningStore(str(target)).engines.check_writable()
        os._exit(0)
    time.sleep(moments.uniform(0, 0.09))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    releases.run(later, code, str(unversioned), str(pristine))
    versions = []
    for number in range(25):
        path = unversioned.with_name(f"round-{number}.db")
        assert len(TuningStore(str(path)).rows()) == 2  # reading rolls back what was not committed
        found = facts(path)
        assert (found["keys"], found["best"], found["measurements"], found["leftovers"]) == (2, 2, 2, []), number
        versions.append(found["schema_version"])
        if found["schema_version"] == "2":
            assert facts(path.with_name(f"{path.name}.schema-1"))["best"] == 2
    assert set(versions) <= {"1", "2"}
    assert "1" in versions
    releases.run(later, "from adasplash_tuner.storage.store import TuningStore; TuningStore(sys.argv[2]).engines.check_writable()",
                 str(unversioned.with_name(f"round-{versions.index('1')}.db")))  # fmt: skip
    assert facts(unversioned.with_name(f"round-{versions.index('1')}.db"))["schema_version"] == "2"


def test_nothing_is_upgraded_if_the_copy_has_no_room(unversioned: Path, tmp_path: Path) -> None:
    code = """
import resource
from adasplash_tuner.storage.store import TuningStore
from adasplash_core.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    TuningStore().engines.check_writable()
except StoreError as error:
    print(error)
"""
    said = releases.run(releases.later_release(tmp_path), code)
    assert "Check free space" in said or "Free some space" in said
    assert facts(unversioned)["schema_version"] == "1"
    assert copies(unversioned) == []


@pytest.mark.parametrize("mode", ["read", "frozen"])
def test_no_database_is_upgraded_where_nothing_may_be_written(
    unversioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("ADASPLASH_CACHE_MODE", mode)
    code = (
        "from adasplash_core.configs import ConfigLadder; from adasplash_tuner.provider import TunedConfigs\n"
        "from tests.tuner.fakes import *; import warnings\n"
        "warnings.showwarning = lambda message, *_: print(message)\n"
        "ladder = ConfigLadder([TunedConfigs()])\n"
        "for pass_ in ('forward', 'backward'): print(ladder.find(FakeBackend(), SPEC, H100, pass_).rung.name)"
    )
    rule = f"has schema 1 and must be upgraded, which ADASPLASH_CACHE_MODE={mode} forbids"
    if mode == "frozen":
        with pytest.raises(AssertionError, match=f"FrozenConfigsError: .*{rule}"):
            releases.run(releases.later_release(tmp_path), code)
    else:
        warning, *rungs = releases.run(releases.later_release(tmp_path), code).splitlines()
        assert rule in warning
        assert rungs == ["HEURISTIC", "HEURISTIC"]
    assert facts(unversioned)["schema_version"] == "1"


class TestALaterReleaseShares:
    """The database of this release, after a later one has upgraded it."""

    @pytest.fixture
    def upgraded(self, unversioned: Path, tmp_path: Path) -> Path:
        releases.run(releases.later_release(tmp_path), OPEN_AND_WRITE, "4096")
        return unversioned

    def test_it_is_read_and_not_written(self, upgraded: Path, warned: Warned) -> None:
        before = facts(upgraded)
        answer = look_up()
        assert (answer.config, answer.rung) == (BlockConfig(128, 8), Rung.USER_DATABASE)
        assert len(TuningStore().rows()) == 3
        for write in (
            lambda store: store.publish(record(block_n=32, median_ms=0.1)),
            lambda store: store.add_measurement(record().key, Measurement({}, "s", "i", "final", "ok", 1, "1")),
            lambda store: store.merge([record(block_n=32, median_ms=0.1)]),
            lambda store: store.delete([1]),
        ):
            with pytest.raises(
                StoreError, match="has schema 2, written by a newer adasplash-core .* and is only read. Upgrade"
            ):
                write(TuningStore())
        assert facts(upgraded) == before
        assert warned == []

    def test_what_does_not_run_is_passed_over_though_it_cannot_be_marked(self, upgraded: Path, warned: Warned) -> None:
        provider = TunedConfigs()
        ladder = ConfigLadder([provider])
        ladder.reject(FakeBackend(), SPEC, H100, "forward", BlockConfig(128, 8), "spills")
        again = provider.find(FakeBackend(), replace(SPEC, q_len=8000, kv_len=8000), H100, "forward")
        assert again is not None
        assert again.rung is Rung.HEURISTIC
        other = provider.find(
            FakeBackend(), replace(SPEC, kv_len=4096, q_len=8000, causal_alignment="bottom_right"), H100, "forward"
        )
        assert other is not None
        assert other.rung is Rung.USER_DATABASE  # the rest of the database is still used

    def test_a_process_that_is_writing_meanwhile_stops_writing(self, unversioned: Path, tmp_path: Path) -> None:
        store = TuningStore()
        assert store.publish(record(block_n=32, median_ms=0.9))
        releases.run(releases.later_release(tmp_path), OPEN_AND_WRITE, "4096")
        before = facts(unversioned)
        with pytest.raises(StoreError, match="has schema 2"):
            store.publish(record(block_n=16, median_ms=0.1))
        assert facts(unversioned) == before
        assert store.rows_for_problem(record().key)[0].record == record(block_n=32, median_ms=0.9)

    def test_mending_leaves_it_alone(self, upgraded: Path) -> None:
        done = CliRunner().invoke(cli, ["cache", "mend"])
        assert done.exit_code == 1
        assert "has schema 2" in done.stderr
        assert upgraded.exists()

    def test_tuning_says_so_before_it_measures(self, upgraded: Path) -> None:
        done = CliRunner().invoke(cli, ["tune", "--device", "cpu", "--shapes", "H=1,L=64,D=8"])
        assert done.exit_code == 1
        assert "Upgrade adasplash-core" in done.stderr


def test_a_schema_that_this_release_cannot_read_is_left_alone(unversioned: Path, tmp_path: Path, warned: Warned) -> None:
    releases.run(releases.later_release(tmp_path, readable_from=2), OPEN_AND_WRITE, "4096")
    before = facts(unversioned)
    ladder = ConfigLadder([TunedConfigs()])
    rungs = [ladder.find(FakeBackend(), SPEC, H100, pass_).rung for pass_ in ("forward", "backward")]  # type: ignore[arg-type]
    assert rungs == [Rung.HEURISTIC, Rung.HEURISTIC]
    assert "has schema 2" in warned.the_only_one()
    assert "is left alone. Upgrade adasplash-core" in warned.the_only_one()
    for use in (TuningStore().rows, lambda: TuningStore().publish(record())):
        with pytest.raises(StoreError, match="is left alone"):
            use()
    assert facts(unversioned) == before


@pytest.mark.parametrize("value", ["", "two", "-1"])
def test_a_database_that_does_not_say_which_schema_it_has(unversioned: Path, warned: Warned, value: str) -> None:
    with closing(sqlite3.connect(unversioned)) as connection:
        connection.execute("UPDATE adasplash_meta SET value = ?", (value,))
        connection.commit()
    assert look_up().rung is Rung.HEURISTIC
    assert "has no readable schema version" in warned.the_only_one()


def test_neither_alembic_nor_sqlalchemy_is_imported_to_look_up(store: TuningStore) -> None:
    store.publish(record())
    code = (
        "import sys; from adasplash_core.configs import ConfigLadder; from adasplash_tuner.provider import TunedConfigs\n"
        "from tests.tuner.fakes import *\n"
        "ladder = ConfigLadder([TunedConfigs()])\n"
        "print(*(ladder.find(FakeBackend(), SPEC, H100, p).rung.name for p in ('forward', 'backward')))\n"
        "print('sqlalchemy' in sys.modules, 'alembic' in sys.modules)\n"
        "from adasplash_tuner.storage.store import TuningStore\n"
        "TuningStore().publish(record(block_n=32, median_ms=0.1))\n"
        "print('sqlalchemy' in sys.modules, 'sqlalchemy.orm' in sys.modules, 'alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=releases.ROOT)
    assert done.stdout.splitlines() == ["USER_DATABASE HEURISTIC", "False False", "True False False"]


def test_a_copy_that_fails_leaves_no_half_copy(store: TuningStore, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish(record())

    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="space"):
        copy_aside(database, 1)
    assert copies(database) == []
