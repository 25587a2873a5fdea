"""TritonBackend: what it supports, and the door to its kernels. Imports torch and triton on first use only."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adasplash_core.backend import (
    AttentionBackend,
    AttentionCall,
    CompileReport,
    ForwardResult,
    Gradients,
    HeadDims,
    KernelConfig,
    SavedTensor,
)
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import FEATURES, AttentionSpec, Pass
from adasplash_triton import configs
from adasplash_triton.transform import EntmaxTransform

if TYPE_CHECKING:
    import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


class TritonBackend(EntmaxTransform, AttentionBackend):
    """Exact entmax attention that visits only the keys a block of queries can weigh; see :mod:`adasplash_triton.kernels`."""

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "gathered columns, one dense pass, on NVIDIA GPUs"
    priority: ClassVar[int] = 50
    # The interpreter runs the same kernels on CPU tensors; its products do not know bfloat16.
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cuda", "cpu"}) if _INTERPRETED else frozenset({"cuda"})
    dtypes: ClassVar[frozenset[str]] = frozenset({"float16", "bfloat16", "float32"}) - ({"bfloat16"} if _INTERPRETED else set())
    head_dims: ClassVar[HeadDims] = HeadDims(low=16, high=256, multiple_of=8)
    min_capability: ClassVar[tuple[int, int] | None] = (8, 0)
    features: ClassVar[frozenset[str]] = frozenset(FEATURES) - {"bool_mask", "additive_mask", "mask_grad"}

    def unavailable_reasons(self) -> list[str]:
        if importlib.util.find_spec("triton") is None:
            return ["triton is not installed"]
        if not _INTERPRETED and not _cuda_visible():
            return ["torch sees no CUDA device"]
        return []

    def not_supported_reasons(self, spec: AttentionSpec, device: DeviceInfo | None = None) -> list[str]:
        reasons = super().not_supported_reasons(spec, device)
        if device is not None and spec.dtype in self.dtypes and not configs.fits(spec, device):
            widest = max(spec.head_dim, spec.head_dim_v)
            reasons.append(
                f"{spec.dtype} with head dim {widest} needs more shared memory than {device.name} has ({device.shared_memory} bytes)"
            )
        return reasons

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        from adasplash_triton.launch import saved_shapes

        assert spec.batch is not None
        assert spec.q_len is not None
        assert spec.kv_len is not None
        sizes = (spec.batch, spec.heads, spec.kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.head_dim_v)
        shapes = saved_shapes(sizes, _ITEMSIZE[spec.dtype], not spec.deterministic)
        dtypes = (spec.dtype, "float32", "int32")
        return [SavedTensor(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def forward(self, call: AttentionCall) -> ForwardResult:
        from adasplash_triton import launch

        return launch.forward(call)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        from adasplash_triton import launch

        return launch.backward(call, grad_out, list(saved))

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return configs.ForwardConfig if pass_ == "forward" else configs.BackwardConfig

    def default_config(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> KernelConfig:
        return configs.default_forward(spec, device) if pass_ == "forward" else configs.default_backward(spec, device)

    def tuning_space(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> Iterable[KernelConfig]:
        return configs.forward_space(spec, device) if pass_ == "forward" else configs.backward_space(spec, device)

    def precompile(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig) -> CompileReport | None:
        from adasplash_triton import precompile

        return precompile.precompile(spec, device, pass_, config)

    def toolchain(self) -> str:
        import torch
        import triton

        return f"triton {triton.__version__}, torch {torch.__version__}"


@cache
def _cuda_visible() -> bool:
    """Asks torch where it is loaded, as in every call; a listing that has not loaded it gets the driver's word."""
    if "torch" in sys.modules:
        import torch

        return torch.cuda.is_available()
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
