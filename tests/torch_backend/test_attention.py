"""The backend against a plain loop over rows, and the traits that are its own: tiling, sparsity, what is not finite."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_core import dropout
from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_core.errors import ConfigError
from adasplash_torch import tiles
from adasplash_torch.backend import TorchBackend
from adasplash_torch.configs import BackwardConfig, ForwardConfig

BACKEND = TorchBackend()
TILES: list[dict[str, Any]] = [
    {"rows": 1, "heads": 1, "panel": 1, "group": 2},
    {"rows": 24, "heads": 5, "panel": 8, "group": 4},
    {"rows": 37, "heads": 64, "panel": 10, "group": 16},
    {"rows": 1024, "heads": 2, "panel": 512, "group": 8, "dense_above": 0.0},
    {"rows": 1024, "heads": 1, "panel": 64, "group": 1, "dense_above": 1.0},
]


def forward(call: AttentionCall, tile: dict[str, Any] | None = None) -> ForwardResult:
    default = BACKEND.default_config(call.spec, device_info("cpu"), "forward")
    return BACKEND.forward(dataclasses.replace(call, config=default if tile is None else ForwardConfig(**tile)))


def backward(call: AttentionCall, grad: torch.Tensor, result: ForwardResult, tile: dict[str, Any] | None = None) -> Gradients:
    default = BACKEND.default_config(call.spec, device_info("cpu"), "backward")
    call = dataclasses.replace(call, config=default if tile is None else BackwardConfig(**tile))
    return BACKEND.backward(call, grad, result.saved, None)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def entmax_row(scores: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha-entmax of one row of float64 scores by bisection, differentiable through one exact Newton step on tau."""
    if float(alpha.detach()) == 1:
        return scores.softmax(-1)
    beta = alpha - 1

    def p(tau: torch.Tensor) -> torch.Tensor:
        above = beta * scores - tau
        return torch.where(above > 0, above.clamp(min=1e-300) ** (1 / beta), 0.0)

    with torch.no_grad():
        high = (beta * scores).max()
        low = high - 1
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if p(middle).sum() > 1 else (low, middle)
        slope = (p(high) ** (2 - alpha)).masked_fill(p(high) == 0, 0).sum() / beta
    return p(high + (p(high).sum() - 1) / slope)


def plain(
    call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, bias: Any
) -> torch.Tensor:
    """Attention as it is defined, one row at a time."""
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    out = []
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                end = kv_len if call.kv_lengths is None else min(int(call.kv_lengths[b]), kv_len)
                start = 0 if call.kv_starts is None else int(call.kv_starts[b])
                place = i + (end - q_len if call.spec.causal_alignment == "bottom_right" else int(call.query_offset))
                left, right = call.window
                seen = [
                    j
                    for j in range(start, end)
                    if not (call.spec.causal and j > place)
                    and not (left >= 0 and j < place - left)
                    and not (right >= 0 and j > place + right)
                    and not (call.spec.mask == "key" and not call.attn_mask.expand(batch, -1)[b, j])  # type: ignore[union-attr]
                    and not (call.spec.mask == "bool" and not call.attn_mask.expand(batch, heads, q_len, kv_len)[b, h, i, j])  # type: ignore[union-attr]
                ]
                if not seen:
                    out.append(v.new_zeros(v.shape[-1]))
                    continue
                g = h // (heads // k.shape[1])
                scores = call.scale * (k[b, g, seen] @ q[b, h, i])
                if call.alibi_slopes is not None:
                    distance = (torch.tensor(seen) - place).abs()
                    scores = scores - call.alibi_slopes.double().expand(batch, heads)[b, h] * distance
                if bias is not None:
                    scores = scores + bias.expand(batch, heads, q_len, kv_len)[b, h, i, seen]
                p = entmax_row(scores, alpha.expand(heads)[h])
                if call.dropout_p > 0:
                    row, head = torch.tensor(i), torch.tensor(b * heads + h)
                    p = (
                        p
                        * dropout.keep(call.dropout_seed, head, row, torch.tensor(seen), call.dropout_p)
                        / (1 - call.dropout_p)
                    )  # type: ignore[arg-type]
                out.append(p @ v[b, g, seen])
    return torch.stack(out).view(batch, heads, q_len, -1) if out else v.new_zeros(batch, heads, q_len, v.shape[-1])


