"""How far a backend's results are from the oracle's, and how far they may be.

The bound is the backend's ``error_bound`` for the dtype, raised where the inputs themselves magnify rounding: the oracle is run again
with every query and key off by one unit in the last place of the arithmetic (float32; float64 for float64 inputs; TF32 where the spec
allows it), and eight times the change that makes is admitted. For alpha > 1.5 the gradient jumps where a key enters the support, so
rows with a key within rounding of its threshold get no output gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.testing import oracle

_ROUNDING = {"float64": 2.0**-52, "tf32": 2.0**-10}  # one unit in the last place of products; of others float32's
_SLACK = 8  # admitted multiple of what one rounding of the inputs does
_ROW_SLACK = 8  # how much worse than the whole a single row may be
_ALPHA_SLACK = 4  # its gradient is a difference of sums over keys
_CANCELLED = 0.25  # a gradient is measured against at least this fraction of what it would be if nothing cancelled
_LOG_TINY_WEIGHT = -60.0  # a weight below its exponential may underflow and leave the support
_TAU_BOUND = 1e-5  # relative to 1 + |tau|; tau is float32 whatever the inputs are


class ConformanceError(AssertionError):
    """The backend breaks the contract; the message says how."""


@dataclass(frozen=True)
class Measured:
    """The worst quantity of a check: relative error against its bound."""

    error: float = 0.0
    bound: float = 0.0
    what: str = ""

    @property
    def ratio(self) -> float:
        return self.error / self.bound if self.bound > 0 else (0.0 if self.error == 0 else math.inf)


def worst(measured: Sequence[Measured]) -> Measured:
    return max(measured, key=lambda m: m.ratio, default=Measured())


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConformanceError(message)


@dataclass
class Expected:
    """The oracle's answer to a call, with what is needed to judge other answers. Computed once, compared with many."""

    call: AttentionCall
    error_bound: float
    solution: oracle.Solution
    nudged: oracle.Solution
    margin: torch.Tensor  # (B, H, Lq): rounding of z
    borderline: torch.Tensor  # (B, H, Lq, Lk): keys within rounding of the threshold

    @classmethod
    def of(cls, call: AttentionCall, error_bound: float) -> Expected:
        eps = _ROUNDING.get(call.spec.arithmetic, 2.0**-23)
        solution = oracle.Solution(call, requires_grad=call.spec.needs_grad)
        nudged = oracle.Solution(_nudged(call, eps), requires_grad=call.spec.needs_grad)
        scores, kv_len = solution.scores, call.key.shape[2]
        a = (call.alpha.double().clamp(1, 2) - 1).view(-1, 1)
        group = call.query.shape[1] // max(call.key.shape[1], 1)
        key_norm = call.key.double().norm(dim=-1).nan_to_num(0).repeat_interleave(group, 1)
        longest_key = key_norm.amax(-1, keepdim=True) if kv_len else key_norm.new_zeros((*key_norm.shape[:-1], 1))
        dot = abs(call.scale) * call.query.double().norm(dim=-1) * longest_key
        size = torch.where(scores.abs() < 1e8, scores.abs(), 0.0).amax(-1) if kv_len else torch.zeros_like(dot)
        margin = 16 * eps * (a * (dot + size) + 16)
        gap = a[..., None] * scores - solution.result.tau[..., None]
        borderline = (gap.abs() <= margin[..., None]) & (a[..., None] > 0)
        return cls(call, error_bound, solution, nudged, margin, borderline)

    @property
    def empty_rows(self) -> torch.Tensor:
        """(B, H, Lq) rows that see no key."""
        return (self.solution.scores == -torch.inf).all(-1)

    def settled_rows(self) -> torch.Tensor:
        """(B, H, Lq, 1) rows whose gradient does not hang on rounding."""
        steep = (self.call.alpha.double() > 1.5).view(-1, 1, 1)
        return ~(self.borderline & steep).any(-1, keepdim=True)


