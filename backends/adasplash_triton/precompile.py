"""Compiling a config's kernels for a GPU that this process need not see, into the cache on disk that the GPU's process loads from.

The launch code runs on CPU tensors that nobody fills, with the kernels replaced by recorders (:mod:`adasplash_triton.aot`). What they
were given goes through Triton's own specialisation under a driver that only names the target, so that the cache's keys are those of a
real launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adasplash_core.backend import AttentionCall, CompileReport, KernelConfig, KernelResources
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec, Pass
from adasplash_core.testing.inputs import make_arguments
from adasplash_triton import aot, configs, launch


def precompile(spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig) -> CompileReport | None:
    """See :meth:`adasplash_core.backend.AttentionBackend.precompile`. None for devices whose target is not known from ``device``."""
    if device.type != "cuda" or device.capability is None or device.runtime.startswith("rocm"):
        return None
    kernels = []
    with as_on(device):
        for recorded in _launches(spec, device, pass_, config):
            compiled = recorded.kernel.warmup(**recorded.arguments, grid=(1,), **recorded.options)
            found = aot.cuda_resources(recorded.kernel.__name__, int(compiled.metadata.shared), compiled.asm["cubin"])
            # Triton's kernels have no stack but for what spilled.
            kernels.append(KernelResources(found.name, found.registers, max(found.stack, found.local), found.shared))
    return CompileReport(tuple(kernels))


def _launches(spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig) -> list[aot.Launch]:
    call = _call(spec, config)
    precision = configs.precision_of(spec, device)
    if pass_ == "forward":
        return aot.launches_of(call, precision=precision)
    forward = replace(call, config=configs.default_forward(spec, device))
    saved_by = aot.launches_of(forward)
    return aot.launches_of(forward, call, precision)[len(saved_by) :]


def _call(spec: AttentionSpec, config: KernelConfig) -> AttentionCall:
    assert spec.batch is not None
    assert spec.q_len is not None
    assert spec.kv_len is not None
    batch, q_len, kv_len = (
        (1, spec.batch * spec.q_len, spec.batch * spec.kv_len) if spec.packed else (spec.batch, spec.q_len, spec.kv_len)
    )
    sizes = (
        (spec.heads, q_len, spec.head_dim),
        (spec.kv_heads, kv_len, spec.head_dim),
        (spec.kv_heads, kv_len, spec.head_dim_v),
    )
    dtype = getattr(torch, spec.dtype)
    query, key, value = (torch.empty(batch, *size, dtype=dtype) for size in sizes)
    call = make_call(query, key, value, needs_grad=spec.needs_grad, **make_arguments(spec, "cpu"))
    return replace(call, spec=spec, config=config)


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return f"ahead of time, sm_{self.capability}"  # no real device's number: kernels compiled here are not loaded

    def get_current_stream(self, _device: object) -> int:
        return 0


@contextmanager
def as_on(device: DeviceInfo) -> Iterator[None]:
    """Within, launch code sizes its grids, and Triton compiles, as for ``device``."""
    assert device.capability is not None
    major, minor = device.capability
    before = driver._active
    driver.set_active(_Driver(10 * major + minor))
    try:
        with patch.object(launch, "_multiprocessors", lambda _device: device.multiprocessors):
            yield
    finally:
        driver._active = before
