"""Real processes on one database: sixteen that tune and look up at once, and fifty that are killed while they write.

One process imports everything and then forks, so that many start at the same moment and none costs a second.
"""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import record

ROOT = Path(__file__).parents[2]

HERD = """
import os, random, signal, sys, time, traceback, warnings
warnings.simplefilter("error")  # a warning of a look-up is a failure here
from dataclasses import replace
import sqlalchemy.dialects.sqlite
from adasplash_core.configs import ConfigLadder, Rung
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.storage.records import Measurement
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import *

def in_a_child(work, *arguments):
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return child

def measured(number, i):
    return Measurement({"writer": number, "i": i}, "s", "i", "screening", "ok", 1, "1", median_ms=1.0)

def own_key(number):
    return replace(record().key, kv_bucket=1000 + number)
"""

WORKERS, ROUNDS = 16, 10

TUNE_AND_LOOK_UP = f"""
def work(number):
    store = TuningStore()
    best = float("inf")
    for i in range({ROUNDS}):
        store.add_measurement(own_key(number), measured(number, i))
        store.publish(replace(record(), key=own_key(number)))
        store.publish(record(block_n=number, median_ms=2.0 - number / 100 - i / 1000))
        ladder = ConfigLadder([TunedConfigs()])  # as in a process that has just begun
        found = ladder.find(FakeBackend(), SPEC, H100, "forward")
        assert found.rung is Rung.USER_DATABASE, found
        assert found.median_ms <= best, "a faster result was lost"
        best = found.median_ms
        assert ladder.find(FakeBackend(), SPEC, H100, "backward").rung is Rung.HEURISTIC

children = [in_a_child(work, number) for number in range({WORKERS})]
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HERD + code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_sixteen_processes_tune_and_look_up_in_one_new_file_at_once(store: TuningStore) -> None:
    """No error, no warning, no lost row, no lost update."""
    assert run(TUNE_AND_LOOK_UP).strip() == str([0] * WORKERS)
    keys = WORKERS + 1
    assert store.counts() == {"keys": keys, "best": keys, "quarantined": 0, "measurements": WORKERS * ROUNDS}
    shared = next(row.usable for row in store.rows_for_problem(record().key))
    assert shared is not None
    assert shared.config["block_n"] == WORKERS - 1  # the fastest of all, whoever wrote last
    assert shared.median_ms == pytest.approx(2.0 - (WORKERS - 1) / 100 - (ROUNDS - 1) / 1000)
    for number in range(WORKERS):
        key = next(r.record.key for r in store.rows() if r.record and r.record.key.kv_bucket == 1000 + number)
        assert [m.config for m in store.measurements(key)] == [{"writer": number, "i": i} for i in range(ROUNDS)]
    assert store.integrity_problems() == []


KILLS = 50

WRITE_AND_BE_KILLED = f"""
moments = random.Random(int(sys.argv[1]))
acknowledged = 0

def work(number, report):
    store = TuningStore()
    for i in range(10**6):
        store.add_measurement(own_key(number), measured(number, i))
        store.publish(record(block_n=number, median_ms=1.0 - number / 1000))
        store.publish(replace(record(), key=own_key(number)))
        os.write(report, b".")  # committed

for number in range({KILLS}):
    report, write_end = os.pipe()
    child = in_a_child(work, number, write_end)
    os.close(write_end)
    if number % 2:
        acknowledged += len(os.read(report, 1))  # some while they open the file, some when they write for the first or the n-th time
    time.sleep(moments.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged += len(os.read(report, 10**6))
    os.close(report)
    store = TuningStore()
    assert store.integrity_problems() == [], number
    assert all(row.usable is not None for row in store.rows()), number
    found = ConfigLadder([TunedConfigs()]).find(FakeBackend(), SPEC, H100, "forward")
    assert found.rung is Rung.USER_DATABASE or not store.rows(), found
    assert store.counts()["measurements"] >= acknowledged, number
TuningStore().publish(record(block_n=16, median_ms=0.001))
print(acknowledged)
"""


def test_fifty_writers_killed_at_random_moments_leave_whole_rows_and_lose_none(store: TuningStore, database: Path) -> None:
    acknowledged = int(run(WRITE_AND_BE_KILLED, "0"))
    assert acknowledged >= KILLS // 2
    assert store.counts()["measurements"] >= acknowledged
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert min(row.record.median_ms for row in store.rows() if row.record) == 0.001
    assert not [path for path in database.parent.iterdir() if not path.name.startswith("tuned.db")]


def test_a_file_that_was_not_closed_is_read_with_all_that_was_committed(
    store: TuningStore, database: Path, tmp_path: Path
) -> None:
    """A copy of what a killed writer leaves: the newest rows are in the WAL alone."""
    code = "work = lambda: (TuningStore().publish(record(block_n=256, median_ms=0.5)), os.kill(os.getpid(), signal.SIGKILL))\n"
    hold = "import sqlite3; reader = sqlite3.connect(sys.argv[1]); reader.execute('SELECT count(*) FROM adasplash_best').fetchone()\n"
    store.publish(record())
    run(hold + code + "os.waitpid(in_a_child(work), 0)\nimport shutil\nshutil.copytree(os.path.dirname(sys.argv[1]), sys.argv[2])",
        str(database), str(tmp_path / "left"))  # fmt: skip
    left = tmp_path / "left" / "tuned.db"
    assert left.with_name("tuned.db-wal").stat().st_size > 0
    left.with_name("tuned.db-shm").unlink(missing_ok=True)
    code = (
        "found = ConfigLadder([TunedConfigs(sys.argv[1])]).find(FakeBackend(), SPEC, H100, 'forward')\n"
        "print(found.rung.name, found.config.block_n)\nprint(len(TuningStore(sys.argv[1]).rows()))"
    )
    assert run(code, str(left)).split() == ["USER_DATABASE", "256", "1"]


def test_a_forked_child_uses_connections_of_its_own(store: TuningStore) -> None:
    store.publish(record())
    context = multiprocessing.get_context("fork")

    def child() -> None:
        assert store.rows()[0].usable in (record(), record(block_n=32, median_ms=0.5))
        store.publish(record(block_n=32, median_ms=0.5))

    children = [context.Process(target=child) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(30)
    assert [process.exitcode for process in children] == [0, 0, 0]
    assert store.rows()[0].record == record(block_n=32, median_ms=0.5)
