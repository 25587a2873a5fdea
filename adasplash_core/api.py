"""The public functions: validate, choose, call. See :mod:`adasplash_core.call` for the rules and :mod:`.boundary` for the op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch

from adasplash_core import boundary, debug, plugins
from adasplash_core.alpha import FLOAT_DTYPES, check_dtype_and_device, from_number
from adasplash_core.backend import AttentionCall, KernelConfig
from adasplash_core.call import Arguments, spec_from_fields, validate
from adasplash_core.configs import ladder
from adasplash_core.device import device_info
from adasplash_core.dispatch import Explanation, explain_spec
from adasplash_core.dropout import draw_seed
from adasplash_core.errors import ArgumentError, ArgumentTypeError, BackendUnsupportedError, NoCapableBackendError
from adasplash_core.masking import visible_keys
from adasplash_core.plan import plan_for, plan_with_config
from adasplash_core.precision import constant_while_tracing

__all__ = ["AttentionStats", "attention", "entmax", "entmax15", "explain", "list_backends", "sparsemax"]


class AttentionStats(NamedTuple):
    """What a call's weights look like. Carries no gradient.

    tau: float32 (..., H, Lq), the threshold in z = (alpha - 1) * score units (for alpha = 1, the log-sum-exp of the scores).
    support: int32 (..., H, Lq), how many keys have a weight above 0.
    density: float32 (..., H), the support over all rows as a share of what the masks allow (0 where they allow nothing).
    """

    tau: torch.Tensor
    support: torch.Tensor
    density: torch.Tensor


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | torch.Tensor = 1.5,
    causal_alignment: str = "top_left",
    query_offset: int | torch.Tensor | None = None,
    window: tuple[int, int] | None = None,
    kv_lengths: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool | None = None,
    return_stats: bool = False,
    backend: str = "auto",
    config: Mapping[str, KernelConfig | Mapping[str, Any]] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, AttentionStats]:
    """alpha-entmax attention: ``scaled_dot_product_attention`` whose weights are exactly zero for irrelevant keys.

    Per query row, with scores s_j = scale * q . k_j + bias_j over the keys the masks allow,

        p = argmax over the simplex of  p . s + H_alpha(p)
          = [(alpha - 1) s - tau]_+ ^ (1 / (alpha - 1)),   sum p = 1,   out = sum_j p_j v_j

    (Tsallis entropy H_alpha; Peters et al. 2019, arXiv 1905.05702; fused: Goncalves et al. 2025, arXiv 2502.12082). alpha = 1 is
    softmax, 2 is sparsemax. Exact up to the dtype's rounding. Differentiable once in query, key, value, a tensor alpha and an
    additive mask. Rows that see no key give zeros and zero gradients.

    Parameters
    ----------
    query, key, value: (..., H, Lq, E), (..., Hkv, Lk, E), (..., Hkv, Lk, Ev); float16, bfloat16, float32 or float64; any strides.
    attn_mask: boolean (True: attend) or additive, broadcastable to (..., H, Lq, Lk). A boolean mask over keys alone,
        (B, 1, 1, Lk), stays cheap. Not with ``is_causal``: use kv_lengths / kv_starts there.
    dropout_p: share of the weights dropped, in [0, 1); the kept are divided by 1 - dropout_p. Seeded by torch's generator.
    is_causal: query i attends to keys up to its diagonal.
    scale: factor of q . k; default 1 / sqrt(E).
    enable_gqa: allow H to be a multiple of Hkv.
    alpha: number in [1, 2], or a tensor () or (H,), which is clamped on the device and may require grad.
    causal_alignment: "top_left": query 0 stands at key 0 (as SDPA); "bottom_right": the last query stands at the last key.
    query_offset: key position of query 0, an integer or an integer tensor () or (B,): for key-value caches.
    window: (left, right), the keys kept on each side of the diagonal; -1 is open.
    kv_lengths, kv_starts: integer (B,): only keys kv_starts[b] <= j < kv_lengths[b] exist.
    cu_seqlens_q, cu_seqlens_k: integer (S + 1,): packed sequences in (1, H, total, E); with max_seqlen_q, max_seqlen_k, the
        longest lengths as Python integers.
    alibi_slopes: (H,) or (B, H): adds -slope * |diagonal - j| to the score.
    deterministic: gradients equal bit for bit from run to run; default: torch.are_deterministic_algorithms_enabled().
    return_stats: also return :class:`AttentionStats`.
    backend: a registered name, never replaced by another; or "auto", the fastest capable one.
    config: ``{"forward": ..., "backward": ...}``, each a mapping or the backend's KernelConfig; default: what was tuned.

    Returns
    -------
    (..., H, Lq, Ev) in the query's dtype, or that and the stats.

    Raises
    ------
    ArgumentError (a ValueError), ArgumentTypeError (also a TypeError): an argument breaks a rule.
    UnknownBackendError, ConfigError (ValueErrors): no such backend; a config with unknown fields.
    BackendUnsupportedError, NoCapableBackendError (NotImplementedErrors): with each backend's reasons.
    """
    args = validate(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        alpha=alpha,
        causal_alignment=causal_alignment,
        query_offset=query_offset,
        window=window,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_stats=return_stats,
    )
    outputs = boundary.attention_forward(args.needs_grad, *_op_arguments(args, backend, config))
    out = _restore(outputs[0], args.leading)
    if not return_stats:
        return out
    return out, _stats(args, outputs[1], outputs[2])


def _op_arguments(args: Arguments, backend: str, config: Mapping[str, Any] | None) -> tuple[Any, ...]:
    compiling = torch.compiler.is_compiling()
    if compiling:  # lengths may be symbolic: the choice is made from everything else, once a trace
        plan = _plan_while_tracing(args.static_fields(), args.query.device, backend, config)
    else:
        if debug.enabled():
            debug.check_values(args)
        if config is None:
            plan = plan_for(args.static_fields(), args.sizes(), args.query.device, backend)
        else:
            plan = plan_with_config(args.static_fields(), args.sizes(), args.query.device, backend, config)
    return (
        args.query,
        args.key,
        args.value,
        args.alpha,
        args.attn_mask,
        args.query_offset_tensor,
        args.kv_lengths,
        args.kv_starts,
        args.cu_seqlens_q,
        args.cu_seqlens_k,
        args.alibi_slopes,
        draw_seed(args.query.device) if args.dropout_p > 0 else None,
        args.scale,
        args.dropout_p,
        args.query_offset,
        args.window[0],
        args.window[1],
        args.max_seqlen_q,
        args.max_seqlen_k,
        plan,
    )


@constant_while_tracing
def _plan_while_tracing(fields: tuple[Any, ...], device: torch.device, backend: str, config: Mapping[str, Any] | None) -> str:
    return plan_with_config(fields, (None, None, None), device, backend, config or {})


def _restore(x: torch.Tensor, leading: tuple[int, ...], inner: int = 2) -> torch.Tensor:
    """From (B, H, ...) back to the caller's leading dimensions."""
    if len(leading) == 2:
        return x
    return x.reshape((*leading, *x.shape[x.ndim - inner :]))


