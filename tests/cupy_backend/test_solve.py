"""When a solve for tau ends: how exact it is then, on rows made to mislead it, and how many looks at the keys it takes.

Scores are chosen freely: query i is a multiple of the i-th unit vector, so that column i of the keys holds the scores of row i.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall, ForwardResult
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from adasplash_cupy import launch
from adasplash_cupy.instances import Instance
from tests.cupy_backend import emulator

BACKEND = emulator.EmulatedCupyBackend()
ROWS = 64
TOL = {torch.float16: 2e-3, torch.float32: 1e-5}
LISTS = {"list_percent": 100, "least_list": 1 << 20}
ALL_KEYS = {"list_percent": 0, "least_list": 0}
PATHS: dict[str, tuple[int, bool, dict[str, Any]]] = {  # keys, whether lists are made, config
    "short": (500, False, {}),
    "short, fewer keys": (120, False, {}),
    "lists": (700, True, {**LISTS}),
    "lists of tiles of 16 keys": (700, True, {**LISTS, "keys": 16}),
    "lists, one tile": (128, True, {**LISTS, "keys": 64}),
    "lists, held": (300, True, {**LISTS, "keys": 64, "stages": 5, "lists_warpgroups": 1, "dense_warpgroups": 1}),
    "all keys": (700, True, ALL_KEYS),
    "all keys, guessed first": (1400, True, {**ALL_KEYS, "keys": 16}),
}


def draw(z: torch.Tensor, dtype: torch.dtype, **given: Any) -> AttentionCall:
    """A call whose rows have the scores ``z`` (ROWS, keys) in units of z, for alpha 1.5 or 2."""
    h = given.get("alpha", 1.5) - 1
    query = torch.eye(ROWS) * (8 / h)  # times scale = 1 / 8 times h
    return make_call(
        query[None, None].to(dtype), z.T[None, None].to(dtype), torch.randn(1, 1, z.shape[1], ROWS).to(dtype), **given
    )


def forward(call: AttentionCall, **config: Any) -> ForwardResult:
    base = BACKEND.default_config(call.spec, device_info("cpu"), "forward")
    with poisoned_memory():
        return BACKEND.forward(dataclasses.replace(call, config=dataclasses.replace(base, **config)))


def scores(call: AttentionCall) -> torch.Tensor:
    """float64, in units of z."""
    return call.query[0, 0].double() @ call.key[0, 0].double().T / 8 * (float(call.alpha) - 1)


def tau_of(found: ForwardResult) -> torch.Tensor:
    """As the backward takes it, (ROWS, 1)."""
    return (found.saved[1].double() - found.saved[2].double())[0, 0, :, None]


def check(call: AttentionCall, found: ForwardResult) -> None:
    """Sum p and the weights of the gradients, u / sum u, are as near as the solve's tolerance and the rounding of tau allow."""
    z, tol = scores(call), TOL[call.query.dtype]
    tau = oracle.attention(call).tau[0, 0, :, None]
    # Of tau itself, and of sums near 1, one of four lanes after another key.
    rounding = 2e-7 * (1 + tau.abs()) + z.shape[1] / 4 * 2**-24 / (z - tau).clamp(min=0).sum(1, keepdim=True)
    sums, exact = (z - tau_of(found)).clamp(min=0), (z - tau).clamp(min=0)
    assert ((sums.square().sum(1) - 1).abs() <= tol + 2 * rounding[:, 0] * exact.sum(1)).all()
    left = torch.stack([gradient_error(z, one_step(z, near(z, 1 + off)), tau) for off in (tol, -tol)]).amax(0)
    keys = (z > tau - rounding).sum(1)
    assert (gradient_error(z, tau_of(found), tau) <= 3 * tol + 2 * left + 2 * rounding[:, 0] * keys / exact.sum(1)).all()


