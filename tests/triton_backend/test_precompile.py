"""Compiling ahead, without a GPU: what it finds out, and that the process with the GPU then compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.runtime import driver

from adasplash_core.backend import CompileReport
from adasplash_core.device import DeviceInfo
from adasplash_core.plugins import registry
from adasplash_core.spec import AttentionSpec
from adasplash_core.testing.inputs import make_call
from adasplash_triton import launch, precompile, program
from adasplash_triton.configs import BackwardConfig, ForwardConfig
from adasplash_triton.runner import Pointer

H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=232_448, runtime="cuda 13.0")
SHORT = AttentionSpec(
    "cuda", "float16", heads=2, kv_heads=2, head_dim=16, head_dim_v=16, batch=1, q_len=64, kv_len=64, needs_grad=True
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield tmp_path
    for kernel in vars(launch).values():  # what this process remembers is not on the next test's disk
        if isinstance(kernel, triton.runtime.jit.JITFunction):
            kernel.device_caches.clear()


def kernels(cache: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in cache.rglob("*.cubin")}


def test_it_tells_registers_spills_and_shared_memory(cache: Path) -> None:
    report = registry().backend("triton").precompile(SHORT, H100, "forward", ForwardConfig(short_rows=16, short_warps=4))
    assert isinstance(report, CompileReport)
    (kernel,) = report.kernels
    assert kernel.name == "forward_short_kernel"
    assert 0 < kernel.registers <= 255
    assert kernel.spilled >= 0
    assert 0 < kernel.shared <= H100.shared_memory
    assert {name.rpartition("/")[2] for name in kernels(cache)} == {"forward_short_kernel.cubin"}


def test_the_launch_on_the_device_finds_everything_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own launch path, on other tensors of the same sizes, up to where it would hand the binary to the driver."""
    forward, backward = ForwardConfig(short_rows=16, short_warps=4), BackwardConfig(block_d=16, block_n=16, num_stages=1)
    precompile.precompile(SHORT, H100, "forward", forward)
    precompile.precompile(SHORT, H100, "backward", backward)
    ahead = kernels(cache)
    assert len(ahead) == 3

    launched = []
    for kernel in vars(launch).values():
        if isinstance(kernel, triton.runtime.jit.JITFunction):
            kernel.device_caches.clear()

    def compile_only(step: program.Step, table: program.Table) -> object:
        arguments = step.resolved(lambda a: Pointer(table[a.role].data_ptr() + a.offset, a.dtype))
        launched.append(step.kernel.run(**arguments, grid=(1,), warmup=True, **step.options))
        return launched[-1]

    monkeypatch.setattr(program, "_launch_by_name", compile_only)
    monkeypatch.setattr(program, "_binaries", {})
    monkeypatch.setattr(launch, "_multiprocessors", lambda _device: H100.multiprocessors)
    with precompile.as_on(H100):
        call = replace(make_call(SHORT, device="cpu", seed=5), config=forward)
        result = launch.forward(call)
        launch.backward(replace(call, config=backward), torch.randn_like(result.out), list(result.saved))
    assert len(launched) == 3
    assert kernels(cache) == ahead


def test_triton_gets_its_driver_back(cache: Path) -> None:
    before = driver._active
    with precompile.as_on(H100):
        assert driver.active.get_current_target().arch == 90
    assert driver._active is before


@pytest.mark.parametrize("device", [replace(H100, type="cpu", capability=None), replace(H100, runtime="rocm 7.0")])
def test_devices_that_it_cannot_compile_for_are_left_to_the_launch(device: DeviceInfo) -> None:
    assert precompile.precompile(SHORT, device, "forward", ForwardConfig()) is None
