"""The conformance suite is only worth what it finds: every planted fault fails it, and an honest backend passes."""

from __future__ import annotations

import pytest

from adasplash_core.testing.conformance import CheckResult, checks, run_conformance
from tests.conformance.broken import FAULTS, UNTOUCHED, Broken, Honest


def _run(backend: Honest, names: tuple[str, ...]) -> dict[str, CheckResult]:
    return {check.item.name: check.run() for check in checks(backend, ["cpu"]) if check.item.name in names}


@pytest.mark.parametrize("broken", FAULTS, ids=lambda b: b.__name__)
def test_a_planted_fault_fails_the_checks_meant_for_it(broken: Broken) -> None:
    results = _run(broken(), FAULTS[broken])
    assert set(results) == set(FAULTS[broken])
    assert {name: r.status for name, r in results.items()} == dict.fromkeys(FAULTS[broken], "failed")
    assert all(r.message for r in results.values())


@pytest.mark.parametrize("broken", UNTOUCHED, ids=lambda b: b.__name__)
def test_a_planted_fault_leaves_other_checks_alone(broken: Broken) -> None:
    results = _run(broken(), UNTOUCHED[broken])
    assert {name: r.message for name, r in results.items() if r.status != "passed"} == {}
    assert set(results) == set(UNTOUCHED[broken])


def test_an_honest_backend_passes_everything_that_faults_fail() -> None:
    names = tuple({name for group in (*FAULTS.values(), *UNTOUCHED.values()) for name in group})
    results = _run(Honest(), names)
    assert {name: r.message for name, r in results.items() if r.status != "passed"} == {}


class Modest(Honest):
    """Declares almost nothing."""

    name = "modest"
    features = frozenset({"causal"})


def test_only_what_is_declared_is_asked() -> None:
    results = run_conformance(Modest(), ["cpu"], quick=True)
    by_status = {status: {r.check for r in results if r.status == status} for status in ("passed", "failed", "skipped")}
    assert by_status["failed"] == set()
    assert {"plain_1.5_dense", "causal_top_left_37x53", "layout_transposed"} <= by_status["passed"]
    assert {"gqa", "dropout", "alpha_grad_1.2", "backward_runs_twice", "grad_out_of_a_sum"} <= by_status["skipped"]
    skipped = next(r for r in results if r.check == "dropout")
    assert skipped.message == "not declared: dropout"


def test_an_exception_in_a_backend_is_a_failed_check_that_names_its_place() -> None:
    class Raises(Honest):
        def forward(self, call):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("by design")

    result = _run(Raises(), ("plain_1.5_dense",))["plain_1.5_dense"]
    assert result.status == "failed"
    assert "ZeroDivisionError: by design" in result.message
    assert "test_suite_finds_faults.py" in result.message


def test_undeclared_features_need_a_reason() -> None:
    class Overconfident(Honest):
        features = Honest.features - {"dropout"}

        def not_supported_reasons(self, spec, device=None):  # type: ignore[no-untyped-def]
            return []

    result = _run(Overconfident(), ("undeclared_is_refused",))["undeclared_is_refused"]
    assert result.status == "failed"
    assert "dropout" in result.message