def _stats(args: Arguments, tau: torch.Tensor, support: torch.Tensor) -> AttentionStats:
    call = AttentionCall(
        spec=spec_from_fields(args.static_fields()),
        config=cast(KernelConfig, None),
        query=args.query,
        key=args.key,
        value=args.value,
        alpha=args.alpha,
        scale=args.scale,
        attn_mask=None if args.attn_mask is None else args.attn_mask.detach(),
        query_offset=args.query_offset if args.query_offset_tensor is None else args.query_offset_tensor,
        window=args.window,
        kv_lengths=args.kv_lengths,
        kv_starts=args.kv_starts,
        cu_seqlens_q=args.cu_seqlens_q,
        cu_seqlens_k=args.cu_seqlens_k,
    )
    allowed = visible_keys(call).expand(support.shape).sum(-1)
    density = support.sum(-1) / allowed.clamp(min=1)
    leading = args.leading
    return AttentionStats(
        _restore(tau, leading, 1), _restore(support, leading, 1), _restore(density.to(torch.float32), leading, 0)
    )


def entmax(x: torch.Tensor, alpha: float | torch.Tensor = 1.5, dim: int = -1, *, backend: str = "auto") -> torch.Tensor:
    """alpha-entmax over one dimension: like softmax, with exact zeros (Peters et al. 2019, arXiv 1905.05702).

    Parameters
    ----------
    x: floating point, any shape of at least one dimension; -inf entries get weight 0, slices of -inf alone give zeros.
    alpha: number in [1, 2], or a tensor broadcastable to ``x`` with size 1 in ``dim``; clamped on the device, may require grad.
    dim: the dimension whose entries sum to 1.
    backend: a registered name or "auto".

    Returns
    -------
    Like ``x``. Differentiable in ``x`` and a tensor alpha.

    Raises
    ------
    ArgumentError, ArgumentTypeError, UnknownBackendError, BackendUnsupportedError, NoCapableBackendError.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
        seen = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ArgumentTypeError("x must be a float16, bfloat16, float32 or float64 tensor.", seen=seen)
    if x.ndim == 0 or not -x.ndim <= dim < x.ndim:
        raise ArgumentError(f"dim must be a dimension of x, which has {x.ndim}.", seen=f"dim={dim}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # as softmax under autocast
    last = dim in (-1, x.ndim - 1)
    moved = x if last else x.movedim(dim, -1)  # a view costs autograd a node
    if isinstance(alpha, torch.Tensor):
        alpha_tensor, alpha_class = _transform_alpha(alpha, x, dim), "any"
    else:
        alpha_tensor, alpha_class = from_number(alpha, x.device)
    name = _transform_backend(x.device, x.dtype, backend)
    p = boundary.entmax_forward(moved, alpha_tensor, name, alpha_class)
    return p if last else p.movedim(-1, dim)


def entmax15(x: torch.Tensor, dim: int = -1, *, backend: str = "auto") -> torch.Tensor:
    """1.5-entmax over one dimension. See :func:`entmax`."""
    return entmax(x, 1.5, dim, backend=backend)


def sparsemax(x: torch.Tensor, dim: int = -1, *, backend: str = "auto") -> torch.Tensor:
    """Sparsemax (2-entmax; Martins and Astudillo 2016, arXiv 1602.02068) over one dimension. See :func:`entmax`."""
    return entmax(x, 2.0, dim, backend=backend)


def _transform_alpha(alpha: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    check_dtype_and_device(alpha, x.device)
    if alpha.ndim == 0:
        return alpha
    wanted = list(x.shape)
    wanted[dim] = 1
    if alpha.ndim != x.ndim or any(size not in (1, full) for size, full in zip(alpha.shape, wanted, strict=True)):
        raise ArgumentError(
            f"A tensor alpha must have shape () or be broadcastable to {tuple(wanted)}, with all of x's dimensions.",
            seen=f"shape {tuple(alpha.shape)}",
        )
    return alpha.movedim(dim, -1)


_transform_backends: dict[tuple[Any, ...], str] = {}


@constant_while_tracing
def _transform_backend(device: torch.device, dtype: torch.dtype, backend: str) -> str:
    """The name of the backend to call; after the first time one dictionary access."""
    key = (device, dtype, backend, ladder().generation)
    if (name := _transform_backends.get(key)) is None:
        name = _transform_backends[key] = _choose_for_transform(device, str(dtype).removeprefix("torch."), backend)
    return name


def _choose_for_transform(device: torch.device, dtype: str, backend: str) -> str:
    registry, info = plugins.registry(), device_info(device)
    if backend != "auto":
        if reasons := registry.backend(backend).transform_not_supported_reasons(device.type, dtype, info):
            raise BackendUnsupportedError(backend, reasons)
        return backend
    against = {name: b.transform_not_supported_reasons(device.type, dtype, info) for name, b in registry.backends.items()}
    capable = [registry.backends[name] for name, reasons in against.items() if not reasons]
    if not capable:
        raise NoCapableBackendError({**against, **{origin: (why,) for origin, why in registry.problems.items()}})
    return max(capable, key=lambda b: (b.priority, b.name)).name


def explain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *positional: Any, backend: str = "auto", **arguments: Any
) -> Explanation:
    """What :func:`attention` would do with the same arguments, and why: which backend, which configs, from where. Runs nothing.

    Returns
    -------
    Explanation: ``print`` it, or take its ``as_dict()``.
    """
    arguments.pop("config", None)
    args = validate(query, key, value, *positional, **arguments)
    return explain_spec(spec_from_fields(args.static_fields(), args.sizes()), device_info(args.query.device), backend)


def list_backends() -> dict[str, list[str]]:
    """Every backend that plugins offered, and why it cannot run here: an empty list means that it can."""
    # One that could not be used must not hide the one that has its name.
    usable_last = sorted(plugins.registry().records, key=lambda record: record.backend is not None)
    return {record.name: record.unavailable_reasons() for record in usable_last}
