"""TF32 is used exactly where PyTorch's setting allows it: what is read, and that it reaches every kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import ConfigRejectedError
from adasplash_triton import aot, configs, launch
from adasplash_triton.backend import TritonBackend
from adasplash_triton.operands import describe, inputs_of, precision_of
from adasplash_triton.program import Program, Programs, Table
from tests.triton_backend.precision import restored, tf32

BACKEND = TritonBackend()
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=aot.SHARED_MEMORY["sm_90"])
A10 = DeviceInfo("cuda", "A10", capability=(8, 6), multiprocessors=72, shared_memory=aot.SHARED_MEMORY["sm_86"])


def call_of(length: int = 1024, dim: int = 64, dtype: torch.dtype = torch.float32) -> AttentionCall:
    call = make_call(*(torch.zeros(1, 2, length, dim, dtype=dtype) for _ in range(3)), is_causal=True, needs_grad=True)
    return dataclasses.replace(call, config=BACKEND.default_config(call.spec, H100, "forward"))


def set_new(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_old(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ([lambda: set_old(True)], "tf32"),
        ([lambda: torch.set_float32_matmul_precision("high")], "tf32"),
        ([lambda: torch.set_float32_matmul_precision("medium")], "tf32"),
        ([lambda: set_new("tf32")], "tf32"),
        ([lambda: set_old(True), lambda: set_new("ieee")], "ieee"),
        ([lambda: set_new("tf32"), lambda: set_old(False)], "ieee"),
        ([lambda: torch.set_float32_matmul_precision("highest"), lambda: set_new("tf32")], "tf32"),
    ],
)
def test_every_setting_of_pytorch_is_read_after_any_other(settings: list[Callable[[], None]], precision: str) -> None:
    with restored():
        for apply in settings:
            apply()
        assert precision_of(call_of()) == precision


def test_settings_are_left_as_they_were() -> None:
    before = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    with tf32():
        pass
    assert (torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()) == before


def test_half_precision_knows_no_tf32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        call = call_of(dtype=dtype)
        with tf32():
            assert precision_of(call) == "ieee"


def test_rows_that_do_not_fit_are_multiplied_exactly() -> None:
    with tf32():
        found = {(dim, device.name): precision_of(call_of(dim=dim), device) for dim in (64, 128, 256) for device in (H100, A10)}
    exact = {key for key, precision in found.items() if precision == "ieee"}
    assert exact == {(256, "H100"), (128, "A10"), (256, "A10")}


@pytest.mark.parametrize("length", [1024, 128])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_every_kernel_is_told(precision: configs.Precision, length: int) -> None:
    forward = call_of(length)
    backward = dataclasses.replace(forward, config=BACKEND.default_config(forward.spec, H100, "backward"))
    recorded = aot.launches_of(forward, backward, precision)
    assert all("PRECISION" in x.kernel.arg_names for x in recorded)
    assert {x.arguments["PRECISION"] for x in recorded} == {precision}
    assert len(recorded) == (6 if length == 1024 else 3)


def test_the_setting_takes_effect_at_once_and_both_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Program] = []

    def record(self: Program, table: Table, device: torch.device) -> None:
        table.update({x.role: x.allocate(device) for x in self.outputs})
        ran.append(self)

    monkeypatch.setattr(Program, "__call__", record)
    monkeypatch.setattr(launch, "_forwards", Programs())
    monkeypatch.setattr(launch, "_backwards", Programs())
    forward = call_of()
    backward = dataclasses.replace(forward, config=BACKEND.default_config(forward.spec, H100, "backward"))
    for allowed in (False, True, False, True):
        with tf32(allowed):
            result = BACKEND.forward(forward)
        with tf32(not allowed):  # a backward asks for itself
            BACKEND.backward(backward, result.out, result.saved, None)
    used = [{step.arguments["PRECISION"] for step in program.steps} for program in ran]
    assert used == [{"ieee"}, {"tf32"}, {"tf32"}, {"ieee"}] * 2
    assert ran[:4] == ran[4:]  # programs are compared by identity


def test_a_config_tuned_for_exact_products_that_does_not_fit_tf32_gives_way_and_is_not_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned = configs.ForwardConfig(dense_keys=128, dense_stages=4)
    tried: list[int] = []

    def run(self: Program, table: Table, device: torch.device) -> None:
        (keys,) = {step.arguments["BD"] for step in self.steps if step.kernel.__name__ == "forward_dense_kernel"}
        tried.append(keys)
        if keys == 128:
            raise ConfigRejectedError("triton", tuned, "out of resource: shared memory")
        table.update({x.role: x.allocate(device) for x in self.outputs})

    monkeypatch.setattr(Program, "__call__", run)
    monkeypatch.setattr(launch, "_forwards", Programs())
    call = dataclasses.replace(call_of(), config=tuned)
    with tf32():
        BACKEND.forward(call)
        BACKEND.forward(call)  # the program that runs was kept
    default = configs.default_for_tf32(tuned, call.spec, device_info("cpu"))
    assert isinstance(default, configs.ForwardConfig)
    assert tried == [128, default.dense_keys, default.dense_keys]
    with pytest.raises(ConfigRejectedError):
        BACKEND.forward(call)


def test_descriptions_of_half_precision_do_not_follow_the_setting() -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        call = call_of(dtype=dtype)
        for allowed in (False, True):
            with tf32(allowed):
                found.append(describe(call, inputs_of(call), precision_of(call)))
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_only_defaults_are_exchanged() -> None:
    spec = call_of().spec
    for pass_ in ("forward", "backward"):
        default = BACKEND.default_config(spec, H100, pass_)
        exchanged = configs.for_tf32(default, spec, H100)
        assert exchanged != default
        assert configs.for_tf32(exchanged, spec, H100) == exchanged
    chosen = configs.ForwardConfig(list_keys=16)
    assert configs.for_tf32(chosen, spec, H100) == chosen