def gradient_error(z: torch.Tensor, tau: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """sum |error| of u / sum u, (ROWS,)."""
    u, want = (z - tau).clamp(min=0), (z - exact).clamp(min=0)
    return (u / u.sum(1, keepdim=True) - want / want.sum(1, keepdim=True)).abs().sum(1)


def near(z: torch.Tensor, total: float) -> torch.Tensor:
    """The tau at which sum p is ``total``."""
    low, high = z.amax(1, keepdim=True) - 2, z.amax(1, keepdim=True)
    for _ in range(60):
        tau = (low + high) / 2
        over = (z - tau).clamp(min=0).square().sum(1, keepdim=True) > total
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    return (low + high) / 2


def one_step(z: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Newton's: what a solve does last, wherever |sum p - 1| is at most the tolerance."""
    u = (z - tau).clamp(min=0)
    f = u.square().sum(1, keepdim=True)
    return tau + (f - f.sqrt()) / u.sum(1, keepdim=True)


# -- rows ---------------------------------------------------------------------------------------------------------------------------


def _spans(low: float, high: float) -> torch.Tensor:
    """One a row, log-uniform."""
    return torch.exp(torch.empty(ROWS, 1).uniform_(low, high) * 2.302585)


def _clusters(keys: int, count: int) -> torch.Tensor:
    z = torch.zeros(ROWS, keys)
    for _ in range(count - 1):
        shares = _spans(-3, 0)
        z = torch.where(torch.rand(ROWS, keys) < shares, z, z - _spans(-3, 0))
    z[:, torch.randint(keys, ())] = 0
    return z


def _one_and_tiny(keys: int) -> torch.Tensor:
    """One key, and all others a little over the threshold that it would have alone."""
    z = _spans(-4, -1).expand(ROWS, keys) - 1
    z = z.clone()
    z[:, torch.randint(keys, ())] = 0
    return z


SHAPES: dict[str, Callable[[int], torch.Tensor]] = {
    "two clusters": lambda keys: _clusters(keys, 2),
    "three clusters": lambda keys: _clusters(keys, 3),
    "exponential": lambda keys: torch.log(torch.rand(ROWS, keys).clamp(min=1e-6)) * _spans(-2.5, 0.5),
    "uniform": lambda keys: torch.rand(ROWS, keys) * _spans(-2.5, 1),
    "normal": lambda keys: torch.randn(ROWS, keys) * _spans(-2.5, 0.7),
    "one key and many tiny ones": _one_and_tiny,
}


@pytest.fixture
def _path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = PATHS[path][1]
    monkeypatch.setattr(launch, "uses_lists", lambda *_: lists)
    if lists:
        monkeypatch.setattr(launch, "short_tile", lambda *_: 0)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_gradient_weights(shape: str, path: str, dtype: torch.dtype) -> None:
    keys, lists, config = PATHS[path]
    call = draw(SHAPES[shape](keys if lists or dtype == torch.float16 else min(keys, 256)), dtype)
    check(call, forward(call, **config))


# -- the guess before all keys are walked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("large", ["inside the sample", "outside the sample"])
def test_a_sample_that_misleads_the_guess(
    large: str, dtype: torch.dtype, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 16th tile holds all of the large keys, or none of them."""
    monkeypatch.setattr(launch, "short_tile", lambda *_: 0)
    keys, tile = 1000, 16
    sampled = torch.arange(keys) // tile % 16 == 0
    where = sampled if large.startswith("inside") else ~sampled
    z = torch.rand(ROWS, keys) * 0.1 + torch.where(where & (torch.rand(ROWS, keys) < 0.5), _spans(-1, 1), torch.zeros(()))
    call = draw(z, dtype, alpha=alpha)
    found = forward(call, **ALL_KEYS, keys=tile)
    want = oracle.attention(call)
    assert oracle.relative_error(found.out, want.out) < {torch.float16: 2e-3, torch.float32: 2e-5}[dtype]
    if alpha == 1.5:
        check(call, found)


# -- looks ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, int]]]:
    """How often each kernel's first thread has stepped its rows since it was last asked."""
    text, counted = emulator._text, "float next = entmax.newton(c, f, s)"

    def counting(instance: Instance) -> str:
        unit = text(instance)
        if counted in unit:
            unit = unit.replace(counted, f"looks_taken += ptx::thread() == 0;\n        {counted}")
            unit = unit.replace("// One look at keys", "static int looks_taken;\n// One look at keys")
            assert unit.count("looks_taken") == 2
        else:
            assert instance.kernel not in ("forward_short", "forward_lists", "forward_dense")
            unit += "static int looks_taken;"
        return unit + "\nAPI int looks() { int taken = looks_taken; looks_taken = 0; return taken; }"

    instances: dict[str, ctypes.CDLL] = {}
    inner = emulator.compiled

    def compiled(instance: Instance) -> ctypes.CDLL:
        instances[instance.kernel] = inner(instance)
        return instances[instance.kernel]

    monkeypatch.setattr(emulator, "_text", counting)
    monkeypatch.setattr(emulator, "compiled", compiled)
    emulator._library.cache_clear()
    yield lambda: {kernel: library.looks() for kernel, library in instances.items()}
    emulator._library.cache_clear()


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(
    ("path", "kernel"),
    [
        ("short", "forward_short"),
        ("lists, one tile", "forward_lists"),
        ("lists of tiles of 16 keys", "forward_dense"),
        ("all keys", "forward_dense"),
    ],
)
def test_the_last_look_is_saved(path: str, kernel: str, looks: Callable[[], dict[str, int]]) -> None:
    """Against calls that ask for tau, where each row is looked at until it is seen to be solved."""
    keys, _, config = PATHS[path]
    fewer = more = 0
    for spread in (0.05, 0.5, 1.0, 2.0, 4.0) * 2:
        z = torch.randn(ROWS, keys) * spread / 2
        forward(draw(z, torch.float16), **config)
        one = looks()[kernel]
        forward(draw(z, torch.float16, return_stats=True), **config)
        two = looks()[kernel]
        assert 0 < one <= two
        fewer, more = fewer + one, more + two
    assert fewer < more


def test_two_looks_are_enough_where_rows_are_nearly_uniform(
    looks: Callable[[], dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After those of the guess, which read a tile in sixteen and are not counted."""
    monkeypatch.setattr(launch, "short_tile", lambda *_: 0)
    monkeypatch.setattr(launch, "uses_lists", lambda *_: True)
    forward(draw(torch.randn(ROWS, 4096) * 0.025, torch.float16), **ALL_KEYS, keys=16)
    assert looks()["forward_dense"] <= 2 * 2
