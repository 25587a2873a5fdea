"""CupyBackend: what it supports, and the door to its kernels. Imports torch and cupy on first use only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from adasplash_cupy import configs, requirements
from adasplash_cupy.instances import ITEMSIZES

if TYPE_CHECKING:
    import torch

_MIN_CAPABILITY_BFLOAT16 = (8, 0)


class CupyBackend(AttentionBackend):
    """Exact entmax attention over gathered key columns in raw CUDA, for NVIDIA GPUs from Turing on; see ``src/``."""

    name: ClassVar[str] = "cupy"
    summary: ClassVar[str] = "the same passes in CUDA C++, compiled by NVRTC, on NVIDIA GPUs"
    priority: ClassVar[int] = 40
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[str]] = frozenset({"float16", "bfloat16", "float32"})
    head_dims: ClassVar[HeadDims] = HeadDims(low=8, high=256, multiple_of=8)
    min_capability: ClassVar[tuple[int, int] | None] = (7, 5)
    features: ClassVar[frozenset[str]] = frozenset(FEATURES) - {"bool_mask", "additive_mask", "mask_grad"}

    def unavailable_reasons(self) -> list[str]:
        return requirements.missing()

    def not_supported_reasons(self, spec: AttentionSpec, device: DeviceInfo | None = None) -> list[str]:
        reasons = super().not_supported_reasons(spec, device)
        reasons += self._reasons_against_dtype(spec.dtype, device)
        dims_fit = all(self.head_dims.reason_against(dim) is None for dim in (spec.head_dim, spec.head_dim_v))
        if device is not None and spec.dtype in self.dtypes and dims_fit and not configs.fits(spec, device):
            widest = max(spec.head_dim, spec.head_dim_v)
            reasons.append(
                f"{spec.dtype} with head dim {widest} needs more shared memory than {device.name} has ({device.shared_memory} bytes)"
            )
        return reasons

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        from adasplash_cupy.launch import saved_shapes

        assert spec.batch is not None
        assert spec.q_len is not None
        assert spec.kv_len is not None
        sizes = (spec.batch, spec.heads, spec.kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.head_dim_v)
        shapes = saved_shapes(sizes, ITEMSIZES[spec.dtype], not spec.deterministic)
        dtypes = (spec.dtype, "float32", "float32", "int32", "int32")
        return [SavedTensor(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def forward(self, call: AttentionCall) -> ForwardResult:
        from adasplash_cupy import launch

        return launch.forward(call)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        from adasplash_cupy import launch

        return launch.backward(call, grad_out, saved)

    def transform_forward(self, x: torch.Tensor, alpha: torch.Tensor, alpha_class: str) -> torch.Tensor:
        from adasplash_cupy import launch

        return launch.transform_forward(x, alpha)

    def transform_not_supported_reasons(self, device_type: str, dtype: str, device: DeviceInfo | None = None) -> list[str]:
        reasons = list(self.unavailable_reasons())
        if self.device_types is not None and device_type not in self.device_types:
            reasons.append(f"device {device_type} is not supported (only {', '.join(sorted(self.device_types))})")
        if dtype not in self.dtypes:
            reasons.append(f"dtype {dtype} is not supported (only {', '.join(sorted(self.dtypes))})")
        return reasons + self._reasons_against_dtype(dtype, device)

    def _reasons_against_dtype(self, dtype: str, device: DeviceInfo | None) -> list[str]:
        if dtype == "bfloat16" and device is not None and device.capability and device.capability < _MIN_CAPABILITY_BFLOAT16:
            return [f"bfloat16 needs compute capability 8.0, {device.name} has {device.capability_name}"]
        return []

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return configs.ForwardConfig if pass_ == "forward" else configs.BackwardConfig

    def default_config(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> KernelConfig:
        return configs.default_forward(spec, device) if pass_ == "forward" else configs.default_backward(spec, device)

    def tuning_space(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> Iterable[KernelConfig]:
        return configs.forward_space(spec, device) if pass_ == "forward" else configs.backward_space(spec, device)

    def precompile(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig) -> CompileReport | None:
        from adasplash_cupy.precompile import precompile

        return precompile(spec, device, pass_, config)

    def toolchain(self) -> str:
        from importlib import metadata

        import torch

        major = requirements.cupy_major()
        name = "cupy" if major is None else f"cupy-cuda{major}x"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:  # not installed: nothing was ever tuned with it here
            version = "missing"
        return f"{name} {version}, torch {torch.__version__}"
