"""What all evidence scripts share: a run that fails or is told to end costs no other's results, files are named by machine."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from .conftest import EVIDENCE

sys.path.insert(0, str(EVIDENCE))
try:
    from report import short_name
    from training import Budget, Run, each
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
    assert skipped == {"b, seed 0": "TimeoutError: the process was told to end", "c, seed 0": "the budget ended"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_spent_budget_trains_nothing() -> None:
    skipped: dict[str, str] = {}
    assert not list(each(Budget(-1), 1, ["a"], Run, skipped))
    assert skipped == {"a, seed 0": "the budget ended"}


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
