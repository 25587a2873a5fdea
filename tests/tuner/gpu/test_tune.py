"""A whole tuning run on the GPU: compiled ahead, captured, never slower, and told in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash_core.device import device_info
from adasplash_core.plugins import registry
from adasplash_tuner.shapes.shape import Shape

ROOT = Path(__file__).parents[3]
SHAPE = "B=1,H=16,L=4096,D=64,bf16,causal"


def tune(*more: str) -> tuple[Any, float]:
    command = [sys.executable, "-m", "adasplash_cli.main", "tune", "--gpu-auto", "--backend", "triton", "--json", *more]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), time.monotonic() - begun


def test_a_shape_is_tuned_within_its_budget_and_then_known(database: Path) -> None:
    found, seconds = tune("--shapes", SHAPE, "--budget", "90s")
    assert seconds < 100
    assert found["crashes"] == []
    (device, *_) = found["devices"]
    assert [s["problem"] for s in device["searches"]] == [None, None]
    for search in device["searches"]:
        assert search["gain"] >= 1.0
        assert search["error"] <= search["error_bound"]
        assert search["measured"] >= 5
        assert all(t["tuned_ms"] <= 1.02 * t["default_ms"] for t in search["by_input"].values())
    again, seconds = tune("--shapes", SHAPE, "--budget", "90s")
    assert seconds < 45
    assert [s["verdict"] for s in again["devices"][0]["searches"]] == ["kept", "kept"]


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_every_candidate_compiles_ahead(pass_: Any) -> None:
    """A report for each, and none without kernels: what the tuner's helper processes do, here in this one."""
    backend, device = registry().backend("triton"), device_info("cuda:0")
    spec = Shape.parse("B=2,H=2,L=256,D=64,bf16").spec("cuda", needs_grad=True)
    report = backend.precompile(spec, device, pass_, backend.default_config(spec, device, pass_))
    assert report is not None
    assert report.refusal == ""
    assert report.kernels
    assert torch.cuda.is_available()  # and this process still has its device
