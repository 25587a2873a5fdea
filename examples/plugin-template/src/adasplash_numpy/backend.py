"""What the backend can do, and the bridge between torch's tensors and NumPy's arrays. Imports neither until it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig, SavedTensor

if TYPE_CHECKING:
    import torch

    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import AttentionSpec, Pass
    from adasplash_numpy.kernels import Problem


@dataclass(frozen=True)
class RowsConfig(KernelConfig):
    """Both passes work on this many query rows at a time: more is less Python, fewer stay in the cache."""

    rows: int = 256


class NumpyBackend(AttentionBackend):
    """alpha = 1.5 and 2 (thresholds by sorting), causal masks, key lengths; CPU, float32 and float64."""

    name = "numpy"
    summary = "example of a third-party backend"
    priority = -10  # below the reference: taken only by name, or where it was measured to be the fastest
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cpu"})
    dtypes: ClassVar[frozenset[str]] = frozenset({"float32", "float64"})
    features: ClassVar[frozenset[str]] = frozenset({"causal", "kv_lengths", "backward", "deterministic", "unequal_head_dims"})

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        """One tensor: the threshold of every row, below the row's highest z."""
        assert spec.batch is not None
        assert spec.q_len is not None
        return (SavedTensor((spec.batch, spec.heads, spec.q_len), spec.dtype),)

    def forward(self, call: AttentionCall) -> ForwardResult:
        import torch

        from adasplash_numpy import kernels

        problem = _problem(call)
        out, tau = kernels.forward(problem)
        saved = (torch.from_numpy(tau),) if call.spec.needs_grad else ()
        return ForwardResult(torch.from_numpy(out), saved)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        import torch

        from adasplash_numpy import kernels

        grads = kernels.backward(_problem(call), grad_out.numpy(), saved[0].numpy())
        return Gradients(*(torch.from_numpy(grad) for grad in grads))

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return RowsConfig

    def tuning_space(self, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> Iterator[KernelConfig]:
        return (RowsConfig(rows) for rows in (64, 128, 512, 1024))


def _problem(call: AttentionCall) -> Problem:
    """The call as arrays: views of the tensors' memory, whatever their strides."""
    from adasplash_core.masking import row_intervals
    from adasplash_numpy.kernels import Problem

    assert isinstance(call.config, RowsConfig)
    intervals = row_intervals(call)  # causal masks and lengths, as key intervals of every row
    return Problem(
        query=call.query.numpy(),
        key=call.key.numpy(),
        value=call.value.numpy(),
        low=intervals.lo.numpy(),
        high=intervals.hi.numpy(),
        sparsemax=call.spec.alpha_class == "2",
        scale=call.scale,
        rows=call.config.rows,
    )
