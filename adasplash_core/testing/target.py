"""What a check runs against: one backend on one device in one dtype, called as the core calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.spec import AttentionSpec
from adasplash_core.testing.compare import Expected, Measured, compare_backward, compare_forward, require, worst
from adasplash_core.testing.inputs import poisoned_memory


class UndeclaredError(Exception):
    """The backend does not claim what a check needs: it is skipped."""


@dataclass(frozen=True)
class Target:
    """One backend, one device, one dtype (torch's name)."""

    backend: AttentionBackend
    device: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def info(self) -> DeviceInfo:
        return device_info(self.device)

    @property
    def error_bound(self) -> float:
        """Of the dtype as it is: what is admitted of a call whose products may be rounded to TF32 depends on its spec."""
        return self.backend.error_bound(self.dtype)

    def takes(self, *features: str) -> bool:
        return all(feature in self.backend.features for feature in features)

    def head_dim(self, wanted: int = 16) -> int:
        """The supported head dim nearest above ``wanted``, or else below."""
        limits = self.backend.head_dims
        step = limits.multiple_of
        dim = max(-(-max(wanted, limits.low) // step) * step, step)
        if limits.high is not None and dim > limits.high:
            dim = limits.high // step * step
        return dim

    def base_spec(self, **changes: Any) -> AttentionSpec:
        """A small plain call: B=2, H=3, 37 queries, 53 keys."""
        spec = AttentionSpec(
            device_type=torch.device(self.device).type,
            dtype=self.dtype,
            heads=3,
            kv_heads=3,
            head_dim=self.head_dim(),
            head_dim_v=self.head_dim(),
            batch=2,
            q_len=37,
            kv_len=53,
            needs_grad=self.takes("backward"),
            return_stats=self.takes("stats"),
        )
        return replace(spec, **changes)

    def call(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> AttentionCall:
        """A validated call that asks for all that the backend declares: gradients and statistics.

        Raises
        ------
        UndeclaredError: if the call needs a feature that the backend does not declare, or it says it cannot do it.
        """
        arguments.setdefault("deterministic", False)
        arguments.setdefault("return_stats", self.takes("stats"))
        arguments.setdefault("needs_grad", self.takes("backward"))
        arguments.setdefault("enable_gqa", query.shape[1] != key.shape[1])
        call = make_call(query, key, value, **arguments)
        missing = [feature for feature in call.spec.features() if not self.takes(feature)]
        if missing:
            raise UndeclaredError(f"not declared: {', '.join(missing)}")
        return call

    def require_supported(self, call: AttentionCall) -> None:
        reasons = self.backend.not_supported_reasons(call.spec, self.info)
        if reasons:
            raise UndeclaredError("; ".join(reasons))

    def forward(self, call: AttentionCall, config: KernelConfig | None = None) -> ForwardResult:
        config = config or self.backend.default_config(call.spec, self.info, "forward")
        with torch.no_grad():
            return self.backend.forward(replace(call, config=config))

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, forward: ForwardResult, config: KernelConfig | None = None
    ) -> Gradients:
        config = config or self.backend.default_config(call.spec, self.info, "backward")
        out = forward.out if self.backend.backward_needs_out else None
        with torch.no_grad():
            return self.backend.backward(replace(call, config=config), grad_out, forward.saved, out)

    def expect(self, call: AttentionCall) -> Expected:
        return Expected.of(call, self.backend.error_bound(call.spec.arithmetic))

    def check(self, call: AttentionCall, grad_out: torch.Tensor | None = None) -> Measured:
        """Compare forward and backward with the oracle, in poisoned memory.

        ``grad_out`` is drawn where not given, and then is zero in rows whose gradient hangs on rounding.
        """
        self.require_supported(call)
        expected = self.expect(call)
        with poisoned_memory():
            found = self.forward(call)
        measured = [compare_forward(expected, found)]
        if call.spec.needs_grad:
            check_saved(self, call, found)
            if grad_out is None:
                grad_out = self.draw_grad_out(expected)
            with poisoned_memory():
                grads = self.backward(call, grad_out, found)
            measured.append(compare_backward(expected, grad_out, grads))
        return worst(measured)

    def draw_grad_out(self, expected: Expected) -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        grad_out = torch.randn(expected.solution.result.out.shape, generator=generator).to(self.device, self.torch_dtype)
        return torch.where(expected.settled_rows(), grad_out, torch.zeros_like(grad_out))


def check_saved(target: Target, call: AttentionCall, found: ForwardResult) -> None:
    """What forward keeps must be what ``saved_spec`` told the compiler, in memory of its own."""
    (batch, _, q_len, _), kv_len = call.query.shape, call.key.shape[2]  # packed: 1 and the totals
    wanted = list(target.backend.saved_spec(replace(call.spec, batch=batch, q_len=q_len, kv_len=kv_len)))
    require(len(wanted) <= 8, f"saved_spec names {len(wanted)} tensors, at most 8 are admitted")
    require(len(found.saved) == len(wanted), f"forward saved {len(found.saved)} tensors, saved_spec names {len(wanted)}")
    foreign: Sequence[tuple[str, torch.Tensor | None]] = (
        ("query", call.query),
        ("key", call.key),
        ("value", call.value),
        ("alpha", call.alpha),
        ("attn_mask", call.attn_mask),
        ("out", found.out),
        ("tau", found.tau),
        ("support", found.support),
    )
    for i, (tensor, spec) in enumerate(zip(found.saved, wanted, strict=True)):
        told, got = f"{spec.dtype} {tuple(spec.shape)}", f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        require(told == got, f"saved tensor {i} is {got}, saved_spec says {told}")
        for name, other in foreign:
            aliased = other is not None and tensor.numel() > 0 and _same_storage(tensor, other)
            require(not aliased, f"saved tensor {i} shares memory with {name}; save a copy, or read {name} from the call")


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
