"""The same store on a real PostgreSQL server, started for these tests."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adasplash_core.configs import ConfigLadder, Rung
from adasplash_core.errors import StoreError
from adasplash_tuner.key import KEY_FIELDS, tuning_key
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage.models import metadata
from adasplash_tuner.storage.records import Measurement
from adasplash_tuner.storage.store import TuningStore
from adasplash_tuner.storage.upgrade import migrate
from tests.tuner import releases
from tests.tuner.fakes import H100, SPEC, BlockConfig, FakeBackend, record

pytestmark = pytest.mark.skipif(shutil.which("initdb") is None, reason="PostgreSQL's initdb is not on the PATH")
pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")

ROOT = Path(__file__).parents[2]


def as_server_user() -> dict[str, object]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of an empty database."""
    options = as_server_user()
    with tempfile.TemporaryDirectory(prefix="adasplash-pg-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        if options:
            os.chown(folder, int(str(options["user"])), int(str(options["group"])))
        data = f"{folder}/data"
        run = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **options}
        subprocess.run(["initdb", "-D", data, "-U", "ada", "-A", "trust", "--no-sync"], **run)  # type: ignore[call-overload]
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        subprocess.run(["pg_ctl", "-D", data, "-o", settings, "-l", f"{folder}/log", "-w", "start"], **run)  # type: ignore[call-overload]
        try:
            yield f"postgresql://ada@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run(["pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"], **run)  # type: ignore[call-overload]


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TuningStore]:
    monkeypatch.setenv("ADASPLASH_DB", server)
    store = TuningStore()
    yield store
    store.delete([row.id for row in store.rows()])
    store.engines.dispose()


def test_an_empty_server_has_nothing_and_is_not_written_by_reading(store: TuningStore) -> None:
    assert store.rows() == []
    assert ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, "forward").rung is Rung.HEURISTIC


def test_processes_of_a_fleet_share_one_server_and_the_fastest_result_remains(store: TuningStore) -> None:
    code = (
        "import sys; from adasplash_tuner.storage.store import TuningStore; from tests.tuner.fakes import record\n"
        "for i in range(5): TuningStore().publish(record(block_n=int(sys.argv[1]), median_ms=2 - int(sys.argv[1]) / 10 - i / 100))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=ROOT) for n in range(4)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    (row,) = store.rows()
    assert row.record is not None
    assert (row.record.config["block_n"], row.record.median_ms) == (3, pytest.approx(1.66))


def test_what_replaces_what_is_as_on_sqlite(store: TuningStore) -> None:
    assert store.publish(record(median_ms=1.0))
    assert not store.publish(record(block_n=64, median_ms=1.1))
    assert store.publish(record(block_n=64, median_ms=1.1), contested=record().config)
    assert store.merge([record(block_n=32, median_ms=0.5), record(block_n=16, median_ms=0.7)]) == 1
    answer = ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, "forward")
    assert (answer.config, answer.rung) == (BlockConfig(32, 8), Rung.USER_DATABASE)


def test_measurements_quarantine_and_deletion(store: TuningStore) -> None:
    measured = Measurement({"block_n": 1}, "s", "i", "final", "ok", 1, "1", median_ms=1.0, spread_ms=0.1, samples=3, error=1e-4)
    store.publish(record())
    store.add_measurement(record().key, measured)
    assert store.measurements(record().key) == [measured]
    (row,) = store.rows()
    assert store.quarantine(row.id, "spills")
    assert store.counts() == {"keys": 1, "best": 1, "quarantined": 1, "measurements": 1}
    assert store.delete([row.id]) == 1
    assert store.rows() == []


def test_a_merge_that_fails_writes_nothing(store: TuningStore) -> None:
    too_large = replace(record(), key=replace(record().key, head_dim=2**40))
    with pytest.raises(StoreError, match="integer out of range"):
        store.merge([record(), too_large])
    assert store.rows() == []


