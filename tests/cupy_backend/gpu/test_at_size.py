"""Sizes that only a GPU can do, what only a GPU has (CUDA graphs, several streams, poisoned memory), and agreement with Triton."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from adasplash_cupy.backend import CupyBackend
from adasplash_triton.backend import TritonBackend

BACKEND = CupyBackend()


def draw(*shape: int, spread: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3))
    return [query * spread, key, value]


def run(call: AttentionCall, backend: AttentionBackend = BACKEND) -> tuple[ForwardResult, Gradients, torch.Tensor]:
    info = device_info(call.query.device)
    forward, backward = (
        dataclasses.replace(call, config=backend.default_config(call.spec, info, pass_)) for pass_ in ("forward", "backward")
    )
    found = backend.forward(forward)
    grad_out = torch.linspace(-1, 1, found.out.numel(), device="cuda").view(found.out.shape).sin().to(found.out.dtype)
    return found, backend.backward(backward, grad_out, found.saved, None), grad_out


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


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_agrees_with_triton(dim: int, spread: float) -> None:
    call = make_call(*draw(2, 4, 3000, dim, spread=spread), is_causal=True)
    (ours, our_grads, _), (theirs, their_grads, _) = run(call), run(call, TritonBackend())
    assert error(ours.out, theirs.out) < 5e-3
    for name in ("query", "key", "value"):
        assert error(getattr(our_grads, name), getattr(their_grads, name)) < 1e-2, name


def test_no_result_is_left_unwritten() -> None:
    """Memory that torch hands out is filled with NaN first: an element nobody writes would stay NaN."""
    with poisoned_memory():
        found, grads, _ = run(make_call(*draw(2, 3, 1111, 64, spread=4), is_causal=True))
    for x in (found.out, grads.query, grads.key, grads.value):
        assert torch.isfinite(x).all()


def test_cuda_graph_replays_on_new_inputs() -> None:
    inputs = draw(1, 4, 2048, 64, spread=4)
    call = make_call(*inputs, is_causal=True)
    run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, grads, _ = run(call)
    for static, fresh in zip(inputs, draw(1, 4, 2048, 64, spread=8, seed=5), strict=True):
        static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    want, want_grads, _ = run(call)
    assert error(found.out, want.out) < 1e-3
    assert error(grads.key, want_grads.key) < 1e-3  # atomics add in any order


def test_runs_on_the_current_stream() -> None:
    inputs = draw(1, 4, 1500, 64, spread=4)
    want = run(make_call(*inputs, is_causal=True))[0].out
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = [x.clone() for x in inputs]
        out = run(make_call(*late, is_causal=True))[0].out
    stream.synchronize()
    assert error(out, want) < 1e-3


def test_workspace_is_bounded_by_the_inputs() -> None:
    call = make_call(*draw(1, 4, 16384, 64, spread=4), is_causal=True, needs_grad=False)
    config = BACKEND.default_config(call.spec, device_info("cuda"), "forward")
    BACKEND.forward(dataclasses.replace(call, config=config))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = BACKEND.forward(dataclasses.replace(call, config=config)).out
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra <= 4 * out.numel() * out.element_size()


def test_a_million_keys() -> None:
    query, key, value = draw(1, 1, 1 << 20, 64, spread=8)
    rows = torch.tensor([0, 12345, (1 << 20) - 1], device="cuda")
    call = make_call(query, key, value, is_causal=True, needs_grad=False)
    config = BACKEND.default_config(call.spec, device_info("cuda"), "forward")
    out = BACKEND.forward(dataclasses.replace(call, config=config)).out[:, :, rows]
    assert error(out, oracle.attention(call, rows=rows).out) < 5e-3


def test_tensors_of_equal_shapes_lie_anywhere() -> None:
    """Calls share what was prepared for the first, down to the tensor maps, but for addresses."""
    kept = [draw(1, 4, 1300, 64, spread=4, seed=seed) for seed in range(4)]
    apart = [run(make_call(*inputs, is_causal=True))[0].out for inputs in kept]
    for inputs, out in zip(kept, apart, strict=True):
        assert error(out, oracle.attention(make_call(*inputs, is_causal=True)).out) < 5e-3


def test_threads_compute_on_streams_of_their_own() -> None:
    cases = [draw(1, 4, 1300, 64, spread=4, seed=seed) for seed in range(4)]
    torch.cuda.synchronize()

    def compute(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [run(make_call(*inputs, is_causal=True))[0].out for _ in range(10)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(len(cases)) as pool:
        for inputs, outs in zip(cases, pool.map(compute, cases), strict=True):
            want = oracle.attention(make_call(*inputs, is_causal=True)).out
            assert all(error(out, want) < 5e-3 for out in outs)