def strided(x: torch.Tensor, order: str) -> torch.Tensor:
    if order == "transposed":  # (B, L, H, E) in memory, as transformers hand it over
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if order == "odd":  # no unit stride, holes between elements
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]))
    batch, q_len, kv_len = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 10_000))
    order = draw(st.sampled_from(["contiguous", "transposed", "odd"]))
    scale = draw(st.sampled_from([0.0, 0.3, 2.0]))
    arguments: dict[str, Any] = {
        "query": strided(randn(batch, heads, q_len, 4, seed=seed), order),
        "key": strided(randn(batch, groups, kv_len, 4, seed=seed + 1), order),
        "value": strided(randn(batch, groups, kv_len, 5, seed=seed + 2), order),
        "scale": scale,
        "enable_gqa": True,
    }
    alpha = draw(st.sampled_from([1.0, 1.2, 1.5, 1.7, 2.0, "tensor"]))
    alphas = torch.tensor([1.5, 1.3, 2.0, 1.5], dtype=torch.float64)[:heads]
    arguments["alpha"] = alphas.requires_grad_() if alpha == "tensor" else alpha
    mask = draw(st.sampled_from(["none", "none", "key", "bool", "additive"]))
    if mask == "key":
        arguments["attn_mask"] = randn(batch, 1, 1, kv_len, seed=seed + 3) > -0.5
    elif mask != "none":
        shape = draw(
            st.sampled_from([(q_len, kv_len), (1, heads, 1, kv_len), (batch, heads, q_len, kv_len), (batch, 1, q_len, 1)])
        )
        full = randn(*shape, seed=seed + 3)
        arguments["attn_mask"] = full > -0.5 if mask == "bool" else full.requires_grad_()
    elif draw(st.booleans()):
        arguments["is_causal"] = True
        arguments["causal_alignment"] = draw(st.sampled_from(["top_left", "bottom_right"]))
    if arguments.get("causal_alignment") != "bottom_right" and draw(st.booleans()):
        arguments["query_offset"] = draw(st.integers(-3, 5))
    if draw(st.booleans()):
        arguments["window"] = (draw(st.integers(-1, 6)), draw(st.integers(-1, 6)))
    if draw(st.booleans()):
        arguments["kv_lengths"] = torch.randint(0, kv_len + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        arguments["kv_starts"] = torch.randint(0, 4, (batch,), generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        arguments["alibi_slopes"] = randn(heads, seed=seed, dtype=torch.float32).abs()
    if draw(st.booleans()):
        arguments["dropout_p"] = 0.4
    return arguments


@settings(max_examples=60, deadline=None)
@given(arguments=calls(), tile=st.sampled_from([None, *TILES]))
def test_agrees_with_a_plain_loop(arguments: dict[str, Any], tile: dict[str, Any] | None) -> None:
    call = make_call(**arguments)
    leaves = [x.detach().clone().requires_grad_() for x in (call.query, call.key, call.value)]
    alpha = call.alpha.double().clone().requires_grad_(call.spec.alpha_requires_grad)
    bias = call.attn_mask.clone().requires_grad_() if call.spec.mask == "additive" and call.attn_mask is not None else None
    expected = plain(call, *leaves, alpha, bias)
    result = forward(call, tile)
    torch.testing.assert_close(result.out, expected, rtol=0, atol=1e-12)
    grad = strided(randn(*result.out.shape, seed=9), "odd")
    found = backward(call, grad, result, tile)
    wanted = [*leaves, *([alpha] if call.spec.alpha_requires_grad else []), *([] if bias is None else [bias])]
    if not expected.requires_grad:  # no row sees a key
        return
    exact = torch.autograd.grad(expected, wanted, grad, materialize_grads=True)
    got = [x for x in (found.query, found.key, found.value, found.alpha, found.attn_mask) if x is not None]
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


class _Attention(torch.autograd.Function):
    """The backend under autograd, as the core wraps it."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, alpha: Any, mask: Any, arguments: dict[str, Any]) -> Any:
        ctx.call = make_call(
            q, k, v, alpha=alpha.detach().requires_grad_(), attn_mask=mask.detach().requires_grad_(), **arguments
        )
        ctx.result = forward(ctx.call)
        return ctx.result.out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        g = backward(ctx.call, grad, ctx.result)
        return g.query, g.key, g.value, g.alpha, g.attn_mask, None


@pytest.mark.parametrize("alpha", [1.02, 1.25, 1.5, 1.75, [1.1, 1.5, 1.9, 1.3]], ids=str)
def test_gradcheck(alpha: Any) -> None:
    inputs = (
        randn(1, 4, 3, 2, seed=1), randn(1, 2, 6, 2, seed=2), randn(1, 2, 6, 2, seed=3),
        torch.tensor(alpha, dtype=torch.float64), 0.3 * randn(1, 4, 3, 6, seed=4),
    )  # fmt: skip
    torch.autograd.gradcheck(
        lambda *x: _Attention.apply(*x, {"enable_gqa": True}), [x.requires_grad_() for x in inputs], eps=1e-7, atol=1e-5
    )


def test_alpha_gradient_at_softmax_is_the_limit_from_above() -> None:
    q, k, v = randn(1, 1, 6, 4), randn(1, 1, 50, 4, seed=1), randn(1, 1, 50, 4, seed=2)

    def out(alpha: float) -> torch.Tensor:
        return forward(make_call(q, k, v, alpha=alpha)).out

    slope = ((4 * out(1 + 1e-5) - out(1 + 2e-5) - 3 * out(1.0)) / 2e-5).sum()
    call = make_call(q, k, v, alpha=torch.tensor(1.0, dtype=torch.float64, requires_grad=True))
    found = backward(call, torch.ones_like(v[..., :6, :]), forward(call)).alpha
    assert found is not None
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_change_nothing_but_rounding(alpha: float, causal: bool) -> None:
    q, k, v = (randn(2, 3, 43, 8, seed=s, dtype=torch.float32) for s in range(3))
    call = make_call(2 * q, k, v, alpha=alpha, is_causal=causal, dropout_p=0.2, return_stats=True)
    grad = randn(2, 3, 43, 8, seed=5, dtype=torch.float32)
    first = forward(call)
    expected = backward(call, grad, first)
    for tile in TILES:
        result = forward(call, tile)
        torch.testing.assert_close(result.out, first.out, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(result.tau, first.tau, rtol=1e-5, atol=2e-6)
        found = backward(call, grad, result, tile)
        for name in ("query", "key", "value"):  # in norm: near the threshold, p^(2-alpha) magnifies the last bit of a score
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_same_call_same_bits() -> None:
    q, k, v = (randn(1, 2, 300, 8, seed=s, dtype=torch.float32) for s in range(3))
    call = make_call(q, k, v, is_causal=True)
    runs = [(r := forward(call), backward(call, q, r)) for _ in range(2)]
    assert torch.equal(runs[0][0].out, runs[1][0].out)
    assert torch.equal(runs[0][1].key, runs[1][1].key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_rounded_only_at_the_end(dtype: torch.dtype) -> None:
    q, k, v = (randn(1, 2, 200, 16, seed=s, dtype=dtype) for s in range(3))
    call, wide = make_call(q, k, v), make_call(q.double(), k.double(), v.double())
    result, exact = forward(call), forward(wide)
    grads, exact_grads = backward(call, q, result), backward(wide, q.double(), exact)
    eps = max(torch.finfo(dtype).eps, 2e-6)
    for mine, theirs in [
        (result.out, exact.out),
        *((getattr(grads, n), getattr(exact_grads, n)) for n in ("query", "key", "value")),
    ]:
        assert mine.dtype == dtype
        assert float((mine.double() - theirs).norm() / theirs.norm()) < eps


def test_packed_sequences_see_only_themselves() -> None:
    q, k, v = (randn(1, 2, 40, 4, seed=s) for s in range(3))
    cu = torch.tensor([0, 7, 7, 30, 40], dtype=torch.int32)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 23, "max_seqlen_k": 23, "is_causal": True}
    call = make_call(q, k, v, **packed)
    for tile in (None, TILES[1]):
        out = forward(call, tile).out
        for a, b in ((0, 7), (7, 30), (30, 40)):
            alone = forward(make_call(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True)).out
            torch.testing.assert_close(out[:, :, a:b], alone)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("tile", [None, TILES[3], TILES[4]], ids=["default", "dense", "sparse"])
@pytest.mark.parametrize("host", [True, False], ids=["cpu", "accelerator"])
def test_nan_stays_in_its_row_and_in_keys_nobody_sees(
    alpha: float, tile: dict[str, Any] | None, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "host_reads_are_free", lambda device: host)
    q, k, v = (randn(1, 1, 40, 4, seed=s) for s in range(3))
    lengths = torch.tensor([30])
    clean = make_call(q, k, v, alpha=alpha, kv_lengths=lengths)
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    q2[0, 0, 3, 1] = math.nan
    k2[0, 0, 33] = math.nan
    v2[0, 0, 35] = math.inf
    call = make_call(q2, k2, v2, alpha=alpha, kv_lengths=lengths)
    expected, result = forward(clean, tile), forward(call, tile)
    others = [i for i in range(40) if i != 3]
    assert result.out[0, 0, 3].isnan().all()
    torch.testing.assert_close(result.out[:, :, others], expected.out[:, :, others])
    grad = torch.zeros_like(v)
    grad[:, :, others] = 1 + q[:, :, others]
    found, wanted = backward(call, grad, result, tile), backward(clean, grad, expected, tile)
    assert found.query[0, 0, 3].isnan().all()
    torch.testing.assert_close(found.query[:, :, others], wanted.query[:, :, others])
    torch.testing.assert_close(found.key, wanted.key)
    torch.testing.assert_close(found.value, wanted.value)


def test_values_that_get_no_weight_do_not_matter_even_if_infinite() -> None:
    q, k = randn(1, 1, 1, 4), randn(1, 1, 300, 4, seed=1)
    q[...] = 20 * k[:, :, :1]
    v = randn(1, 1, 300, 2, seed=2)
    best = int((k[0, 0] @ q[0, 0, 0]).argmin())
    v[0, 0, best] = math.inf
    call = make_call(q, k, v)
    for tile in (None, TILES[3]):
        result = forward(call, tile)
        assert result.out.isfinite().all()
        assert backward(call, torch.ones_like(result.out), result, tile).query.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("host", [True, False], ids=["cpu", "accelerator"])
def test_infinite_mask_entries(alpha: float, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "host_reads_are_free", lambda device: host)
    q, k, v = (randn(1, 1, 3, 4, seed=s) for s in range(3))
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    mask[0, 0, 0] = -math.inf
    mask[0, 0, 1, :2] = math.inf
    mask[0, 0, 2, 1:] = -math.inf
    call = make_call(q, k, v, attn_mask=mask.requires_grad_(), alpha=alpha, return_stats=True)
    result = forward(call)
    assert result.out[0, 0, 0].eq(0).all()
    torch.testing.assert_close(result.out[0, 0, 1], (v[0, 0, 0] + v[0, 0, 1]) / 2)
    torch.testing.assert_close(result.out[0, 0, 2], v[0, 0, 0])
    assert result.support is not None
    assert result.support.tolist() == [[[0, 2, 1]]]
    found = backward(call, torch.ones_like(v), result)
    assert found.query[0, 0, 0].eq(0).all()
    assert all(x.isfinite().all() for x in (found.query, found.key, found.value, found.attn_mask) if x is not None)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_huge_scores_pick_the_best_key(alpha: float) -> None:
    q, k, v = (randn(1, 2, 50, 8, seed=s, dtype=torch.float32) for s in range(3))
    call = make_call(1e8 * q, k, v, alpha=alpha)
    for tile in (None, *TILES):
        torch.testing.assert_close(forward(call, tile).out, v.gather(2, (q @ k.mT).argmax(-1)[..., None].expand(-1, -1, -1, 8)))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=["no batch", "no query", "no key"])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    batch, heads, q_len, kv_len = shape
    call = make_call(
        randn(batch, heads, q_len, 4), randn(batch, heads, kv_len, 4), randn(batch, heads, kv_len, 6), return_stats=True
    )
    result = forward(call)
    assert result.out.shape == (batch, heads, q_len, 6)
    assert result.out.eq(0).all()
    found = backward(call, torch.ones_like(result.out), result)
    assert found.key.shape == call.key.shape
    assert found.query.eq(0).all()


def test_saved_tensors_are_as_told() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        call = make_call(*(randn(2, 4, 9, 8, seed=s, dtype=dtype) for s in range(3)))
        saved = forward(call).saved
        assert [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in saved] == list(BACKEND.saved_spec(call.spec))
    assert forward(make_call(*(randn(1, 1, 3, 4) for _ in range(3)), needs_grad=False)).saved == ()


def test_tuning_space_is_small_and_runs() -> None:
    call = make_call(*(randn(1, 2, 64, 8, seed=s) for s in range(3)))
    expected = forward(call)
    for pass_ in ("forward", "backward"):
        for q_len, kv_len in ((64, 64), (4096, 4096), (1, 100_000)):
            spec = dataclasses.replace(call.spec, q_len=q_len, kv_len=kv_len)
            candidates = list(BACKEND.tuning_space(spec, device_info("cpu"), pass_))  # type: ignore[arg-type]
            assert 1 <= len(candidates) <= 24
            assert len(set(candidates)) == len(candidates)
    for config in BACKEND.tuning_space(call.spec, device_info("cpu"), "forward"):
        torch.testing.assert_close(BACKEND.forward(dataclasses.replace(call, config=config)).out, expected.out)


@pytest.mark.parametrize("bad", [{"rows": 0}, {"group": -1}, {"dense_above": 1.5}, {"iterations": 0}])
def test_impossible_configs_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ForwardConfig(**bad)


_PEAK = """
import dataclasses, resource, torch
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_torch.backend import TorchBackend
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
backend, torch_seed = TorchBackend(), torch.manual_seed(0)
def run(length):
    call = make_call(*(torch.randn(1, 4, length, 32) for _ in range(3)), is_causal={causal}, alpha={alpha})
    configs = [backend.default_config(call.spec, device_info("cpu"), p) for p in ("forward", "backward")]
    start = peak()
    result = backend.forward(dataclasses.replace(call, config=configs[0]))
    backend.backward(dataclasses.replace(call, config=configs[1]), result.out, result.saved, None)
    return peak() - start
run(64)
print(run(4096))
"""


@pytest.mark.parametrize(("causal", "alpha"), [(False, 1.5), (True, 1.5), (False, 1.0)])
def test_peak_memory_is_that_of_a_few_tiles(causal: bool, alpha: float) -> None:
    """All scores of this call are 256 MiB; a dense implementation holds several such matrices."""
    code = _PEAK.format(causal=causal, alpha=alpha)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 160


@settings(max_examples=30, deadline=None)
@given(arguments=calls())
def test_the_way_without_host_reads_agrees(arguments: dict[str, Any]) -> None:
    """What runs on accelerators, where no value may decide the course: all tiles dense, alpha and intervals stay on the device."""
    call = make_call(**arguments)
    expected = forward(call)
    grad = randn(*expected.out.shape, seed=9)
    wanted = backward(call, grad, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "host_reads_are_free", lambda device: False)
        tile = {"rows": 5, "heads": 3, "panel": 5}
        result = forward(call, tile)
        found = backward(call, grad, result, tile)
    torch.testing.assert_close(result.out, expected.out, rtol=0, atol=1e-12)
    for name in ("query", "key", "value", "alpha", "attn_mask"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_registering_imports_no_torch() -> None:
    code = "import sys, adasplash_torch.plugin as p; p.adasplash_register_backends(lambda b: None); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