def test_a_forked_child_opens_connections_of_its_own(store: TuningStore) -> None:
    store.publish(record())
    child = os.fork()
    if child == 0:
        os._exit(0 if store.rows()[0].record == record() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.rows()[0].record == record()


# -- the schema -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a database of the test's own."""
    import psycopg

    name = "t" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
    url = server.rpartition("/")[0] + f"/{name}"
    monkeypatch.setenv("ADASPLASH_DB", url)
    return url


def ask(url: str, query: str) -> list[Any]:
    import psycopg

    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()  # type: ignore[arg-type]


def test_the_migrations_make_the_tables_that_the_code_expects(empty: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine

    location = TuningStore().location
    engine = create_engine(location.url)
    with engine.begin() as connection:
        migrate(connection, location)
        context = MigrationContext.configure(connection, opts={"version_table": "adasplash_revision"})
        assert compare_metadata(context, metadata) == []
        for name in KEY_FIELDS:
            nullable = (
                "SELECT is_nullable FROM information_schema.columns WHERE table_name = 'adasplash_keys' AND column_name = "
            )
            assert connection.exec_driver_sql(f"{nullable}'{name}'").scalar() == "NO"
    engine.dispose()


def test_many_processes_make_the_tables_once(empty: str) -> None:
    code = """
import os
from dataclasses import replace
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import record
children = []
for number in range(8):
    if (child := os.fork()) == 0:
        TuningStore().publish(replace(record(), key=replace(record().key, kv_bucket=number)))
        os._exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] == []
    assert done.stdout.strip() == str([0] * 8)
    assert len(TuningStore().rows()) == 8
    assert ask(empty, "SELECT version_num FROM adasplash_revision") == [("0001",)]


def test_a_database_from_before_alembic_is_upgraded_by_a_later_release_and_still_read_by_this_one(
    empty: str, tmp_path: Path
) -> None:
    store = TuningStore()
    store.publish(record())
    store.add_measurement(record().key, Measurement({"block_n": 1}, "s", "i", "final", "ok", 1, "1", median_ms=1.0))
    store.engines.dispose()
    import psycopg

    with psycopg.connect(empty) as connection:  # as it was before
        connection.execute("DROP TABLE adasplash_revision")
        connection.execute("DELETE FROM adasplash_meta WHERE name = 'readable_from'")
    code = """
from dataclasses import replace
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import record
TuningStore().publish(replace(record(), key=replace(record().key, kv_bucket=1024)))
"""
    later = releases.later_release(tmp_path)
    writers = [releases.start(later, code) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert ask(empty, "SELECT version_num FROM adasplash_revision") == [("0002",)]
    assert dict(ask(empty, "SELECT name, value FROM adasplash_meta")) == {"schema_version": "2", "readable_from": "1"}
    assert ask(empty, "SELECT count(*), count(host) FROM adasplash_keys") == [(2, 2)]
    answer = ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, "forward")
    assert (answer.config, answer.rung) == (BlockConfig(128, 8), Rung.USER_DATABASE)
    again = TuningStore()
    assert (len(again.rows()), len(again.measurements(record().key))) == (2, 1)
    with pytest.raises(StoreError, match="has schema 2, written by a newer adasplash-core .* and is only read"):
        again.publish(record(block_n=32, median_ms=0.1))
    again.engines.dispose()


def test_a_miss_tells_how_the_nearest_rows_differ(store: TuningStore) -> None:
    for change in ({}, {"dtype": "float32"}):
        store.publish(record(tuning_key(FakeBackend(), replace(SPEC, **change), H100, "forward")))  # type: ignore[arg-type]
    answer = ConfigLadder([TunedConfigs()]).find(FakeBackend(), replace(SPEC, causal=False), H100, "forward")
    near = [line for line in answer.detail.splitlines() if line.startswith("  near: ")]
    assert near[0].endswith("causal is True there and False here")
    assert near[1].endswith("dtype is 'float32' there and 'bfloat16' here; causal is True there and False here")
