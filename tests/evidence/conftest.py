"""Runs the evidence scripts in this process: importing torch and transformers anew takes longer than what they do here."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch

EVIDENCE = Path(__file__).resolve().parents[2] / "examples" / "evidence"


def run_script(name: str, *arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed (a message of sys.exit, too)."""
    printed, precision = io.StringIO(), torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [name, "--device", "cpu", *arguments])
        patch.syspath_prepend(str(EVIDENCE))
        try:
            runpy.run_path(str(EVIDENCE / name), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            printed.write(end.code if isinstance(end.code, str) else "")
        finally:
            torch.set_float32_matmul_precision(precision)
    return code, printed.getvalue()
