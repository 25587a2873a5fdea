"""Small backends and providers for tests of the choosing, never of the maths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adasplash_core import layout
from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig, SavedTensor
from adasplash_core.configs import FoundBackend, FoundConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.errors import ConfigRejectedError
from adasplash_core.plugins import Registry
from adasplash_core.spec import FEATURES, AttentionSpec, Pass

CPU = DeviceInfo(type="cpu", name="a cpu", multiprocessors=1)
GPU = DeviceInfo(type="cuda", name="a gpu", capability=(8, 0))


@dataclass(frozen=True)
class FakeConfig(KernelConfig):
    block: int = 64
    fast: bool = False


class MeanBackend(AttentionBackend):
    """Averages all values: honest shapes, no attention. Rejects configs with ``block`` above 1000."""

    dtypes = frozenset({"float32"})
    features = frozenset(FEATURES)

    def __init__(self, name: str = "mean", priority: int = 10, **traits: Any) -> None:
        self.name, self.priority = name, priority  # type: ignore[misc]
        for trait, value in traits.items():
            setattr(self, trait, value)
        self.seen: list[AttentionCall] = []

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return FakeConfig

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        assert spec.batch is not None
        assert spec.q_len is not None
        return [SavedTensor((spec.batch, spec.q_len + 1), "float64")]

    def forward(self, call: AttentionCall) -> ForwardResult:
        self.seen.append(call)
        assert isinstance(call.config, FakeConfig)
        if call.config.block > 1000:
            raise ConfigRejectedError(self.name, call.config, "too large")
        out = layout.empty_like(call.query, call.value.shape[-1])
        out.copy_(call.value.mean(2, keepdim=True).repeat_interleave(out.shape[1] // call.value.shape[1], 1).expand(out.shape))
        saved = [torch.zeros(call.query.shape[0], call.query.shape[2] + 1, dtype=torch.float64)] if call.spec.needs_grad else []
        return ForwardResult(out, saved)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        self.seen.append(call)
        groups = call.query.shape[1] // call.key.shape[1]
        dv = (grad_out.sum(2, keepdim=True) / call.value.shape[2]).unflatten(1, (-1, groups)).sum(2).expand(call.value.shape)
        return Gradients(torch.zeros_like(call.query), torch.zeros_like(call.key), dv)


class Provider:
    """Answers from dictionaries, counting the questions."""

    def __init__(
        self, name: str = "provider", answers: dict[str, FoundConfig] | None = None, fastest: str | None = None
    ) -> None:
        self.name, self.answers, self._fastest = name, answers or {}, fastest
        self.asked, self.rejected = 0, list[str]()

    def find(self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> FoundConfig | None:
        self.asked += 1
        return self.answers.get(pass_)

    def fastest(self, backends: Iterable[AttentionBackend], spec: AttentionSpec, device: DeviceInfo) -> FoundBackend | None:
        return None if self._fastest is None else FoundBackend(self._fastest)

    def reject(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig, why: str
    ) -> None:
        self.rejected.append(why)


def registry_of(*backends: AttentionBackend, problems: dict[str, str] | None = None) -> Registry:
    return Registry(backends={b.name: b for b in backends}, problems=problems or {})


def spec(**changes: Any) -> AttentionSpec:
    base: dict[str, Any] = {"device_type": "cpu", "dtype": "float32", "heads": 4, "kv_heads": 4, "head_dim": 8, "head_dim_v": 8}
    return AttentionSpec(**{**base, "batch": 1, "q_len": 6, "kv_len": 6, **changes})
