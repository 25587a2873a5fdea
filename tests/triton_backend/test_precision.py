"""Products are taken in TF32 exactly where a call's spec allows it and the kernels fit, and every kernel is told."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.precision import tf32
from adasplash_core.programs import Programs
from adasplash_core.spec import PASSES, Pass
from adasplash_triton import aot, configs, launch, precompile
from adasplash_triton.backend import TritonBackend
from adasplash_triton.configs import precision_of
from adasplash_triton.program import Program, Table

BACKEND = TritonBackend()
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=aot.SHARED_MEMORY["sm_90"])
A10 = DeviceInfo("cuda", "A10", capability=(8, 6), multiprocessors=72, shared_memory=aot.SHARED_MEMORY["sm_86"])


def call_of(length: int = 1024, dim: int = 64, dtype: torch.dtype = torch.float32, tf32: bool = False) -> AttentionCall:
    call = make_call(*(torch.zeros(1, 2, length, dim, dtype=dtype) for _ in range(3)), is_causal=True, needs_grad=True)
    call.spec = dataclasses.replace(call.spec, tf32=tf32)
    return dataclasses.replace(call, config=BACKEND.default_config(call.spec, H100, "forward"))


def test_tf32_is_used_where_the_spec_allows_it_and_the_rows_fit() -> None:
    found = {
        (dim, device.name): precision_of(call_of(dim=dim, tf32=True).spec, device)
        for dim in (64, 128, 256)
        for device in (H100, A10)
    }
    exact = {key for key, precision in found.items() if precision == "ieee"}
    assert exact == {(256, "H100"), (128, "A10"), (256, "A10")}
    assert precision_of(call_of().spec, H100) == "ieee"
    assert precision_of(call_of(dtype=torch.bfloat16).spec, H100) == "ieee"


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dim", [64, 128])
def test_defaults_and_candidates_follow_the_spec(dim: int, pass_: Pass) -> None:
    exact, rounded = (call_of(dim=dim, tf32=allowed).spec for allowed in (False, True))
    defaults = [BACKEND.default_config(spec, H100, pass_) for spec in (exact, rounded)]
    assert defaults[0] != defaults[1]
    spaces = [set(BACKEND.tuning_space(spec, H100, pass_)) for spec in (exact, rounded)]
    assert spaces[0] != spaces[1]
    half = dataclasses.replace(exact, dtype="bfloat16")
    assert BACKEND.default_config(half, H100, pass_) != defaults[1]


@pytest.mark.parametrize("pass_", PASSES)
def test_where_the_rows_do_not_fit_the_defaults_are_those_of_exact_products(pass_: Pass) -> None:
    exact, rounded = (call_of(dim=256, tf32=allowed).spec for allowed in (False, True))
    assert BACKEND.default_config(rounded, H100, pass_) == BACKEND.default_config(exact, H100, pass_)


@pytest.mark.parametrize("length", [1024, 128])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_every_kernel_is_told(precision: configs.Precision, length: int) -> None:
    forward = call_of(length)
    backward = dataclasses.replace(forward, config=BACKEND.default_config(forward.spec, H100, "backward"))
    recorded = aot.launches_of(forward, backward, precision)
    assert all("PRECISION" in x.kernel.arg_names for x in recorded)
    assert {x.arguments["PRECISION"] for x in recorded} == {precision}
    assert len(recorded) == (6 if length == 1024 else 3)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("allowed", [False, True])
def test_what_is_compiled_ahead_is_what_the_spec_says(allowed: bool, pass_: Pass) -> None:
    spec = dataclasses.replace(call_of(tf32=allowed).spec, device_type="cuda")
    with precompile.as_on(H100), tf32(not allowed):  # the process's own setting says nothing
        recorded = precompile._launches(spec, H100, pass_, BACKEND.default_config(spec, H100, pass_))
    assert {x.arguments["PRECISION"] for x in recorded} == {"tf32" if allowed else "ieee"}


def test_both_passes_follow_the_spec_and_not_the_setting_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Program] = []

    def record(self: Program, table: Table, device: torch.device) -> None:
        table.update({x.role: x.allocate(device) for x in self.outputs})
        ran.append(self)

    monkeypatch.setattr(Program, "__call__", record)
    monkeypatch.setattr(launch, "_forwards", Programs())
    monkeypatch.setattr(launch, "_backwards", Programs())
    calls = {allowed: call_of(tf32=allowed) for allowed in (False, True)}
    backward_configs = {allowed: BACKEND.default_config(call.spec, H100, "backward") for allowed, call in calls.items()}
    for allowed in (False, True, False, True):
        with tf32(not allowed):
            result = BACKEND.forward(calls[allowed])
            backward = dataclasses.replace(calls[allowed], config=backward_configs[allowed])
            BACKEND.backward(backward, result.out, result.saved, None)
    used = [{step.arguments["PRECISION"] for step in program.steps} for program in ran]
    assert used == [{"ieee"}, {"ieee"}, {"tf32"}, {"tf32"}] * 2
    assert ran[:4] == ran[4:]  # programs are compared by identity
