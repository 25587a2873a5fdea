"""What PyTorch asks of an operator: compilation, checkpointing, autocast, graphs, streams, several GPUs, tf32 only where allowed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from adasplash_core import attention
from adasplash_core.call import make_call
from adasplash_core.precision import tf32
from adasplash_core.testing import oracle
from tests.triton_backend.gpu.machine import COMPILER, DEVICE, DTYPES, ON_GPU, draw, error, leaves, size

N = size(2048, 70)
entmax_attention = partial(attention, is_causal=True, backend="triton")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU's own")


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))


def agree(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], bound: float = 2e-3) -> None:
    """To the order in which atomics add."""
    for one, other in zip(found, want, strict=True):
        assert error(one, other) < bound


def test_compiled_in_one_graph_it_equals_eager_at_every_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: entmax_attention(q * 2, k, v).square(), fullgraph=True, dynamic=True, backend=COMPILER
    )
    for length in (N, N + 1, N + 64):
        inputs = leaves(draw(1, 2, length, 64 if ON_GPU else 16, spread=2))
        found, want = compiled(*inputs), entmax_attention(inputs[0] * 2, *inputs[1:]).square()
        assert error(found, want) < 1e-2
        agree(gradients(found, inputs), gradients(want, inputs), 2e-2)


@needs_gpu
@pytest.mark.parametrize("rows_first", [False, True])
def test_outputs_and_gradients_lie_as_those_of_dot_product_attention(rows_first: bool) -> None:
    """PyTorch's flash attention answers in the memory order of its inputs."""
    drawn = draw(2, N, 4, 64) if rows_first else draw(2, 4, N, 64)
    inputs = leaves([x.transpose(1, 2) if rows_first else x for x in drawn])
    strides = []
    for function in (partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True), entmax_attention):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = function(*inputs)
            strides.append([x.stride() for x in (out, *gradients(out, inputs))])
    assert strides[0] == strides[1]
    assert strides[0] == [x.stride() for x in (inputs[0], *inputs)]


def dropout_block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return entmax_attention(query.sin() * 3, key, value, dropout_p=0.3)


