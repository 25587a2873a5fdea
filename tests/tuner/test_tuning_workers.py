"""Whole tuning runs in processes of their own, with a backend whose configs die, spill or do not compile."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adasplash_core.device import DeviceInfo, device_info
from adasplash_tuner.search.events import Event, Finished, Planned, Request, Step
from adasplash_tuner.search.targets import Target
from adasplash_tuner.search.workers import MAX_RESTARTS, WorkerResult, split, tune_side_by_side
from adasplash_tuner.shapes.shape import Shape
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fake_site import install_backend
from tests.tuner.fakes import H100, H200

ROOT = Path(__file__).parents[2]
SHAPE = "B=1,H=1,L=64,D=8,float32"


def target(device: DeviceInfo) -> Target:
    return Target.of(device)


@pytest.fixture
def site(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fickle backend, installed for processes that are started; what it did is in ``log``."""
    install_backend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])  # spawned processes get this one
    monkeypatch.setenv("FICKLE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "log").touch()
    return tmp_path


def log(site: Path) -> list[str]:
    return (site / "log").read_text().splitlines()


def tune_command(*more: str) -> list[str]:
    fixed = ["--device", "cpu", "--backend", "fickle", "--passes", "forward", "--budget", "60s"]
    return [sys.executable, "-m", "adasplash_cli.main", "tune", *fixed, *more]


def tune_json(*more: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    done = subprocess.run(
        tune_command("--shapes", SHAPE, "--json", *more), capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (device,) = json.loads(done.stdout)["devices"]
    (search,) = device["searches"]
    return search, done


def side_by_side(
    *requests: Request, observe: Callable[[int, Event], None] = lambda _n, _e: None, budget_s: float = 60.0
) -> list[WorkerResult]:
    common = {"device": "cpu", "backends": ("fickle",), "passes": ("forward",), "budget_s": budget_s}
    return tune_side_by_side([replace(request, **common) for request in requests], observe)  # type: ignore[arg-type]


# -- compiling ahead --------------------------------------------------------------------------------------------------------------


def test_candidates_are_compiled_in_other_processes_and_what_cannot_run_never_does(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FICKLE_SPACE", "refuse spill abort")
    search, _ = tune_json()
    assert search["verdict"] == "tuned"
    assert search["config"] == {"block": 256, "does": "compute"}
    reasons = {json.loads(config)["does"]: why for config, why in search["refused"].items()}
    assert reasons == {
        "refuse": "does not compile: ValueError: no such instruction",
        "spill": "kernel spills 4096 bytes a thread (limit 64)",
        "abort": "the compiler's process ended with exit code -6",
    }
    lines = log(site)
    assert {line.split()[1] for line in lines if line.startswith("run")} == {"compute"}
    compiled = [line for line in lines if line.startswith("compile")]
    assert len(compiled) == 6
    assert all(line.endswith(" ''") for line in compiled)  # no GPU is visible there
    again, _ = tune_json()
    assert again["verdict"] == "kept"
    assert [line for line in log(site) if line.startswith("compile")] == compiled


# -- processes that die -----------------------------------------------------------------------------------------------------------


def test_a_config_that_takes_its_process_with_it_is_left_out_and_the_search_goes_on(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FICKLE_SPACE", "die")
    told: list[Event] = []
    request = Request(shapes=(Shape.parse(SHAPE),), fresh=True)
    (result,) = side_by_side(request, observe=lambda _n, event: told.append(event))
    assert result.crashes == ["its process ended with exit code -11 while it ran {'block': 128, 'does': 'die'}"]
    assert result.report is not None
    (finished,) = result.report.finished
    assert finished.outcome is not None
    assert finished.outcome.best.config == {"block": 256, "does": "compute"}
    assert log(site).count("run die 128") == 1
    (failed,) = [m for m in finished.outcome.measurements if m.status != "ok"]
    assert failed.note == "its process ended with exit code -11"
    assert [type(event) for event in told if isinstance(event, (Planned, Finished))] == [Planned, Finished]


def test_a_default_that_takes_its_process_with_it_gives_up_its_search_only(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FICKLE_DEFAULT", "die")  # for one of the two lengths
    shapes = tuple(Shape.parse(f"B=1,H=1,L={length},D=8,float32") for length in (96, 256))
    (result,) = side_by_side(Request(shapes=shapes))
    assert result.report is not None
    problems = {f.label: f.problem for f in result.report.finished}
    assert problems == {
        "B=1,H=1,L=96,D=8,float32 fickle forward": "its default config: its process ended with exit code -11",
        "B=1,H=1,L=256,D=8,float32 fickle forward": "",
    }
    assert log(site).count("run die 64") <= 2  # the estimate, or the search: and not again


def test_a_device_that_keeps_losing_processes_is_given_up_and_the_others_are_not(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_the_second(number: int, event: Event) -> None:
        if number == 1 and isinstance(event, Step):
            workers = sorted(multiprocessing.active_children(), key=lambda w: int(w.name.rpartition("-")[2]))
            workers[-1].kill()

    first, second = side_by_side(
        Request(shapes=(Shape.parse(SHAPE),)),
        Request(shapes=(Shape.parse(SHAPE.replace("D=8", "D=16")),)),
        observe=kill_the_second,
    )
    assert first.report is not None
    assert first.report.ok
    assert (second.report, second.problem) == (None, "its process ended with exit code -9")
    assert 1 <= len(second.crashes) <= MAX_RESTARTS + 1


# -- several devices --------------------------------------------------------------------------------------------------------------


def test_identical_devices_share_the_problems_and_others_do_not() -> None:
    requests = split(Request(), [target(d) for d in (H100, replace(H100, index=1), replace(H200, index=2))])
    assert [(r.device, r.part, r.width) for r in requests] == [
        ("cuda:0", (0, 2), 3),
        ("cuda:1", (1, 2), 3),
        ("cuda:2", (0, 1), 3),
    ]


def test_a_process_sees_only_the_slice_it_is_given() -> None:
    (request,) = split(Request(), [Target("MIG 1g.5gb", "cuda:0", ("cuda",), "MIG-1")])
    assert request.visible == "MIG-1"


def test_what_identical_devices_find_is_one_result(store: TuningStore, site: Path) -> None:
    shapes = tuple(Shape.parse(f"B=1,H=1,L={length},D=8,float32") for length in (64, 256, 512))
    cpu = target(device_info("cpu"))
    results = side_by_side(*split(Request(shapes=shapes), [cpu, cpu]))
    assert [len(r.report.finished) if r.report else None for r in results] == [
        1,
        2,
    ]  # the longest is as much work as the others
    assert {row.record.key.kv_bucket for row in store.rows() if row.record} == {128, 256, 512}


# -- time -------------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(store: TuningStore, site: Path) -> None:
    # The second shape's search takes longer than the signal: a loaded machine once ended the first before it came.
    shapes = ("--shapes", "B=1,H=2,L=256,D=16,float32", "--shapes", "B=1,H=4,L=1024,D=16,float32")
    command = [*tune_command(*shapes), "--backend", "torch", "--budget", "120s"]
    running = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while store.counts()["measurements"] < 5:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to its children, too
    _, said = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "What was measured is kept; the same command goes on from there." in said
    assert "Traceback" not in said
    before = store.counts()["measurements"]
    assert before >= 5
    again = subprocess.run([*command, "--budget", "2s"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert store.counts()["measurements"] > before


def test_the_budget_counts_from_the_command_and_not_from_the_process(site: Path) -> None:
    late = Request(shapes=tuple(Shape.parse(f"B=1,H=1,L={n},D=8,float32") for n in (64, 256)), started=time.monotonic() - 60.0)
    (result,) = side_by_side(late)
    assert result.report is not None
    first, second = result.report.finished
    assert first.outcome is not None  # something is measured however late it is
    assert second.postponed
    assert result.report.postponed == ["B=1,H=1,L=256,D=8,float32 fickle forward"]
    assert result.report.ok
