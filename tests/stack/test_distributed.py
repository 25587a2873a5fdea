"""DDP and FSDP2 in two processes with gloo: examples/evidence/two_gpus.py, which two GPUs run with NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from .conftest import EVIDENCE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("two") / "rows.json"
    command = [sys.executable, str(EVIDENCE / "two_gpus.py"), "--device", "cpu", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("alpha", ["learnable", "scheduled"])
@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2, checkpointed"])
def test_loss_gradients_and_steps_are_those_of_one_process(found: dict[str, Any], way: str, alpha: str) -> None:
    (row,) = (row for row in found["rows"] if (row["way"], row["alpha"]) == (way, alpha))
    assert row["loss"] < 1e-6
    assert row["gradients"] < 1e-5
    assert row["parameters"] < 1e-5
    assert len(set(row["losses"])) == 3  # it did train


@pytest.mark.parametrize("alpha", ["learnable", "scheduled"])
def test_a_sharded_models_state_dict_goes_anywhere(found: dict[str, Any], alpha: str) -> None:
    (row,) = (row for row in found["rows"] if (row["way"], row["alpha"]) == ("FSDP2 state dict", alpha))
    assert row["loss"] < 1e-6
    assert row["parameters"] == 0
