"""Inputs for tests and tuning: random ones at three sparsities, score patterns that break solvers, memory layouts, poisoned memory.

Everything is drawn on the CPU from a seed and then moved, so that every device sees the same numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call as _make_call
from adasplash_core.spec import AttentionSpec

Sparsity = Literal["dense", "moderate", "sparse"]

QUERY_SCALE: Mapping[Sparsity, float] = {"dense": 1.0, "moderate": 4.0, "sparse": 16.0}
"""Factor on standard normal queries. With 1 about a tenth of the keys stay in the support of a long row (1.5-entmax); with 16 one to
three, as in most layers of trained models."""

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _sizes(spec: AttentionSpec) -> tuple[int, int, int]:
    if spec.batch is None or spec.q_len is None or spec.kv_len is None:
        raise ValueError(f"Inputs can be drawn only for a spec whose batch, q_len and kv_len are known, got {spec}.")
    return spec.batch, spec.q_len, spec.kv_len


def make_qkv(spec: AttentionSpec, sparsity: Sparsity = "dense", device: torch.device | str | None = None, seed: int = 0) -> Qkv:
    """Random query (B, H, Lq, E), key (B, Hkv, Lk, E) and value (B, Hkv, Lk, Ev) of a spec whose sizes are known.

    Standard normal, the query times :data:`QUERY_SCALE`. Packed specs give (1, H, B * Lq, E): B sequences of the longest length.
    """
    batch, q_len, kv_len = _sizes(spec)
    if spec.packed:
        batch, q_len, kv_len = 1, batch * q_len, batch * kv_len
    generator = torch.Generator().manual_seed(seed)
    target = torch.device(device or spec.device_type)
    dtype = getattr(torch, spec.dtype)

    def normal(heads: int, length: int, dim: int, factor: float = 1.0) -> torch.Tensor:
        return (factor * torch.randn(batch, heads, length, dim, generator=generator)).to(target, dtype)

    return (
        normal(spec.heads, q_len, spec.head_dim, QUERY_SCALE[sparsity]),
        normal(spec.kv_heads, kv_len, spec.head_dim),
        normal(spec.kv_heads, kv_len, spec.head_dim_v),
    )


ALPHA_OF_CLASS: Mapping[str, float] = {"1": 1.0, "1.5": 1.5, "2": 2.0, "other": 1.25, "any": 1.5}


def make_arguments(spec: AttentionSpec, device: torch.device | str | None = None, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of :func:`adasplash_core.attention` under which a call has this spec, for instance lengths if it has lengths.

    Masks hide about a third of the keys; the query offset is Lk - Lq; the window is an eighth of Lk.
    """
    batch, q_len, kv_len = _sizes(spec)
    generator = torch.Generator().manual_seed(seed + 1)
    target = torch.device(device or spec.device_type)
    arguments: dict[str, Any] = {
        "is_causal": spec.causal,
        "causal_alignment": spec.causal_alignment,
        "enable_gqa": spec.heads != spec.kv_heads,
        "deterministic": spec.deterministic,
        "return_stats": spec.return_stats,
        "alpha": ALPHA_OF_CLASS[spec.alpha_class],
        "dropout_p": 0.1 if spec.dropout else 0.0,
    }
    if spec.alpha_class == "any":
        alpha = torch.full((spec.heads,) if spec.alpha_per_head else (), 1.5, device=target)
        arguments["alpha"] = alpha.requires_grad_(spec.alpha_requires_grad)
    if spec.query_offset:
        arguments["query_offset"] = kv_len - q_len
    if spec.window:
        arguments["window"] = (max(kv_len // 8, 1), 0 if spec.causal else max(kv_len // 8, 1))
    if spec.kv_lengths:
        arguments["kv_lengths"] = torch.randint(kv_len - kv_len // 3, kv_len + 1, (batch,), generator=generator).to(target)
    if spec.kv_starts:
        arguments["kv_starts"] = torch.randint(0, kv_len // 3 + 1, (batch,), generator=generator).to(target)
    if spec.alibi:
        arguments["alibi_slopes"] = torch.tensor([2.0 ** (-8 * (h + 1) / spec.heads) for h in range(spec.heads)], device=target)
    if spec.packed:
        for name, length in (("q", q_len), ("k", kv_len)):
            arguments[f"cu_seqlens_{name}"] = torch.arange(batch + 1, dtype=torch.int32, device=target) * length
            arguments[f"max_seqlen_{name}"] = length
    if spec.mask != "none":
        shape = (batch, 1, 1 if spec.mask == "key" else q_len, kv_len)
        if spec.mask == "additive":
            mask = torch.randn(shape, generator=generator).to(target, getattr(torch, spec.dtype))
            arguments["attn_mask"] = mask.requires_grad_(spec.mask_requires_grad)
        else:
            arguments["attn_mask"] = (torch.rand(shape, generator=generator) < 2 / 3).to(target)
    return arguments


def make_call(
    spec: AttentionSpec, sparsity: Sparsity = "dense", device: torch.device | str | None = None, seed: int = 0
) -> AttentionCall:
    """A call with this spec, of :func:`make_qkv` and :func:`make_arguments`; its config is unset."""
    query, key, value = make_qkv(spec, sparsity, device, seed)
    call = _make_call(query, key, value, needs_grad=spec.needs_grad, **make_arguments(spec, device, seed))
    # Head counts of 1 and the like make a spec more special than what was asked for; the backend must see what was asked.
    return replace(call, spec=spec)


# -- score patterns ---------------------------------------------------------------------------------------------------------------


def _plane(scores: torch.Tensor, spec: AttentionSpec, seed: int, scale: float) -> Qkv:
    """q, k, v with the given scores (Lk,) in every row, up to the dtype's rounding of the keys: all of it in the first coordinate."""
    query, key, value = make_qkv(replace(spec, packed=False), seed=seed, device="cpu")
    query, key = torch.zeros_like(query), torch.zeros_like(key)
    query[..., 0], key[..., 0] = 1.0, (scores / scale).to(key.dtype)
    return query, key, value


def constant_rows(spec: AttentionSpec, seed: int = 0) -> Qkv:
    """All scores of a row are equal: every key is in the support with the same weight."""
    query, key, value = make_qkv(spec, seed=seed, device="cpu")
    return query, key[:, :, :1].expand_as(key).contiguous(), value


def ties(spec: AttentionSpec, seed: int = 0) -> Qkv:
    """Scores from a handful of values that the dtype holds exactly, each many times, the maximum included."""
    generator = torch.Generator().manual_seed(seed)
    length = _sizes(spec)[2]
    levels = torch.randint(-3, 1, (length,), generator=generator).double() / 2
    return _plane(levels, spec, seed, 1 / math.sqrt(spec.head_dim))


def two_clusters(spec: AttentionSpec, seed: int = 0) -> Qkv:
    """One key at the top and all others where that key's own threshold just lets them in: solvers need most steps here."""
    generator = torch.Generator().manual_seed(seed)
    length = _sizes(spec)[2]
    scores = -1.8 + 0.3 * torch.rand(length, dtype=torch.float64, generator=generator)
    scores[torch.randperm(length, generator=generator)[:1]] = 0.0
    return _plane(scores, spec, seed, 1 / math.sqrt(spec.head_dim))


def exponential_scores(spec: AttentionSpec, seed: int = 0) -> Qkv:
    """Scores that fall off from the maximum as an exponential distribution: few keys near it, more and more below."""
    generator = torch.Generator().manual_seed(seed)
    length = _sizes(spec)[2]
    scores = -torch.empty(length, dtype=torch.float64).exponential_(0.5, generator=generator)
    return _plane(scores, spec, seed, 1 / math.sqrt(spec.head_dim))


def huge_scores(spec: AttentionSpec, seed: int = 0, factor: float = 1e4) -> Qkv:
    """Scores in the tens of thousands, where max - 1 has few digits left: one key takes nearly every row."""
    query, key, value = make_qkv(spec, seed=seed, device="cpu")
    return (query.double() * factor).clamp(-3e4, 3e4).to(query.dtype), key, value


def needles(spec: AttentionSpec, seed: int = 0) -> Qkv:
    """Each row is random noise and one key of its own, far from its diagonal, that takes most of the weight.

    Keys are planted by a permutation, so no two neighbouring rows want the same one: a search by blocks or samples that misses a key
    wanted by one row only is found out.
    """
    query, key, value = make_qkv(spec, seed=seed, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    q_len, kv_len, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if q_len and kv_len:
        planted = torch.randperm(kv_len, generator=generator)[torch.arange(min(q_len, kv_len))]
        rows = torch.arange(len(planted))
        first_of_group = query[:, ::group, rows].double()
        norm = first_of_group.square().sum(-1, keepdim=True).clamp(min=1.0)
        gain = 6 * math.sqrt(spec.head_dim) / norm  # a score of 6 over noise of standard deviation 1
        key[:, :, planted] = (0.5 * key[:, :, planted].double() + gain * first_of_group).to(key.dtype)
    return query, key, value


def full_support(spec: AttentionSpec, seed: int = 0) -> Qkv:
    """Scores so close together that every key of every row is in the support: nothing is sparse, and lists of keys are longest."""
    query, key, value = make_qkv(spec, seed=seed, device="cpu")
    return query * (0.1 / max(spec.kv_len or 1, 1)), key, value


PATTERNS: Mapping[str, Callable[[AttentionSpec, int], Qkv]] = {
    "constant_rows": constant_rows,
    "ties": ties,
    "two_clusters": two_clusters,
    "exponential_scores": exponential_scores,
    "huge_scores": huge_scores,
    "needles": needles,
    "full_support": full_support,
}


# -- memory layouts ---------------------------------------------------------------------------------------------------------------


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """A window into a larger buffer: every stride but the last is odd, and the data starts in the middle."""
    batch, heads, length, dim = x.shape
    buffer = torch.full((batch + 1, heads + 1, length + 3, dim + 3), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[1:, 1:, 2 : length + 2, 1 : dim + 1]
    view.copy_(x)
    return view


def _every_other(x: torch.Tensor) -> torch.Tensor:
    """A head dim of stride 2."""
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[..., ::2]
    view.copy_(x)
    return view


def _fused(x: torch.Tensor) -> torch.Tensor:
    """One third of a (B, L, 3, H, E) projection, as a fused QKV layer gives it."""
    batch, heads, length, dim = x.shape
    buffer = torch.full((batch, length, 3, heads, dim), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[:, :, 1].transpose(1, 2)
    view.copy_(x)
    return view


def _length_last(x: torch.Tensor) -> torch.Tensor:
    """(B, H, E, L) in memory, as some caches keep keys."""
    return x.mT.contiguous().mT


def _expanded(x: torch.Tensor) -> torch.Tensor:
    """Heads of stride 0. Changes the values: all heads become the first."""
    return x[:, :1].expand_as(x)


LAYOUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "every_other": _every_other,
    "fused_qkv": _fused,
    "length_last": _length_last,
    "expanded": _expanded,
}
"""Views of a (B, H, L, E) tensor with unusual strides, NaN in the memory between; equal to it but for ``expanded``."""


# -- poisoned memory --------------------------------------------------------------------------------------------------------------

_UNINITIALISED = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_permuted.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class _Poison(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED:
            if result.is_floating_point() or result.is_complex():
                result.fill_(torch.nan)
            elif result.dtype != torch.bool:
                result.fill_(torch.iinfo(result.dtype).max)
        return result


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and its kin give NaN (integers: their largest value), so that an output nobody wrote cannot pass.

    On every device, for allocations made from Python by this thread, without the side effects of torch's deterministic mode.
    """
    with _Poison():  # type: ignore[no-untyped-call]
        yield
