"""The conformance suite: runs a backend through :data:`CASES` and :data:`BEHAVIOURS`, sized by what it declares.

With pytest::

    class TestMyBackend(AttentionConformance):
        backend = MyBackend()

Without: :func:`run_conformance`, which is what ``adasplash backends check NAME`` prints.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch

from adasplash_core.backend import AttentionBackend
from adasplash_core.errors import AdasplashError
from adasplash_core.precision import tf32
from adasplash_core.testing.behaviours import BEHAVIOURS, Behaviour
from adasplash_core.testing.cases import CASES, Case
from adasplash_core.testing.compare import ConformanceError, Measured
from adasplash_core.testing.target import Target, UndeclaredError

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check: the worst relative error found and what was admitted for it, both 0 where nothing was measured."""

    check: str
    dtype: str
    device: str
    status: Status
    error: float = 0.0
    bound: float = 0.0
    message: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One case or behaviour on one device in one dtype."""

    target: Target
    item: Case | Behaviour

    @property
    def id(self) -> str:
        device = "" if self.target.device == "cpu" else f"-{self.target.device}"
        return f"{self.item.name}-{self.target.dtype}{device}"

    def declared(self) -> bool:
        """Whether the backend declares what this check needs."""
        if isinstance(self.item, Behaviour):
            return not self.item.undeclared(self.target)
        try:
            needs_grad = self.item.build(self.target).spec.needs_grad
        except UndeclaredError:
            return False
        return needs_grad or self.item.grad_out is None

    def run(self) -> CheckResult:
        """Never raises for what the backend does: that is a result."""
        status: Status = "passed"
        measured, message = Measured(), ""
        try:
            with _one_thread(), tf32(False):  # the dtype is checked as it is, whatever the settings are
                measured = self._measure() or measured
            message = measured.what
        except UndeclaredError as reason:
            status, message = "skipped", str(reason)
        except ConformanceError as failure:
            status, message = "failed", str(failure)
        except Exception as error:  # a stranger's backend may fail in any way
            where = traceback.extract_tb(error.__traceback__)[-1]
            status, message = "failed", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno} in {where.name})"
        return CheckResult(
            self.item.name, self.target.dtype, self.target.device, status, measured.error, measured.bound, message
        )

    def _measure(self) -> Measured | None:
        if isinstance(self.item, Behaviour):
            if reason := self.item.undeclared(self.target):
                raise UndeclaredError(reason)
            return self.item.run(self.target)
        call = self.item.build(self.target)
        grad_out = None
        if self.item.grad_out is not None:
            if not call.spec.needs_grad:
                raise UndeclaredError("not declared: backward")
            grad_out = self.item.grad_out(
                torch.empty((*call.query.shape[:3], call.value.shape[3]), dtype=call.query.dtype, device=call.query.device)
            )
        return self.target.check(call, grad_out)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch's threads cost the small sizes here ten times what they bring on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def devices_of(backend: AttentionBackend) -> list[str]:
    """The devices of this machine that a backend declares, CPU first."""
    here = ["cpu"]
    if torch.cuda.is_available():
        here.append("cuda")
    return [device for device in here if backend.device_types is None or device in backend.device_types]


def checks(backend: AttentionBackend, devices: Sequence[str] | None = None, quick: bool = False) -> Iterator[Check]:
    """All checks of a backend, undeclared ones included (they end as skipped)."""
    items: list[Case | Behaviour] = [*BEHAVIOURS, *CASES]
    for device in devices_of(backend) if devices is None else devices:
        for dtype in sorted(backend.dtypes):
            target = Target(backend, device, dtype)
            yield from (Check(target, item) for item in items if item.quick or not quick)


def run_conformance(
    backend: AttentionBackend,
    devices: Sequence[str] | None = None,
    quick: bool = False,
    on_result: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Run every check and return the results.

    Parameters
    ----------
    devices: torch devices, by default those of this machine that the backend declares.
    quick: a third of the checks: one of each kind.
    on_result: called after every check, for progress.

    Raises
    ------
    AdasplashError: if the backend cannot run here at all, with its reasons.
    """
    if reasons := backend.unavailable_reasons():
        raise AdasplashError(f"Backend {backend.name!r} is not available here: {'; '.join(reasons)}.")
    devices = devices_of(backend) if devices is None else devices
    if not devices:
        wanted = ", ".join(sorted(backend.device_types or ()))
        raise AdasplashError(f"Backend {backend.name!r} runs on {wanted}, and this machine has no such device.")
    results = []
    for check in checks(backend, devices, quick):
        results.append(check.run())
        if on_result is not None:
            on_result(results[-1])
    return results


class AttentionConformance:
    """Base of a pytest class that checks one backend; subclass it and set ``backend``.

    Only what the backend declares becomes a test. ``devices`` and ``quick`` are as in :func:`run_conformance`.
    """

    backend: ClassVar[AttentionBackend]
    devices: ClassVar[Sequence[str] | None] = None
    quick: ClassVar[bool] = False

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "conformance_check" in metafunc.fixturenames:
            chosen = [] if self.backend.unavailable_reasons() else checks(self.backend, self.devices, self.quick)
            declared = [check for check in chosen if check.declared()]
            metafunc.parametrize("conformance_check", declared, ids=[check.id for check in declared])

    def test_conformance(self, conformance_check: Check) -> None:
        result = conformance_check.run()
        if result.status == "skipped":
            import pytest

            pytest.skip(result.message)
        assert result.status == "passed", result.message
