"""What is shipped: the wheel and the source distribution, built as a user's pip would."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {
    Path(p).name
    for p in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


class TestWheel:
    def test_is_for_every_platform(self, wheel: Path) -> None:
        assert wheel.name == f"adasplash_core-{PROJECT['version']}-py3-none-any.whl"

    def test_ships_our_packages_and_no_other_name(self, names: list[str]) -> None:
        top = {name.partition("/")[0] for name in names}
        assert top == PACKAGES | {f"adasplash_core-{PROJECT['version']}.dist-info"}
        assert all(name.startswith("adasplash_") for name in top)

    def test_ships_every_source_file_and_nothing_left_over(self, names: list[str]) -> None:
        tracked = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "adasplash_core", "backends", "tuner", "cli"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if tracked.returncode != 0:
            pytest.skip("not a git checkout")
        parents = ("backends/", "tuner/", "cli/")
        sources = {next((p.removeprefix(f) for f in parents if p.startswith(f)), p) for p in tracked.stdout.split()}
        shipped = {name for name in names if ".dist-info/" not in name}
        assert shipped == {s for s in sources if s.partition("/")[0] in PACKAGES}

    def test_is_typed(self, names: list[str]) -> None:
        assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)

    def test_declares_scripts_and_plugins(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
            points = configparser.ConfigParser()
            points.read_string(archive.read(name).decode())
        assert dict(points["console_scripts"]) == PROJECT["scripts"]
        assert dict(points["adasplash"]) == PROJECT["entry-points"]["adasplash"]

    def test_carries_the_licence(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("LICENSE"))
            assert archive.read(name) == (ROOT / "LICENSE").read_bytes()

    def test_works_where_it_is_installed(self, wheel: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
        subprocess.run(pip, check=True)
        program = f"""
import importlib, json, torch, adasplash_core
homes = {{name: importlib.import_module(name).__file__ for name in {sorted(PACKAGES)!r}}}
q = torch.randn(1, 2, 16, 8, requires_grad=True)
adasplash_core.attention(q, q, q, is_causal=True).sum().backward()
print(json.dumps({{"homes": homes, "finite": bool(q.grad.isfinite().all()), "backends": adasplash_core.list_backends()}}))
"""
        # -S leaves out the .pth files, and so the editable install of the checkout; its dependencies come from the path.
        path = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
        environment = os.environ | {
            "PYTHONPATH": path,
            "ADASPLASH_DB": str(tmp_path / "tuned.db"),
            "ADASPLASH_PLUGINS": "torch,tuner",
        }
        done = subprocess.run(
            [sys.executable, "-S", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert all(Path(home).is_relative_to(target) for home in seen["homes"].values())
        assert seen["finite"]
        assert seen["backends"]["torch"] == []


class TestSourceDistribution:
    def test_holds_what_building_and_testing_needs(self, built: Path) -> None:
        (path,) = built.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            members = {name.partition("/")[2] for name in archive.getnames()}
        for needed in (
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "Makefile",
            "adasplash_core/api.py",
            "tests/packaging/test_distribution.py",
        ):
            assert needed in members
        kinds = (".safetensors", ".gguf", ".db", ".pyc", ".so")
        assert not [name for name in members if name.endswith(kinds) or name.startswith((".venv", "build/", "site/", ".git/"))]
