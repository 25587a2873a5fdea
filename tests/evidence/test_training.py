"""What all evidence scripts share: a run that fails or is told to end costs no other's results, files are named by machine."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from .conftest import EVIDENCE

sys.path.insert(0, str(EVIDENCE))
try:
    import training
    from report import save, short_name, without_times
    from training import Budget, Run, comparable, cut, each, evaluated_at
finally:
    sys.path.remove(str(EVIDENCE))


def test_a_variant_that_fails_is_named_and_the_others_run() -> None:
    def train(variant: str, seed: int) -> Run:
        if (variant, seed) == ("b", 0):
            raise RuntimeError("too little\n memory")
        return Run(variant, seed)

    skipped: dict[str, str] = {}
    runs = [(run.variant, run.seed) for run in each(Budget(60), 2, ["a", "b"], train, skipped)]
    assert runs == [("a", 0), ("a", 1), ("b", 1)]
    assert skipped == {"b, seed 0": "RuntimeError: too little memory"}


def test_being_told_to_end_keeps_what_was_done() -> None:
    def train(variant: str, seed: int) -> Run:
        if variant == "b":
            os.kill(os.getpid(), signal.SIGTERM)
        return Run(variant, seed)

    before, skipped = signal.getsignal(signal.SIGTERM), dict[str, str]()
    runs = [run.variant for run in each(Budget(60), 1, ["a", "b", "c"], train, skipped)]
    assert runs == ["a"]
    assert skipped == {"b, seed 0": "the process was told to end", "c, seed 0": "the budget ended"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_spent_budget_trains_nothing() -> None:
    skipped: dict[str, str] = {}
    assert not list(each(Budget(-1), 1, ["a"], Run, skipped))
    assert skipped == {"a, seed 0": "the budget ended"}


def test_a_seed_that_would_not_be_finished_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def train(variant: str, seed: int) -> Run:
        seconds[0] += 30 if variant == "slow" else 5
        return Run(variant, seed)

    skipped: dict[str, str] = {}
    runs = [(run.variant, run.seed, run.seconds) for run in each(Budget(60), 3, ["fast", "slow"], train, skipped)]
    assert runs == [("fast", 0, 5), ("slow", 0, 30), ("fast", 1, 5), ("fast", 2, 5)]
    assert skipped == {f"slow, seed {seed}": "the budget left too little for it" for seed in (1, 2)}


def test_a_run_that_was_cut_is_not_averaged_with_whole_ones() -> None:
    whole = [Run("a", 0, steps=9), Run("a", 2, steps=9), Run("b", 2, steps=9)]
    short = [Run("a", 1, steps=3, cut=True), Run("c", 0, steps=2, cut=True)]
    longest = Run("c", 1, steps=5, cut=True)
    runs = [whole[0], short[0], whole[1], whole[2], short[1], longest]
    assert comparable(runs) == [*whole, longest]
    assert cut(runs) == {
        "a, seed 1": "the budget ended after 3 steps, not in the table",
        "c, seed 0": "the budget ended after 2 steps, not in the table",
    }


@pytest.mark.parametrize(("steps", "at"), [(10, {2, 4, 6, 8, 10}), (276, {55, 110, 166, 221, 276}), (3, {1, 2, 3}), (1, {1})])
def test_the_last_step_is_evaluated_and_no_more_than_asked_for(steps: int, at: set[int]) -> None:
    assert evaluated_at(steps, 5) == at


def test_a_shared_device_has_no_times() -> None:
    assert without_times([{"variant": "a", "ms a step": 3, "tokens / s": 5, "peak GB": 1}]) == [{"variant": "a", "peak GB": 1}]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    for number in (1, 2):
        assert save("", {"number": number}, path) == path
        assert json.loads(path.read_text(encoding="utf-8")) == {"number": number}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("device", "threads", "name"),
    [
        ("NVIDIA H200", None, "h200"),
        ("NVIDIA H100 80GB HBM3", None, "h100"),
        ("NVIDIA A100-SXM4-80GB", None, "a100"),
        ("NVIDIA GeForce RTX 4090", None, "gpu"),
        ("AMD EPYC 9R14", 8, "cpu"),
    ],
)
def test_files_are_named_by_machine(device: str, threads: int | None, name: str) -> None:
    assert short_name({"device": device, "threads": threads}) == name
