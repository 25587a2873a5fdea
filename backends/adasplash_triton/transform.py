"""The entmax transform as the core asks for it: a part of :class:`~adasplash_triton.backend.TritonBackend`. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adasplash_core.backend import AttentionBackend

if TYPE_CHECKING:
    import torch

    from adasplash_core.device import DeviceInfo


class EntmaxTransform(AttentionBackend):
    """alpha-entmax over the last dimension of any tensor, and its gradients; float64 is left to the reference."""

    transform_dtypes: ClassVar[frozenset[str]] = frozenset({"float16", "bfloat16", "float32"})

    def transform_forward(self, x: torch.Tensor, alpha: torch.Tensor, alpha_class: str) -> torch.Tensor:
        from adasplash_triton import transform_launch

        return transform_launch.forward(x, alpha, alpha_class)

    def transform_backward(
        self, p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, alpha_class: str, alpha_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from adasplash_triton import transform_launch

        return transform_launch.backward(p, grad, alpha, alpha_class, alpha_grad)

    def transform_not_supported_reasons(self, device_type: str, dtype: str, device: DeviceInfo | None = None) -> list[str]:
        reasons = list(self.unavailable_reasons())
        if self.device_types is not None and device_type not in self.device_types:
            reasons.append(f"device {device_type} is not supported (only {', '.join(sorted(self.device_types))})")
        if dtype not in self.transform_dtypes:
            reasons.append(f"dtype {dtype} is not supported (only {', '.join(sorted(self.transform_dtypes))})")
        if self.min_capability and device and device.capability and device.capability < self.min_capability:
            have, want = (".".join(map(str, c)) for c in (device.capability, self.min_capability))
            reasons.append(f"{device.name} has compute capability {have}, {want} is needed")
        return reasons