def _nudged(call: AttentionCall, eps: float) -> AttentionCall:
    generator = torch.Generator().manual_seed(7)

    def nudge(x: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        return x.double() * (1 + eps * sign)

    return replace(call, query=nudge(call.query), key=nudge(call.key))


def compare_forward(expected: Expected, found: ForwardResult) -> Measured:
    """Raise unless the output (and the statistics, where the spec asks for them) is what it should be."""
    call, exact, empty = expected.call, expected.solution.result, expected.empty_rows
    _check_form("out", found.out, exact.out.shape, call.query.dtype)
    require(bool((found.out[empty] == 0).all()), "rows that see no key must be exactly 0 in the output")
    measured = [_judge("out", found.out, exact.out, expected.nudged.result.out, expected.error_bound)]
    if call.spec.return_stats:
        measured.append(_compare_stats(expected, found))
    return worst(measured)


def _compare_stats(expected: Expected, found: ForwardResult) -> Measured:
    exact, scores, empty = expected.solution.result, expected.solution.scores, expected.empty_rows
    if found.tau is None or found.support is None:
        raise ConformanceError("spec.return_stats is set, and forward returned no tau or no support")
    _check_form("tau", found.tau, exact.tau.shape, torch.float32)
    _check_form("support", found.support, exact.support.shape, torch.int32)
    zero = (found.tau[empty] == 0).all() and (found.support[empty] == 0).all()
    require(bool(zero), "tau and support must be 0 for rows that see no key")
    if not scores.numel():
        return Measured()
    a = (expected.call.alpha.double().clamp(1, 2) - 1).view(-1, 1, 1)
    seen = scores > -torch.inf
    gap = torch.where(a > 0, a * scores, scores) - exact.tau[..., None]
    above = torch.where(a > 0, gap > expected.margin[..., None], seen)
    # Far below the top of a nearly-softmax row a weight is positive and too small for the format.
    log_p = torch.where(a > 0, gap.clamp(min=0).log() / torch.where(a > 0, a, 1), gap)
    surely = (above & (log_p > _LOG_TINY_WEIGHT)).sum(-1)
    possibly = (above | (expected.borderline & seen)).sum(-1)
    wrong = ((found.support < surely) | (found.support > possibly)) & ~exact.tau.isnan()
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise ConformanceError(
            f"the support of {int(wrong.sum())} rows is wrong, first (batch, head, row) = {where}: "
            f"{int(found.support[where])} keys, the oracle has {int(exact.support[where])}"
        )
    tau = exact.tau.float()  # to the format's infinities
    same = (found.tau == tau) | (found.tau.isnan() & tau.isnan())
    error = torch.where(same, 0.0, (found.tau.double() - exact.tau).abs() / (1 + exact.tau.abs()))
    bound = _TAU_BOUND + (expected.margin / (1 + exact.tau.abs())).amax().item()
    return _checked(Measured(error.nan_to_num(math.inf).amax().item(), bound, "tau"))


def compare_backward(expected: Expected, grad_out: torch.Tensor, found: Gradients) -> Measured:
    """Raise unless every gradient the spec asks for is what it should be."""
    call = expected.call
    exact, by_row = expected.solution.gradients(grad_out)
    nudged, _ = expected.nudged.gradients(grad_out)
    # What a score's gradient would be if dp and its mean did not cancel.
    dp = _rms(grad_out) * _rms(call.value) * math.sqrt(call.value.shape[-1]) * _CANCELLED
    floors = {
        "query": dp * abs(call.scale) * _rms(call.key),
        "key": dp * abs(call.scale) * _rms(call.query),
        "value": 0.0,
        "attn_mask": dp,
    }
    inputs = {"query": call.query, "key": call.key, "value": call.value}
    if call.spec.mask_requires_grad:
        assert call.attn_mask is not None
        inputs["attn_mask"] = call.attn_mask
    measured = []
    for name, tensor in inputs.items():
        grad = getattr(found, name)
        if grad is None:
            raise ConformanceError(f"backward returned no gradient of {name}, which the spec asks for")
        _check_form(f"grad_{name}", grad, tensor.shape, tensor.dtype)
        bound = max(expected.error_bound, torch.finfo(tensor.dtype).eps)
        measured.append(_judge(f"grad_{name}", grad, getattr(exact, name), getattr(nudged, name), bound, floors[name]))
    require(bool((found.query[expected.empty_rows] == 0).all()), "rows that see no key must get a gradient of exactly 0")
    if call.spec.alpha_requires_grad:
        measured.append(_compare_alpha(expected, found.alpha, exact.alpha, nudged.alpha, by_row, dp))
    return worst(measured)


def _compare_alpha(
    expected: Expected,
    found: torch.Tensor | None,
    exact: torch.Tensor | None,
    nudged: torch.Tensor | None,
    by_row: torch.Tensor,
    dp: float,
) -> Measured:
    """alpha's gradient is a sum over rows that may cancel, so its error is measured against the root sum of squares of the rows."""
    if found is None:
        raise ConformanceError("backward returned no gradient of alpha, which the spec asks for")
    assert exact is not None
    assert nudged is not None
    alpha = expected.call.alpha
    _check_form("grad_alpha", found, alpha.shape, alpha.dtype)
    rows = by_row.square().sum((0, 2) if alpha.ndim else (0, 1, 2)).sqrt()
    count = by_row.numel() // max(alpha.numel(), 1)
    size = torch.maximum(rows, exact.abs()).clamp(min=dp * math.sqrt(count))
    size = torch.where(size > 0, size, 1)
    error = ((found.double() - exact).abs() / size).nan_to_num(math.inf).amax().item()
    change = ((nudged - exact).abs() / size).amax().item()
    bound = max(expected.error_bound, _SLACK * change, torch.finfo(alpha.dtype).eps)
    return _checked(Measured(error, _ALPHA_SLACK * bound, "grad_alpha"))


def _judge(
    what: str, found: torch.Tensor, exact: torch.Tensor, nudged: torch.Tensor, error_bound: float, floor: float = 0.0
) -> Measured:
    """Error in the Frobenius norm, and of the worst row (last dimension); the worse of the two against its bound."""
    found = found.detach().double()
    strange = found.isnan() != exact.isnan()
    require(
        not bool(strange.any()), f"{what} has NaN where it should not, or none where it should, in {int(strange.sum())} entries"
    )
    known = ~exact.isnan()
    difference = torch.where(known & (found != exact), found - exact, 0.0)
    noise = torch.where(known & (nudged != exact), nudged - exact, 0.0).nan_to_num(0.0)
    exact = torch.where(known, exact, 0.0)
    typical = max(_rms(exact), floor)
    if exact.numel() == 0:
        return Measured(0.0, error_bound, what)
    size = typical * math.sqrt(exact.numel())
    whole = _ratio(difference.norm().item(), size)
    bound = max(error_bound, _SLACK * _ratio(noise.norm().item(), size))
    row_size = exact.norm(dim=-1).clamp(min=typical * math.sqrt(exact.shape[-1]))
    row_size = torch.where(row_size > 0, row_size, 1.0)
    row = (difference.norm(dim=-1) / row_size).amax().item()
    row_bound = _ROW_SLACK * max(bound, (noise.norm(dim=-1) / row_size).amax().item())
    return _checked(worst([Measured(whole, bound, what), Measured(row, row_bound, f"worst row of {what}")]))


def _ratio(error: float, size: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / size if size > 0 else error


def _checked(measured: Measured) -> Measured:
    require(measured.ratio <= 1, f"{measured.what}: relative error {measured.error:.2e}, admitted {measured.bound:.2e}")
    return measured


def _check_form(what: str, found: torch.Tensor, shape: torch.Size | Sequence[int], dtype: torch.dtype) -> None:
    require(tuple(found.shape) == tuple(shape), f"{what} has shape {tuple(found.shape)}, should be {tuple(shape)}")
    require(found.dtype == dtype, f"{what} is {found.dtype}, should be {dtype}")


def _rms(x: torch.Tensor) -> float:
    x = x.detach().double()
    return x.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt().item() if x.numel() else 0.0
