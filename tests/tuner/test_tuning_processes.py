"""Real processes on one SQLite file: writing at once, forking, being killed, and two devices tuned side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from adasplash_core.device import device_info
from adasplash_tuner.session import Event, Planned, Request
from adasplash_tuner.shapes import Shape
from adasplash_tuner.store import TuningStore
from adasplash_tuner.workers import split, tune_side_by_side
from tests.tuner.fakes import H100, H200, record

ROOT = Path(__file__).parents[2]
SHAPE = "B=1,H=2,L=128,D=16,float32,causal"


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


WRITER = """
import sys
from dataclasses import replace
from adasplash_tuner.records import Measurement
from adasplash_tuner.store import TuningStore
from tests.tuner.fakes import record
number = int(sys.argv[1])
store = TuningStore()
for i in range(12):
    shared = record(block_n=number, median_ms=2.0 - number / 100 - i / 1000)
    own = replace(record(), key=replace(record().key, kv_bucket=1000 + number))
    store.publish(shared)
    store.publish(own)
    store.add_measurement(own.key, Measurement({"block_n": i}, "s", "i", "screening", "ok", 1, "1", median_ms=1.0))
    assert store.rows_for_problem(shared.key)
"""


def test_many_processes_write_one_new_file_at_once_and_nothing_is_lost(store: TuningStore) -> None:
    count = 8
    writers = [start(WRITER, str(n)) for n in range(count)]
    for writer in writers:
        _, said = writer.communicate(timeout=60)
        assert writer.returncode == 0, said
    assert store.counts() == {"keys": count + 1, "best": count + 1, "quarantined": 0, "measurements": 12 * count}
    shared = next(row.usable for row in store.rows_for_problem(record().key))
    assert shared is not None
    assert shared.config["block_n"] == count - 1  # the fastest of all, whoever wrote last
    assert shared.median_ms == pytest.approx(2.0 - (count - 1) / 100 - 11 / 1000)
    assert store.integrity_problems() == []


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


def test_writers_killed_at_random_moments_leave_whole_rows(store: TuningStore) -> None:
    endless = WRITER.replace("range(12)", "range(10**6)")
    store.publish(record())
    moments = random.Random(0)
    for round_ in range(4):
        writers = [start(endless, str(n)) for n in range(3)]
        before = store.counts()["measurements"]
        while store.counts()["measurements"] < before + 3:
            assert all(w.poll() is None for w in writers)
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        assert store.integrity_problems() == [], round_
        assert all(row.usable is not None for row in store.rows())
    assert store.publish(record(block_n=16, median_ms=0.001))


def tune_command(*more: str) -> list[str]:
    return [sys.executable, "-m", "adasplash_cli.main", "tune", "--device", "cpu", "--shapes", SHAPE, *more]


def screened(database: Path) -> list[tuple[int, str]]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return connection.execute(
            "SELECT key_id, config FROM adasplash_measurements WHERE stage = 'screening' ORDER BY id"
        ).fetchall()


def test_a_tune_that_is_killed_keeps_what_it_measured_and_the_next_one_goes_on(store: TuningStore, database: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(tune_command("--budget", "120s"), env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while store.counts()["measurements"] < 4:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    first.kill()
    first.wait()
    before = screened(database)
    assert len(before) >= 3
    assert store.integrity_problems() == []
    second = subprocess.run(tune_command("--budget", "6s", "--json"), env=environment, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    searches = json.loads(second.stdout)["devices"][0]["searches"]
    assert [s["verdict"] in ("tuned", "default") for s in searches] == [True, True]
    again = screened(database)
    assert again[: len(before)] == before
    defaults = {json.dumps(s["default_config"], sort_keys=True, separators=(",", ":")) for s in searches}
    others = [row for row in again if row[1] not in defaults]
    assert len(others) == len(set(others))  # nothing but the default was screened twice


def test_the_tuned_config_is_what_attention_and_explain_use_in_a_new_process(store: TuningStore, database: Path) -> None:
    """The whole way with the real reference backend: tune, then a new process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(tune_command("--budget", "5s", "--json"), env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    assert device["database"] == str(database)
    tuned = {s["key"]["pass_"]: s for s in device["searches"]}
    assert set(tuned) == {"forward", "backward"}
    for search in tuned.values():
        assert search["error"] <= 5e-6
        assert search["gain"] >= 1.0
        assert search["median_ms"] > 0
    code = (
        "import torch, json, adasplash_core as a\n"
        "q, k, v = (torch.randn(1, 2, 128, 16, requires_grad=True) for _ in range(3))\n"
        "print(json.dumps(a.explain(q, k, v, is_causal=True).as_dict()['passes']))"
    )
    asked = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    for pass_, found in json.loads(asked.stdout).items():
        assert found["source"] == "user_database"
        assert found["config"] == tuned[pass_]["config"]


def test_identical_devices_share_the_problems_and_others_do_not() -> None:
    requests = split(Request(), [H100, replace(H100, index=1), replace(H200, index=2)])
    assert [(r.device, r.part) for r in requests] == [("cuda:0", (0, 2)), ("cuda:1", (1, 2)), ("cuda:2", (0, 1))]


def test_devices_are_tuned_side_by_side_and_the_crash_of_one_spares_the_others(
    store: TuningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = Request(
        shapes=tuple(Shape.parse(f"B=1,H=1,L={n},D=8,float32") for n in (128, 256)), budget_s=2.0, passes=("forward",)
    )
    cpu = device_info("cpu")
    requests = [replace(half, device="cpu") for half in split(small, [cpu, cpu])]
    doomed = replace(small, device="cpu", shapes=(Shape.parse("B=1,H=1,L=1024,D=8,float32"),))
    planned: list[int] = []

    def observe(number: int, event: Event) -> None:
        if isinstance(event, Planned):
            planned.append(number)
            if number == 2:
                workers = sorted(multiprocessing.active_children(), key=lambda worker: int(worker.name.rpartition("-")[2]))
                workers[-1].kill()

    results = tune_side_by_side([*requests, doomed], observe)
    assert sorted(planned) == [0, 1, 2]
    assert [len(r.report.finished) if r.report else None for r in results] == [1, 1, None]
    assert results[2].problem == "its process ended with exit code -9"
    lengths = {row.record.key.kv_bucket for row in store.rows() if row.record}
    assert lengths == {128, 256}
