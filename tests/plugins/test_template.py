"""examples/plugin-template as a stranger would use it: installed with pip into a virtual environment, checked there and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "examples" / "plugin-template"


class Environment:
    """A virtual environment that sees this one's packages, so that nothing is downloaded."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.folder = folder
        site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        parent = sysconfig.get_path("purelib")
        # addsitedir, unlike a bare path, also follows that folder's own .pth files: those of editable installs.
        (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n", encoding="utf-8")

    def run(self, *arguments: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
        result = subprocess.run(
            [str(self.python), *arguments], cwd=cwd or self.folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def adasplash(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "adasplash_cli.main", *arguments, check=check)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(TEMPLATE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "dist"))
    made = Environment(folder / "venv")
    made.run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", str(folder / "source"))
    return made


def test_it_is_listed_with_its_origin(environment: Environment) -> None:
    report = json.loads(environment.adasplash("backends", "--json").stdout)
    assert report["problems"] == {}
    numpy = next(b for b in report["backends"] if b["name"] == "numpy")
    assert (numpy["plugin"], numpy["distribution"], numpy["version"]) == ("numpy", "adasplash-numpy", "0.1.0")
    assert numpy["available"]


def test_its_own_tests_pass_there(environment: Environment, tmp_path: Path) -> None:
    shutil.copytree(TEMPLATE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    result = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "tests"), cwd=tmp_path)
    summary = result.stdout.strip().splitlines()[-1]
    assert "failed" not in summary
    assert "skipped" not in summary
    assert int(summary.split(" passed")[0].split()[-1]) > 100


def test_check_command_passes_it(environment: Environment) -> None:
    report = json.loads(environment.adasplash("backends", "check", "numpy", "--quick", "--json").stdout)
    status = {(r["check"], r["dtype"]): r["status"] for r in report["results"]}
    assert set(status.values()) == {"passed", "skipped"}
    assert status["plain_1.5_dense", "float64"] == "passed"
    assert status["gqa", "float32"] == "skipped"


def test_attention_uses_it_by_name_and_says_what_it_cannot_do(environment: Environment) -> None:
    code = """
import torch, adasplash_core
q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
grads = {}
for backend in ("numpy", "torch"):
    out = adasplash_core.attention(q, k, v, is_causal=True, kv_lengths=torch.tensor([40, 7]), backend=backend)
    grads[backend] = (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))
torch.testing.assert_close(grads["numpy"], grads["torch"])
try:
    adasplash_core.attention(q, k, v, backend="numpy", window=(3, 3), alpha=1.2)
except adasplash_core.errors.BackendUnsupportedError as error:
    print(error)
"""
    message = environment.run("-c", code).stdout
    assert "Backend 'numpy' cannot do this call" in message
    assert "sliding windows not supported" in message
    assert "alpha other than 1, 1.5 and 2 not supported" in message
