"""Compiling a config's kernels in a process that need not see a GPU, into the folder where the process with the GPU looks for them."""

from __future__ import annotations

from adasplash_core.backend import CompileReport, KernelConfig, KernelResources
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec, Pass
from adasplash_cupy import configs, nvrtc
from adasplash_cupy.binaries import compiled_ahead
from adasplash_cupy.instances import Instance


def precompile(spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig) -> CompileReport | None:
    """See :meth:`adasplash_core.backend.AttentionBackend.precompile`. None where the target is not known, or NVRTC is not there."""
    if device.type != "cuda" or device.capability is None or not nvrtc.is_available():
        return None
    kernels = []
    for instance in launched(spec, pass_, config):
        binary = compiled_ahead(instance, device.capability)
        kernels.append(KernelResources(instance.kernel, binary.registers, binary.spilled, instance.shared_bytes))
    return CompileReport(tuple(kernels))


def launched(spec: AttentionSpec, pass_: Pass, config: KernelConfig) -> list[Instance]:
    """What one pass of a call with this spec launches, if NVRTC compiles all of it."""
    if pass_ == "backward":
        assert isinstance(config, configs.BackwardConfig)
        found = configs.backward_instances(spec, config)
        if spec.deterministic or (spec.kv_len is not None and not configs.uses_lists(spec, spec.kv_len)):
            del found["backward_lists"]
        return list(found.values())
    assert isinstance(config, configs.ForwardConfig)
    assert spec.kv_len is not None
    if tile := configs.short_tile(spec, spec.kv_len):
        return [configs.short_instance(spec, config, tile)]
    found = configs.forward_instances(spec, config)
    if not configs.uses_lists(spec, spec.kv_len):
        return [found["forward_dense"]]
    if "forward_mark" in found:
        del found["forward_select"]
    return list(found.values())
