"""Compiling ahead: what a call will launch, found again by the process that launches it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import PASSES, Pass
from adasplash_cupy import binaries, configs, launch, nvrtc
from adasplash_cupy.backend import CupyBackend
from adasplash_cupy.operands import inputs_of
from adasplash_cupy.precompile import launched, precompile
from adasplash_tuner.measure.compiling import compiles_ahead

HOPPER = DeviceInfo("cuda", "Hopper", capability=(9, 0), multiprocessors=132, shared_memory=227 * 1024)
AMPERE = DeviceInfo("cuda", "Ampere", capability=(8, 0), multiprocessors=108, shared_memory=163 * 1024)
needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")


def a_call(length: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> Any:
    query, key, value = (torch.randn(1, 2, length, dim).to(dtype) for _ in range(3))
    return make_call(query, key, value, needs_grad=True, **arguments)


@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=lambda device: device.name)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "made",
    [
        pytest.param((700, 64), id="lists"),
        pytest.param((700, 256), id="wide heads"),
        pytest.param((300, 64), id="short"),
        pytest.param((200, 128), id="short, wide heads"),
        pytest.param((700, 64, torch.float32), id="float32"),
    ],
)
def test_what_is_compiled_ahead_is_what_the_call_launches(made: tuple[Any, ...], pass_: Pass, device: DeviceInfo) -> None:
    call = a_call(*made)
    backend = CupyBackend()
    config = backend.default_config(call.spec, device, pass_)
    table = inputs_of(call)
    if pass_ == "forward":
        program = launch._forward_program(replace(call, config=config), table)
    else:
        saved = [torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype)) for tensor in backend.saved_spec(call.spec)]
        table |= dict(zip(launch._SAVED, saved, strict=True)) | {"d_out": torch.zeros_like(call.query)}
        program = launch._backward_program(replace(call, config=config), table)
    found = launched(call.spec, pass_, config)
    assert len(found) == len(set(found))
    assert set(found) == {step.instance for step in program.steps}


@needs_nvrtc
def test_the_report_says_what_each_kernel_takes_and_the_binary_is_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    spec = a_call(300, 16).spec
    config = CupyBackend().default_config(spec, HOPPER, "forward")
    report = precompile(spec, HOPPER, "forward", config)
    assert report is not None
    (kernel,) = report.kernels
    (instance,) = launched(spec, "forward", config)
    assert kernel.name == "forward_short"
    assert 0 < kernel.registers <= 255
    assert kernel.spilled == 0
    assert kernel.shared == instance.shared_bytes
    monkeypatch.setattr(nvrtc, "compile_instance", None)  # nothing is compiled again
    assert precompile(spec, HOPPER, "forward", config) == report
    (binary,) = binaries.compiled([instance], 0, (9, 0))
    assert binary.symbol.encode() in binary.content
    assert binary.content.startswith(b"\x7fELF")


@needs_nvrtc
def test_a_config_that_does_not_compile_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    spec = a_call(700, 16).spec
    with pytest.raises(nvrtc.CompileError, match="forward_lists"):
        precompile(spec, AMPERE, "forward", configs.ForwardConfig(keys=256))  # more keys than threads
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".kernel")]


def test_nothing_is_compiled_ahead_for_what_nvrtc_has_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = a_call(700).spec
    config = configs.ForwardConfig()
    assert compiles_ahead(CupyBackend())
    assert precompile(spec, DeviceInfo("cuda", "unknown"), "forward", config) is None
    monkeypatch.setattr(nvrtc, "is_available", lambda: False)
    assert precompile(spec, HOPPER, "forward", config) is None
