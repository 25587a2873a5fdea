"""Measuring stored winners again: whether they still run, are as accurate and as fast as when they were stored."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adasplash_core.call import make_call
from adasplash_core.configs import parse_explicit
from adasplash_core.errors import ArgumentError
from adasplash_core.precision import tf32
from adasplash_core.testing import inputs
from adasplash_core.workload import Workload
from adasplash_tuner.key import is_of_machine
from adasplash_tuner.measure.bench import Bench, Case, timer_for
from adasplash_tuner.measure.statistics import Samples
from adasplash_tuner.shapes.shape import Shape
from adasplash_tuner.storage.records import BestConfig, Row

if TYPE_CHECKING:
    from adasplash_core.device import DeviceInfo
    from adasplash_core.plugins import Registry
    from adasplash_core.spec import Pass

ROUNDS = 7
ACCEPTED = 2.0
"""Where the default itself misses the dtype's bound, a config may be off by so many times as much, as in the search."""

_WARM = ", warm L2"
_RANDOM = re.compile(rf"random, ([\w+]+)(?:{_WARM})?")
_LAYERS = re.compile(rf"(.+) \(([0-9a-f]{{8}})\), layers ([\d,]+?)(?:{_WARM})?")


@dataclass(frozen=True)
class Drift:
    """What measuring a row again gave.

    ``problem``: why it was not measured, or why it must not be used (``is_fault``). ``lost``: the device cannot be used any more.
    """

    row: Row
    now_ms: float | None = None
    default_ms: float | None = None  # the default config, in turns with it
    error: float | None = None
    problem: str = ""
    is_fault: bool = False
    lost: bool = False

    @property
    def percent(self) -> float | None:
        """How much longer it takes than when it was stored; negative if it takes less."""
        record = self.row.record
        return None if self.now_ms is None or record is None else (self.now_ms / record.median_ms - 1) * 100


def measure_again(
    rows: Sequence[Row],
    registry: Registry,
    device: DeviceInfo,
    *,
    sample: int | None = None,
    workload: str | None = None,
    budget_s: float = float("inf"),
) -> Iterator[Drift]:
    """Measure rows on ``device``, in random order until the time is over; those of other machines and code are left out.

    Parameters
    ----------
    sample: at most so many, chosen at random; None: all.
    workload: the file on whose layers rows were measured, for those that were.
    """
    chosen = [row for row in rows if row.usable is not None and _is_of(row.usable, registry, device)]
    random.shuffle(chosen)
    deadline = time.monotonic() + budget_s
    for row in chosen[:sample]:
        if time.monotonic() > deadline:
            return
        with torch.cuda.device(device.index) if device.type == "cuda" else nullcontext():
            drift = _measure(row, registry, device, workload)
        yield drift
        if drift.lost:
            return


def _is_of(record: BestConfig, registry: Registry, device: DeviceInfo) -> bool:
    """Whether this is a result of this machine and the installed code."""
    backend = registry.backends.get(record.key.backend)
    return backend is not None and backend.code_hash() == record.key.code_hash and is_of_machine(record.key, device)


def _pass(record: BestConfig) -> Pass:
    return "backward" if record.key.pass_ == "backward" else "forward"


def _measure(row: Row, registry: Registry, device: DeviceInfo, workload: str | None) -> Drift:
    record = row.record
    assert record is not None
    backend, pass_ = registry.backend(record.key.backend), _pass(record)
    target = torch.device(device.type, device.index) if device.type != "cpu" else torch.device("cpu")
    try:
        cases = _cases(record, target, workload)
    except ArgumentError as missing:
        return Drift(row, problem=str(missing))
    config = parse_explicit(backend, {pass_: record.config}, pass_)
    assert config is not None
    try:
        bench = Bench(backend, device, pass_, cases, timer_for(target, not record.inputs.endswith(_WARM)))
        default_error, _ = bench.check(bench.default)
    except Exception as failure:
        return _unmeasured(row, "was not measured, as the default config fails", failure, is_fault=False)
    bound = bench.error_bound()
    try:
        error, _ = bench.check(config)
        if not error <= (bound if default_error <= bound else ACCEPTED * default_error):  # "not <=" holds for NaN, too
            return Drift(row, error=error, problem=f"is off by {error:.1e}, more than {bound:.0e}", is_fault=True)
        tuned, default = Samples(), Samples()
        for _ in range(ROUNDS):
            tuned.add(bench.time(config))
            default.add(bench.time(bench.default))
    except torch.OutOfMemoryError as failure:  # others use this device, too
        return _unmeasured(row, "was not measured", failure, is_fault=False)
    except Exception as failure:
        return _unmeasured(row, "does not run", failure, is_fault=True)
    return Drift(row, tuned.median_ms, default.median_ms, error)


def _unmeasured(row: Row, words: str, failure: Exception, *, is_fault: bool) -> Drift:
    problem = f"{words}: {type(failure).__name__}: {failure}"
    return Drift(row, problem=problem, is_fault=is_fault, lost=Bench.is_fatal(failure))


def _cases(record: BestConfig, target: torch.device, workload: str | None) -> list[Case]:
    """The inputs that a record was measured on. Raises ArgumentError if they cannot be had."""
    needs_grad = record.key.pass_ == "backward"
    if match := _RANDOM.fullmatch(record.inputs):
        spec = Shape.parse(record.shape).spec(target.type, needs_grad)
        classes = match[1].split("+")
        if unknown := set(classes) - set(inputs.QUERY_SCALE):
            raise ArgumentError("Inputs must be of a known class.", seen=", ".join(sorted(unknown)))
        return [Case(name, inputs.make_call(spec, name, target)) for name in classes]  # type: ignore[arg-type]
    match = _LAYERS.fullmatch(record.inputs)
    if match is None or workload is None:
        raise ArgumentError("The inputs of a row must be at hand.", seen=record.inputs, hint="pass their file as --workload")
    file = Workload.load(workload)
    with file.path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:8]
    if digest != match[2]:
        raise ArgumentError("--workload must be the file it was measured on.", seen=f"{digest} instead of {match[2]}")
    layers = [file.layer(int(number)).to(target) for number in match[3].split(",")]
    with tf32(record.key.dtype == "tf32"):
        return [Case(f"layer {layer.index}", make_call(**layer.kwargs(), needs_grad=needs_grad)) for layer in layers]