def checkpointed_block(*tensors: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = checkpoint(dropout_block, *tensors, use_reentrant=False)
    return result


def test_checkpointing_with_dropout_changes_no_gradient() -> None:
    inputs = leaves(draw(1, 2, N, 64 if ON_GPU else 16))
    results = []
    for function in (dropout_block, checkpointed_block):
        torch.manual_seed(3)
        out = function(*inputs)
        results.append((out.detach(), *gradients(out, inputs)))
    agree(results[1], results[0])


@pytest.mark.parametrize("function", [dropout_block, checkpointed_block])
def test_compiled_dropout_has_one_mask_in_forward_and_backward(function: Callable[..., torch.Tensor]) -> None:
    """With the mask that the forward drew, out is linear in v: <dv, v> = <g, out>, here with g = out."""
    torch._dynamo.reset()
    inputs = leaves(draw(1, 2, N, 64 if ON_GPU else 16))
    out = torch.compile(function, fullgraph=True, backend=COMPILER)(*inputs)
    _, _, dv = torch.autograd.grad(out, inputs, out.detach())
    found, want = (dv.double() * inputs[2]).sum(), out.double().square().sum()
    assert abs(found - want) < 1e-2 * want


def test_a_new_length_compiles_no_kernel() -> None:
    for length in (N, 2 * N):
        entmax_attention(*draw(1, 2, length, 64 if ON_GPU else 16))
    compiled: list[object] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **arguments: compiled.append(arguments["repr"])
    try:
        for length in (N + 64, 2 * N - 64, 3 * N):
            inputs = leaves(draw(1, 2, length, 64 if ON_GPU else 16))
            out = entmax_attention(*inputs)
            if length == N + 64:
                gradients(out, inputs)
                compiled.clear()  # the backward was not run before
            else:
                gradients(out, inputs)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


@pytest.mark.skipif(not ON_GPU, reason="the CPU's autocast dtype is not interpreted")
def test_autocast_computes_in_half_precision() -> None:
    inputs = draw(1, 2, N, 64, dtype=torch.float32, spread=2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = entmax_attention(*inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, entmax_attention(*(x.bfloat16() for x in inputs)))


@needs_gpu
def test_a_graph_of_forward_and_backward_replays_on_new_inputs() -> None:
    inputs = leaves(draw(2, 4, N, 64, spread=4))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(entmax_attention(*inputs), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = entmax_attention(*inputs)
        grads = gradients(out, inputs)
    for spread in (1.0, 16.0):
        with torch.no_grad():
            for static, fresh in zip(inputs, draw(2, 4, N, 64, spread=spread, seed=5), strict=True):
                static.copy_(fresh)
        graph.replay()
        want = entmax_attention(*inputs)
        assert torch.equal(out, want)
        agree(grads, gradients(want, inputs))


@needs_gpu
def test_streams_do_not_disturb_each_other() -> None:
    jobs = [leaves(draw(1, 4, N + 300 * i, 64, spread=2.0 * i + 1, seed=i)) for i in range(4)]
    want = [(out.detach(), *gradients(out, job)) for job in jobs for out in [entmax_attention(*job)]]
    streams = [torch.cuda.Stream() for _ in jobs]
    torch.cuda.synchronize()
    found: list[tuple[torch.Tensor, ...]] = [()] * len(jobs)

    def work(index: int) -> None:
        with torch.cuda.stream(streams[index]):
            for _ in range(5):
                out = entmax_attention(*jobs[index])
                found[index] = (out.detach(), *gradients(out, jobs[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for one, other in zip(found, want, strict=True):
        agree(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_gpu_of_a_process_computes_the_same() -> None:
    results = []
    for index in range(torch.cuda.device_count()):
        inputs = leaves(draw(1, 4, N, 64, spread=4, device=f"cuda:{index}"))
        out = entmax_attention(*inputs)  # the current device stays 0
        results.append([x.cpu() for x in (out.detach(), *gradients(out, inputs))])
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        agree(tuple(other), tuple(results[0]))


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_an_ideal_computation(dtype: torch.dtype, alpha: float, spread: float) -> None:
    """Ideal: scores rounded to float32 once, weights to the dtype once, their product with the values exact and rounded once."""
    query, key, value = draw(1, 2, size(1024, 60), 64 if ON_GPU else 16, dtype=dtype, spread=spread)
    exact = oracle.attention(make_call(query, key, value, alpha=alpha)).out
    scores = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).float()
    ideal = (oracle.transform(scores, alpha).to(dtype).double() @ value.double()).to(dtype)
    found = attention(query, key, value, alpha=alpha, backend="triton")
    assert error(found, exact) <= 2 * error(ideal, exact) + 1e-6  # float32 products round at every step


@pytest.mark.parametrize(("path", "length", "spread"), [("lists", 4096, 4.0), ("dense", 2048, 0.25), ("short", 200, 1.0)])
def test_tf32_is_used_only_where_it_is_allowed(path: str, length: int, spread: float) -> None:
    """Bounds of the output, dQ, dK and dV. TF32 has 11 significant bits, and tensor cores drop the others: 2^-11 a factor on average.
    dQ and dK of sharp rows feel the scores' errors more."""
    inputs = leaves(draw(1, 2, size(length, 60), 64 if ON_GPU else 16, dtype=torch.float32, spread=spread))
    call = make_call(*(x.detach() for x in inputs), is_causal=True)
    grad_out = draw(*inputs[0].shape, dtype=torch.float32, seed=7)[1]
    found = oracle.gradients(call, grad_out)
    wanted = (oracle.attention(call).out, found.query, found.key, found.value)
    exact, rounded = (5e-6, 2e-5, 2e-5, 2e-5), (2e-3, 4e-3, 4e-3, 2e-3)
    for allowed in (False, True, False):
        with tf32(allowed):
            out = entmax_attention(*inputs)
        with tf32(not allowed):  # a backward is as its forward was
            results = (out, *torch.autograd.grad(out, inputs, grad_out))
        for name, one, want, least, most in zip(("O", "dQ", "dK", "dV"), results, wanted, exact, rounded, strict=True):
            seen = error(one, want)
            assert seen <= (most if allowed else least), (path, name, allowed, seen)
            assert not (allowed and ON_GPU) or seen > least, (path, name, seen)


@needs_gpu
def test_compiled_code_follows_the_setting_for_tf32() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: entmax_attention(q, k, v), fullgraph=True)
    inputs = draw(1, 2, 512, 64, dtype=torch.float32)
    want = oracle.attention(make_call(*inputs, is_causal=True)).out
    for allowed in (False, True, False):
        with tf32(allowed):
            assert (error(compiled(*inputs), want) > 5e-6) is allowed


@needs_gpu
def test_deterministic_gradients_are_equal_bit_by_bit() -> None:
    inputs = leaves(draw(1, 4, N, 64, spread=4))
    runs = [gradients(entmax_attention(*inputs, deterministic=True), inputs) for _ in range(3)]
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))


def test_the_device_is_never_waited_for() -> None:
    alpha = torch.tensor(1.4, device=DEVICE, requires_grad=True)
    inputs = leaves(draw(1, 2, N, 64 if ON_GPU else 16))
    for mode in ("default", "error"):  # the first run compiles
        if ON_GPU:
            torch.cuda.set_sync_debug_mode(mode)
        try:
            out = entmax_attention(*inputs, alpha=alpha)
            torch.autograd.grad(out.sum(), [*inputs, alpha])
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
