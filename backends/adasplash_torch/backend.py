"""The reference backend as the core sees it. Imports no torch until it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig, SavedTensor
from adasplash_core.spec import FEATURES, AttentionSpec, Pass
from adasplash_torch.configs import BackwardConfig, ForwardConfig, default_tile, tile_candidates

if TYPE_CHECKING:
    import torch

    from adasplash_core.device import DeviceInfo


class TorchBackend(AttentionBackend):
    """Everything the core can ask for, in plain PyTorch operations.

    float64 is computed in float64, everything else in float32. On a CPU, scores are computed once a pass and the rest is done on the
    entries above the threshold only; elsewhere every step is dense, so that the host never waits for the device.

    Beyond what the contract fixes: scores of +inf share their row's weight equally; a row with a NaN is NaN in the output and in the
    query's gradient and adds nothing to other gradients; values that are not finite matter only to rows that give them weight (off the
    CPU: only if some row sees them); alpha outside [1, 2] is clamped, its gradient that of the clamped value; at alpha = 1 the gradient
    to alpha is the limit from above.
    """

    name = "torch"
    summary = "reference: any device, every feature; on CPUs faster than dense softmax where attention is sparse"
    priority = 0
    device_types: ClassVar[frozenset[str] | None] = None
    dtypes: ClassVar[frozenset[str]] = frozenset({"float16", "bfloat16", "float32", "float64"})
    features: ClassVar[frozenset[str]] = frozenset(FEATURES)

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        """One tensor: each row's largest weight, from which its threshold follows."""
        assert spec.batch is not None
        assert spec.q_len is not None
        return (SavedTensor((spec.batch, spec.heads, spec.q_len), "float64" if spec.dtype == "float64" else "float32"),)

    def forward(self, call: AttentionCall) -> ForwardResult:
        from adasplash_torch.forward import forward

        return forward(call)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        from adasplash_torch.backward import backward

        return backward(call, grad_out, saved)

    def transform_forward(self, x: torch.Tensor, alpha: torch.Tensor, alpha_class: str) -> torch.Tensor:
        from adasplash_torch.transform import transform_forward

        return transform_forward(x, alpha, alpha_class)

    def transform_not_supported_reasons(self, device_type: str, dtype: str, device: DeviceInfo | None = None) -> list[str]:
        return [] if dtype in self.dtypes else [f"dtype {dtype} is not supported (only {', '.join(sorted(self.dtypes))})"]

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return ForwardConfig if pass_ == "forward" else BackwardConfig

    def default_config(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> KernelConfig:
        return self._config(pass_, default_tile(spec))

    def tuning_space(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> Iterator[KernelConfig]:
        for tile in tile_candidates(spec):
            yield self._config(pass_, tile)

    def _config(self, pass_: Pass, tile: dict[str, int]) -> KernelConfig:
        return ForwardConfig(**tile) if pass_ == "forward" else BackwardConfig(**tile)

    def toolchain(self) -> str:
        import torch

        return f"torch {torch.__version__}"
