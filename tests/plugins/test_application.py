"""The application with every kind of broken plugin installed at once, and one that is sound: nothing stops, every reason is shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.installing import backend_source, install
from tests.plugins.test_loader import BROKEN

BREAKS_COMMANDS = """
    from adasplash_core.hookspecs import hookimpl

    @hookimpl
    def adasplash_register_commands(cli):
        raise OSError("no terminal")
"""

ADDS_A_COMMAND = """
    import click
    from adasplash_core.hookspecs import hookimpl

    @click.command("hello", help="Says hello.")
    def hello():
        click.echo("hello from a plugin")

    @hookimpl
    def adasplash_register_commands(cli):
        cli.add_command(hello)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name, (source, _) in BROKEN.items():
        install(folder, name, source)
    install(folder, "breaks_commands", BREAKS_COMMANDS)
    install(folder, "adds_a_command", ADDS_A_COMMAND)
    install(folder, "sound", backend_source("sound", "unavailable_reasons = lambda self: ['it is Monday']"), version="4.5")
    return folder


def _run(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(site)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _adasplash(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _run(site, "-m", "adasplash_cli.main", *arguments, **environment)


def test_backends_lists_all_with_their_reasons(site: Path) -> None:
    result = _adasplash(site, "backends")
    assert result.returncode == 0
    rows = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
    assert ["torch", "yes"] in [[row[0], row[3]] for row in rows if row[0] == "torch"]
    assert ["torch", f"no: {BROKEN['takes_our_name'][1]} 0.1.0)"] in [[row[0], row[3]] for row in rows if row[0] == "torch"]
    assert ["sound", "4.5", "sound-dist, plugin sound", "no: it is Monday", "for tests"] in rows
    assert ["old", f"no: {BROKEN['old_api'][1]}"] in [[row[0], row[3]] for row in rows if row[0] == "old"]
    for name, (_, reason) in BROKEN.items():
        assert f"{name} ({name}-dist 1.0): {reason}" in result.stdout
    assert (
        "breaks_commands (breaks_commands-dist 1.0): adasplash_register_commands failed: OSError: no terminal" in result.stdout
    )


def test_backends_as_json(site: Path) -> None:
    result = _adasplash(site, "backends", "--json")
    report = json.loads(result.stdout)
    sound = next(b for b in report["backends"] if b["name"] == "sound")
    assert (sound["distribution"], sound["version"], sound["available"]) == ("sound-dist", "4.5", False)
    assert sound["reasons"] == ["it is Monday"]
    usable = [b for b in report["backends"] if b["name"] == "torch" and b["available"]]
    assert usable[0]["distribution"] == "adasplash-core"
    assert "gqa" in usable[0]["features"]
    assert len(report["problems"]) == len(BROKEN) + 1


def test_a_plugins_command_runs_and_is_listed(site: Path) -> None:
    assert _adasplash(site, "hello").stdout == "hello from a plugin\n"
    assert "Says hello." in _adasplash(site, "--help").stdout


def test_attention_works_and_its_errors_name_what_is_broken(site: Path) -> None:
    code = """
import torch, adasplash_core
q = torch.randn(1, 2, 5, 4)
assert adasplash_core.attention(q, q, q).shape == q.shape
assert adasplash_core.attention(q, q, q, backend="torch").shape == q.shape
assert adasplash_core.list_backends()["torch"] == [], adasplash_core.list_backends()["torch"]
for name in ("sound", "old", "nobody"):
    try:
        adasplash_core.attention(q, q, q, backend=name)
    except adasplash_core.errors.AdasplashError as error:
        print(f"<{name}> {error}")
"""
    result = _run(site, "-c", code)
    assert result.returncode == 0, result.stderr
    _, sound, old, nobody = (
        part for part in result.stdout.replace("\n<", "\0<").replace("<sound>", "\0<sound>", 1).split("\0")
    )
    assert "it is Monday" in sound
    assert "old (old_api-dist 1.0): it was built for backend API version 0" in old or "built for backend API version 0" in old
    assert "exits (exits-dist 1.0): its import failed: SystemExit: no licence" in nobody


def test_no_capable_backend_names_what_is_broken(site: Path) -> None:
    code = "import torch, adasplash_core; q = torch.randn(1, 2, 5, 4); adasplash_core.attention(q, q, q)"
    result = _run(site, "-c", code, ADASPLASH_PLUGINS="sound,cannot_import")
    assert result.returncode == 1
    assert "No backend can do this call." in result.stderr
    assert "it is Monday" in result.stderr
    assert "a_module_that_is_not_there" in result.stderr


def test_the_allow_list_keeps_broken_plugins_out(site: Path) -> None:
    result = _adasplash(site, "backends", "--json", ADASPLASH_PLUGINS="torch,tuner")
    report = json.loads(result.stdout)
    assert [b["name"] for b in report["backends"]] == ["torch"]
    assert report["problems"] == {}


@pytest.mark.parametrize(
    ("name", "hint"), [("trch", "Did you mean 'torch'?"), ("sound", "it is Monday"), ("old", "API version 0")]
)
def test_check_of_a_backend_that_cannot_be_checked(site: Path, name: str, hint: str) -> None:
    result = _adasplash(site, "backends", "check", name)
    assert result.returncode in (1, 2)
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
