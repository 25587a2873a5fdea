"""``adasplash backends check`` on backends that pass, fail and cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result

from adasplash_cli.main import cli
from adasplash_core import plugins
from adasplash_core.backend import AttentionCall, ForwardResult
from adasplash_torch.backend import TorchBackend


class Modest(TorchBackend):
    """Sound, and declares little, to be quick."""

    name = "modest"
    dtypes = frozenset({"float32"})
    features = frozenset({"causal"})


class Wrong(Modest):
    name = "wrong"

    def forward(self, call: AttentionCall) -> ForwardResult:
        found = super().forward(call)
        return replace(found, out=found.out * 1.01) if call.spec.causal else found


class Away(Modest):
    name = "away"

    def unavailable_reasons(self) -> list[str]:
        return ["its driver is on holiday"]


class Elsewhere(Modest):
    name = "elsewhere"
    device_types = frozenset({"tpu"})


@pytest.fixture
def adasplash(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    registry = plugins.Registry()
    for backend in (Modest(), Wrong(), Away(), Elsewhere()):
        plugins._add_backend(registry, plugins.Origin("test", "test-dist", "1"), backend)
    monkeypatch.setattr(plugins, "_registry", registry)
    return lambda *arguments: CliRunner().invoke(cli, ["backends", *arguments])


def test_a_sound_backend_passes(adasplash: Callable[..., Result]) -> None:
    result = adasplash("check", "modest", "--quick")
    assert result.exit_code == 0
    assert " passed, 0 failed, " in result.stdout
    assert "Closest to their bounds" in result.stdout
    assert "skipped: not declared: gqa" in result.stdout


def test_a_wrong_backend_fails_with_numbers_and_exit_code_1(adasplash: Callable[..., Result]) -> None:
    result = adasplash("check", "wrong", "--quick")
    assert result.exit_code == 1
    assert "causal_top_left_37x53" in result.stdout
    assert "out: relative error 1.00e-02, admitted 5.00e-06" in result.stdout
    assert "plain_1.5_dense" not in result.stdout.partition("Closest")[0]


def test_json_holds_every_result(adasplash: Callable[..., Result]) -> None:
    result = adasplash("check", "wrong", "--quick", "--json", "--device", "cpu")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["backend"], report["quick"]) == ("wrong", True)
    by_name = {r["check"]: r for r in report["results"]}
    assert by_name["causal_top_left_37x53"]["status"] == "failed"
    assert by_name["plain_1.5_dense"]["status"] == "passed"
    assert 0 < by_name["plain_1.5_dense"]["error"] <= by_name["plain_1.5_dense"]["bound"]
    assert by_name["dropout"] == {
        "check": "dropout",
        "dtype": "float32",
        "device": "cpu",
        "status": "skipped",
        "error": 0.0,
        "bound": 0.0,
        "message": "not declared: dropout",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["away"], "Backend 'away' is not available here: its driver is on holiday."),
        (["elsewhere"], "Backend 'elsewhere' runs on tpu, and this machine has no such device."),
        (["modets"], "Did you mean 'modest'?"),
        (["modest", "--device", "nonsense"], "Invalid value for --device"),
    ],
)
def test_what_cannot_be_checked_is_an_error(adasplash: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = adasplash("check", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stdout == ""


def test_the_table_says_what_is_available_and_why_not(adasplash: Callable[..., Result]) -> None:
    result = adasplash()
    assert result.exit_code == 0
    assert "no: its driver is on holiday" in result.stdout
    assert len([line for line in result.stdout.splitlines() if " yes " in line]) == 3
