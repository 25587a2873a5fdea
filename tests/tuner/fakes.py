"""Stand-ins for a backend and a device, so that look-ups and storage are tested without computing anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec, Pass
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.storage.records import BestConfig

SPEC = AttentionSpec(
    "cuda", "bfloat16", heads=32, kv_heads=8, head_dim=128, head_dim_v=128, batch=1, q_len=8192, kv_len=8192, causal=True
)
H100 = DeviceInfo("cuda", "NVIDIA H100 80GB HBM3", capability=(9, 0), multiprocessors=132, runtime="cuda 13.0", driver="580.1")
H200 = replace(H100, name="NVIDIA H200")
A100 = replace(H100, name="NVIDIA A100-SXM4-80GB", capability=(8, 0), multiprocessors=108)


@dataclass(frozen=True)
class BlockConfig(KernelConfig):
    block_n: int = 64
    iterations: int = 8


class FakeBackend(AttentionBackend):
    """Has configs, code and a toolchain, and computes nothing."""

    device_types = None
    dtypes = frozenset({"bfloat16", "float32"})

    def __init__(self, name: str = "fake", code: str = "c0de", compiler: str = "compiler 1") -> None:
        self.name = name  # type: ignore[misc]
        self.code, self.compiler = code, compiler

    def forward(self, call: AttentionCall) -> ForwardResult:
        raise AssertionError("not computed here")

    def backward(self, call: AttentionCall, grad_out: Any, saved: Any, out: Any) -> Gradients:
        raise AssertionError("not computed here")

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return BlockConfig

    def code_hash(self) -> str:
        return self.code

    def toolchain(self) -> str:
        return self.compiler


def record(
    key: TuningKey | None = None, block_n: int = 128, median_ms: float = 1.0, measured_at: int = 1_750_000_000, **changes: Any
) -> BestConfig:
    best = BestConfig(
        key=key or tuning_key(FakeBackend(), SPEC, H100, "forward"),
        config={"block_n": block_n, "iterations": 8},
        median_ms=median_ms,
        spread_ms=0.01,
        default_ms=1.5,
        error=1e-3,
        shape="B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal",
        inputs="random, moderate",
        samples=9,
        measured_at=measured_at,
        version="0.1.0",
    )
    return replace(best, **changes)


class Warned(list[str]):
    """The library's warnings, in order."""

    def the_only_one(self) -> str:
        assert len(self) == 1, list(self)
        return self[0]
