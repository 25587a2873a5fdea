"""Real processes on one SQLite file: writing at once, forking, being killed, and two devices tuned side by side."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from adasplash_tuner.storage.store import TuningStore

ROOT = Path(__file__).parents[2]
SHAPE = "B=1,H=2,L=128,D=16,float32,causal"


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
