"""``adasplash info``: complete enough for a bug report, and safe to paste."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import pytest
from click.testing import CliRunner

from adasplash_cli.main import cli
from adasplash_core import plugins


def test_json_says_what_a_bug_report_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASPLASH_DB", str(tmp_path / "tuned.db"))
    result = CliRunner().invoke(cli, ["info", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["packages"]["torch"] == importlib.metadata.version("torch")  # without the build that torch.__version__ names
    assert report["python"].startswith(platform.python_version())
    assert report["devices"][-1]["type"] == "cpu"
    torch_backend = next(backend for backend in report["backends"] if backend["name"] == "torch")
    assert {"name": "torch", "available": True, "reasons": []}.items() <= torch_backend.items()
    assert report["database"] == {"location": str(tmp_path / "tuned.db"), "exists": False}
    assert report["environment"]["ADASPLASH_DB"] == str(tmp_path / "tuned.db")


def test_a_plugin_that_could_not_be_used_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = plugins.Registry(problems={"fancy (fancy-kernels 2.0)": "its import failed: boom"})
    monkeypatch.setattr(plugins, "_registry", registry)
    result = CliRunner().invoke(cli, ["info"])
    assert result.exit_code == 0
    assert "problem with fancy (fancy-kernels 2.0): its import failed: boom" in result.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setenv("ADASPLASH_DB", "postgresql://me:hunter2@nowhere.invalid/configs")
    result = CliRunner().invoke(cli, ["info", *options])
    assert "hunter2" not in result.output
    assert "postgresql://me:***@nowhere.invalid/configs" in result.stdout


def test_a_database_that_cannot_be_used_is_a_line_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "tuned.db"
    broken.write_bytes(b"this is no database" * 100)
    monkeypatch.setenv("ADASPLASH_DB", str(broken))
    result = CliRunner().invoke(cli, ["info"])
    assert result.exit_code == 0
    assert "problem: The tuning database" in result.stdout
