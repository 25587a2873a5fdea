"""Sizes that only a GPU can do, and what only a GPU has: CUDA graphs, several streams, poisoned memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_core.testing import oracle
from adasplash_triton.backend import TritonBackend

BACKEND = TritonBackend()


def draw(*shape: int, spread: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3))
    return [query * spread, key, value]


def configured(call: AttentionCall) -> tuple[AttentionCall, AttentionCall]:
    info = device_info(call.query.device)
    forward, backward = (
        dataclasses.replace(call, config=BACKEND.default_config(call.spec, info, pass_)) for pass_ in ("forward", "backward")
    )
    return forward, backward


def run(call: AttentionCall) -> tuple[ForwardResult, Gradients, torch.Tensor]:
    forward, backward = configured(call)
    found = BACKEND.forward(forward)
    grad_out = torch.randn(found.out.shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda").to(found.out.dtype)
    return found, BACKEND.backward(backward, grad_out, found.saved, None), grad_out


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0, 16.0])
@pytest.mark.parametrize(
    "arguments", [{"is_causal": True}, {}, {"is_causal": True, "window": (700, 0)}, {"alpha": 1.2}, {"alpha": 2.0}]
)
def test_against_the_oracle(spread: float, arguments: dict[str, Any]) -> None:
    call = make_call(*draw(1, 2, 2100, 64, spread=spread), **arguments)
    found, grads, grad_out = run(call)
    want, want_grads = oracle.attention(call), oracle.gradients(call, grad_out)
    assert error(found.out, want.out) < 5e-3
    for name in ("query", "key", "value"):
        assert error(getattr(grads, name), getattr(want_grads, name)) < 1e-2, name


def test_no_result_is_left_unwritten() -> None:
    """Memory that torch hands out is filled with NaN first: an element nobody writes would stay NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        found, grads, _ = run(make_call(*draw(2, 3, 1111, 64, spread=4), is_causal=True, deterministic=False))
    finally:
        torch.use_deterministic_algorithms(False)
    for x in (found.out, grads.query, grads.key, grads.value):
        assert torch.isfinite(x).all()


def test_cuda_graph_replays_on_new_inputs() -> None:
    inputs = draw(1, 4, 2048, 64, spread=4)
    call = make_call(*inputs, is_causal=True)
    run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, grads, _ = run_captured(call)
    for static, fresh in zip(inputs, draw(1, 4, 2048, 64, spread=8, seed=5), strict=True):
        static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    want, want_grads, _ = run_captured(call)
    assert torch.equal(found.out, want.out)
    assert error(grads.key, want_grads.key) < 1e-3  # atomics add in any order


def run_captured(call: AttentionCall) -> tuple[ForwardResult, Gradients, torch.Tensor]:
    forward, backward = configured(call)
    found = BACKEND.forward(forward)
    grad_out = torch.ones_like(found.out)
    return found, BACKEND.backward(backward, grad_out, found.saved, None), grad_out


def test_workspace_is_bounded_by_the_inputs() -> None:
    inputs = draw(1, 4, 16384, 64, spread=4)
    call = make_call(*inputs, is_causal=True, needs_grad=False)
    forward, _ = configured(call)
    BACKEND.forward(forward)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = BACKEND.forward(forward).out
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 4 * out.numel() * out.element_size()


def test_a_million_keys() -> None:
    query, key, value = draw(1, 1, 1 << 20, 64, spread=8)
    rows = torch.tensor([0, 12345, (1 << 20) - 1], device="cuda")
    call = make_call(query, key, value, is_causal=True, needs_grad=False)
    out = BACKEND.forward(configured(call)[0]).out[:, :, rows]
    assert error(out, oracle.attention(call, rows=rows).out) < 5e-3
