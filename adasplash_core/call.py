"""Validation of one attention call: from the public arguments to 4-d tensors, a spec and plain numbers.

Everything the host can know (shapes, dtypes, Python numbers) is checked here and nowhere else. Values on a device are never read:
kernels clamp them, and ``ADASPLASH_DEBUG=1`` checks them (:mod:`adasplash_core.debug`). The code runs under ``torch.compile``
tracing, so it branches on lengths only where the result would differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import Any, NoReturn, cast

import torch

from adasplash_core.alpha import FLOAT_DTYPES, check_dtype_and_device, from_number
from adasplash_core.backend import AttentionCall, KernelConfig
from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.precision import tf32_allowed
from adasplash_core.spec import Alignment, AlphaClass, AttentionSpec, MaskKind

INDEX_DTYPES = (torch.int32, torch.int64)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES}


@dataclass(eq=False)
class Arguments:
    """The arguments of one call after validation: 4-d tensors, defaults filled in. ``leading`` restores the caller's shape."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    alpha: torch.Tensor
    alpha_class: AlphaClass
    scale: float
    leading: tuple[int, ...]
    attn_mask: torch.Tensor | None
    mask_kind: MaskKind
    query_offset: int
    query_offset_tensor: torch.Tensor | None
    has_query_offset: bool
    is_causal: bool
    causal_alignment: Alignment
    window: tuple[int, int]
    kv_lengths: torch.Tensor | None
    kv_starts: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: torch.Tensor | None
    dropout_p: float
    deterministic: bool
    return_stats: bool
    needs_grad: bool

    def static_fields(self) -> tuple[Any, ...]:
        """Everything of the spec but batch and lengths, in the order of :func:`spec_from_fields`."""
        mask, alpha, dtype, device_type = self.attn_mask, self.alpha, DTYPE_NAMES[self.query.dtype], self.query.device.type
        # index(): heads and head dims are compiled for, also where dynamic shapes made them symbolic
        return (
            device_type,
            dtype,
            index(self.query.shape[1]),
            index(self.key.shape[1]),
            index(self.query.shape[3]),
            index(self.value.shape[3]),
            self.is_causal,
            self.causal_alignment,
            self.has_query_offset,
            self.window != (-1, -1),
            self.kv_lengths is not None,
            self.kv_starts is not None,
            self.cu_seqlens_q is not None,
            self.alibi_slopes is not None,
            self.mask_kind,
            self.needs_grad and mask is not None and mask.requires_grad,
            self.alpha_class,
            alpha.ndim == 1,
            self.needs_grad and alpha.requires_grad,
            True if self.dropout_p > 0 else False,  # noqa: SIM210  a branch: bool() would stay symbolic while tracing
            self.needs_grad,
            self.deterministic,
            self.return_stats,
            dtype == "float32" and tf32_allowed(device_type),
        )

    def sizes(self) -> tuple[int, int, int]:
        """(batch, q_len, kv_len) as the spec counts them: for packed input, sequences and their longest lengths."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.shape[0] - 1, self.max_seqlen_q, self.max_seqlen_k
        return self.query.shape[0], self.query.shape[2], self.key.shape[2]


_SPEC_FIELDS = (
    "device_type", "dtype", "heads", "kv_heads", "head_dim", "head_dim_v", "causal", "causal_alignment", "query_offset", "window",
    "kv_lengths", "kv_starts", "packed", "alibi", "mask", "mask_requires_grad", "alpha_class", "alpha_per_head", "alpha_requires_grad",
    "dropout", "needs_grad", "deterministic", "return_stats", "tf32",
)  # fmt: skip


def spec_from_fields(
    fields: tuple[Any, ...], sizes: tuple[int | None, int | None, int | None] = (None, None, None)
) -> AttentionSpec:
    """The spec from :meth:`Arguments.static_fields` and, where known, (batch, q_len, kv_len)."""
    return AttentionSpec(batch=sizes[0], q_len=sizes[1], kv_len=sizes[2], **dict(zip(_SPEC_FIELDS, fields, strict=True)))


def make_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, needs_grad: bool = True, **arguments: Any
) -> AttentionCall:
    """A validated :class:`AttentionCall` to hand to a backend directly: for tuners, benchmarks and conformance tests.

    Takes the keyword arguments of :func:`adasplash_core.attention` but ``backend`` and ``config``. The call's config is unset: use
    ``dataclasses.replace(call, config=...)``. ``needs_grad`` asks the backend to keep what its backward needs; gradients to alpha
    and an additive mask are asked for where those tensors require grad.
    """
    args = validate(query, key, value, needs_grad=needs_grad, **arguments)
    spec = spec_from_fields(args.static_fields(), args.sizes())
    seed = None
    if args.dropout_p > 0:
        from adasplash_core.dropout import draw_seed

        seed = draw_seed(query.device)
    return AttentionCall(
        spec=spec,
        config=cast(KernelConfig, None),
        query=args.query.detach(),
        key=args.key.detach(),
        value=args.value.detach(),
        alpha=args.alpha.detach(),
        scale=args.scale,
        attn_mask=None if args.attn_mask is None else args.attn_mask.detach(),
        query_offset=args.query_offset if args.query_offset_tensor is None else args.query_offset_tensor,
        window=args.window,
        kv_lengths=args.kv_lengths,
        kv_starts=args.kv_starts,
        cu_seqlens_q=args.cu_seqlens_q,
        cu_seqlens_k=args.cu_seqlens_k,
        alibi_slopes=args.alibi_slopes,
        dropout_p=args.dropout_p,
        dropout_seed=seed,
    )


def validate(
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
    needs_grad: bool | None = None,
) -> Arguments:
    """Check every rule the host can check. Raises ArgumentError and ArgumentTypeError."""
    query, key, value = _autocast(query, key, value)
    _check_qkv(query, key, value, enable_gqa)
    leading = tuple(query.shape[:-2])
    if query.ndim != 4:
        query, key, value = _to_4d(query), _to_4d(key), _to_4d(value)
    batch, heads, q_len, head_dim = query.shape
    device = query.device
    if not 0 <= dropout_p < 1:
        raise ArgumentError("dropout_p must be at least 0 and less than 1.", seen=f"dropout_p={dropout_p}")
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    elif isinstance(scale, torch.Tensor):
        raise ArgumentTypeError("scale must be a number.", seen="a tensor", hint="multiply the query by it instead")
    elif not -math.inf < scale < math.inf:
        raise ArgumentError("scale must be a finite number.", seen=f"scale={scale}")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ArgumentError('causal_alignment must be "top_left" or "bottom_right".', seen=repr(causal_alignment))

    offset, offset_tensor = 0, None
    if query_offset is not None:
        if causal_alignment == "bottom_right":
            raise ArgumentError(
                "query_offset and causal_alignment='bottom_right' both say where the first query stands.",
                seen="both",
                hint='keep causal_alignment="top_left" with a query_offset',
            )
        if isinstance(query_offset, torch.Tensor):
            offset_tensor = _index_tensor("query_offset", query_offset, (batch,), device, scalar=True)
        elif isinstance(query_offset, (int, torch.SymInt)) and not isinstance(query_offset, bool):
            offset = query_offset
        else:
            raise ArgumentTypeError("query_offset must be an integer or an integer tensor.", seen=repr(query_offset))

    packed = _check_packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, batch, device)
    if packed:
        clashing = [
            name
            for name, given in (
                ("attn_mask", attn_mask), ("kv_lengths", kv_lengths), ("kv_starts", kv_starts), ("query_offset", query_offset)
            )
            if given is not None
        ]  # fmt: skip
        if clashing:
            raise ArgumentError(
                "Packed input (cu_seqlens_q, cu_seqlens_k) already says which keys belong to which query.",
                seen=f"{', '.join(clashing)} with it",
                hint="drop it, or unpack into a padded batch",
            )
    if kv_lengths is not None:
        kv_lengths = _index_tensor("kv_lengths", kv_lengths, (batch,), device)
    if kv_starts is not None:
        kv_starts = _index_tensor("kv_starts", kv_starts, (batch,), device)

    mask_kind: MaskKind = "none"
    if attn_mask is not None:
        if is_causal:
            raise ArgumentError(
                "attn_mask and is_causal exclude each other, as in scaled_dot_product_attention.",
                seen="attn_mask with is_causal=True",
                hint="for causal attention with padding pass kv_lengths or kv_starts, else fold the causal mask into attn_mask",
            )
        attn_mask, mask_kind = _normalise_mask(attn_mask, leading, (batch, heads, q_len, key.shape[2]), device)

    alpha_tensor, alpha_class = _alpha(alpha, heads, device)
    if alibi_slopes is not None:
        _check_alibi(alibi_slopes, batch, heads, device)
        alibi_slopes = alibi_slopes.to(torch.float32)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if needs_grad is None:
        needs_grad = torch.is_grad_enabled() and (
            query.requires_grad
            or key.requires_grad
            or value.requires_grad
            or alpha_tensor.requires_grad
            or (attn_mask is not None and attn_mask.requires_grad)
        )
    return Arguments(
        query=query,
        key=key,
        value=value,
        alpha=alpha_tensor,
        alpha_class=alpha_class,
        scale=scale,
        leading=leading,
        attn_mask=attn_mask,
        mask_kind=mask_kind,
        query_offset=offset,
        query_offset_tensor=offset_tensor,
        has_query_offset=query_offset is not None,
        is_causal=is_causal,
        causal_alignment=cast(Alignment, causal_alignment),
        window=_window(window),
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=0 if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=0 if max_seqlen_k is None else max_seqlen_k,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_stats=return_stats,
        needs_grad=needs_grad,
    )


def _autocast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast q, k and v become its dtype, as in SDPA; float64 and everything else stay as they are."""
    if not (isinstance(query, torch.Tensor) and torch.is_autocast_enabled(query.device.type)):
        return query, key, value
    target = torch.get_autocast_dtype(query.device.type)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    query, key, value = (
        x.to(target) if isinstance(x, torch.Tensor) and x.dtype in eligible else x for x in (query, key, value)
    )
    return query, key, value


def _check_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(f"{name} must be a tensor.", seen=type(x).__name__)
        if x.dtype not in FLOAT_DTYPES:
            raise ArgumentTypeError(f"{name} must be float16, bfloat16, float32 or float64.", seen=str(x.dtype))
    if not query.ndim == key.ndim == value.ndim or query.ndim < 2:
        raise ArgumentError(
            "query, key and value must have the same number of dimensions, (..., heads, length, head_dim), at least 2.",
            seen=_shapes(query, key, value),
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ArgumentTypeError(
            "query, key and value must have one dtype.",
            seen=f"{query.dtype}, {key.dtype}, {value.dtype}",
            hint="cast them, or use torch.autocast",
        )
    if not query.device == key.device == value.device:
        raise ArgumentError("query, key and value must be on one device.", seen=f"{query.device}, {key.device}, {value.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ArgumentError("query and key must have the same head dim (their last size).", seen=_shapes(query, key, value))
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ArgumentError("The head dim (the last size) must be at least 1.", seen=_shapes(query, key, value))
    if key.shape[-2] != value.shape[-2]:
        raise ArgumentError("key and value must have the same length.", seen=_shapes(query, key, value))
    if query.ndim == 2:
        return
    if query.shape[:-3] != key.shape[:-3] or key.shape[:-3] != value.shape[:-3]:
        raise ArgumentError(
            "query, key and value must have the same batch sizes.", seen=_shapes(query, key, value), hint="expand() them"
        )
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if kv_heads != value.shape[-3]:
        raise ArgumentError("key and value must have the same number of heads.", seen=_shapes(query, key, value))
    if heads != kv_heads:
        if not enable_gqa:
            raise ArgumentError(
                "query and key must have the same number of heads unless enable_gqa=True.",
                seen=f"key has {kv_heads} heads and query {heads}",
                hint="pass enable_gqa=True",
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ArgumentError(
                "With enable_gqa=True the query's heads must be a multiple of the key's.",
                seen=f"{heads} query heads and {kv_heads} key heads",
            )


def _to_4d(x: torch.Tensor) -> torch.Tensor:
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.flatten(0, -4) if x.ndim > 4 else x


def _shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _index_tensor(name: str, x: object, shape: tuple[int, ...], device: torch.device, scalar: bool = False) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dtype not in INDEX_DTYPES:
        seen = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ArgumentTypeError(f"{name} must be an int32 or int64 tensor.", seen=seen)
    if tuple(x.shape) != shape and not (scalar and x.ndim == 0):
        wanted = f"{shape} (one per sequence)" + (" or ()" if scalar else "")
        raise ArgumentError(f"{name} must have shape {wanted}.", seen=f"shape {tuple(x.shape)}")
    _same_device(name, x, device)
    return x


def _same_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ArgumentError(
            f"{name} must be on the query's device.", seen=f"{x.device} and {device}", hint=f"{name}.to(query.device)"
        )


def _check_packed(
    cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, max_q: int | None, max_k: int | None, batch: int, device: torch.device
) -> bool:
    given = [x is not None for x in (cu_q, cu_k, max_q, max_k)]
    if not any(given):
        return False
    if cu_q is None or cu_k is None or max_q is None or max_k is None:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        missing = [name for name, here in zip(names, given, strict=True) if not here]
        raise ArgumentError(
            "Packed input needs cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k together.",
            seen=f"no {', '.join(missing)}",
            hint="max_seqlen_* are the longest sequences' lengths, as Python integers",
        )
    for name, number in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool):
            raise ArgumentTypeError(
                f"{name} must be an integer.", seen=type(number).__name__, hint="int(lengths.max()), once a batch"
            )
        if number < 0:
            raise ArgumentError(f"{name} must not be negative.", seen=str(number))
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(x, torch.Tensor) or x.dtype not in INDEX_DTYPES:
            seen = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ArgumentTypeError(f"{name} must be an int32 or int64 tensor.", seen=seen)
        if x.ndim != 1 or x.shape[0] < 2:
            raise ArgumentError(
                f"{name} must have shape (sequences + 1,), from 0 to the total length.", seen=f"shape {tuple(x.shape)}"
            )
        _same_device(name, x, device)
    if cu_q.shape != cu_k.shape:
        raise ArgumentError(
            "cu_seqlens_q and cu_seqlens_k must have the same length.", seen=f"{tuple(cu_q.shape)} and {tuple(cu_k.shape)}"
        )
    if batch != 1:
        raise ArgumentError("Packed input must be (1, heads, total, head_dim).", seen=f"batch size {batch}")
    return True


def _normalise_mask(
    mask: torch.Tensor, leading: tuple[int, ...], target: tuple[int, int, int, int], device: torch.device
) -> tuple[torch.Tensor, MaskKind]:
    if not isinstance(mask, torch.Tensor) or (mask.dtype != torch.bool and mask.dtype not in FLOAT_DTYPES):
        seen = str(mask.dtype) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ArgumentTypeError(
            "attn_mask must be a boolean (True: attend) or floating point (added to scores) tensor.", seen=seen
        )
    _same_device("attn_mask", mask, device)
    full = (*leading, *target[2:])
    fits = mask.ndim <= len(full) and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ArgumentError(f"attn_mask must be broadcastable to {full}.", seen=f"shape {tuple(mask.shape)}")
    if mask.ndim > 4:
        mask = mask.expand(*leading[:-1], *mask.shape[-3:])
    if mask.ndim != 4:
        mask = _to_4d(mask)
    if mask.dtype != torch.bool:
        return mask, "additive"
    if mask.shape[1] == 1 and mask.shape[2] == 1:
        return mask[:, 0, 0].expand(-1, target[3]), "key"
    return mask, "bool"


def _window(window: object) -> tuple[int, int]:
    if window is None:
        return (-1, -1)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ArgumentTypeError(
            "window must be (left, right), the keys kept on each side of the diagonal; -1 is open.", seen=repr(window)
        )
    for side in window:
        if not isinstance(side, (int, torch.SymInt)) or isinstance(side, bool) or side < -1:
            raise ArgumentError("window's sides must be integers of at least -1 (-1: open).", seen=repr(window))
    return window[0], window[1]


def _alpha(alpha: float | torch.Tensor, heads: int, device: torch.device) -> tuple[torch.Tensor, AlphaClass]:
    if not isinstance(alpha, torch.Tensor):
        return from_number(alpha, device)
    check_dtype_and_device(alpha, device)
    if alpha.ndim > 1 or (alpha.ndim == 1 and alpha.shape[0] != heads):
        raise ArgumentError(f"A tensor alpha must have shape () or (heads,) = ({heads},).", seen=f"shape {tuple(alpha.shape)}")
    return alpha, "any"


def _check_alibi(slopes: object, batch: int, heads: int, device: torch.device) -> None:
    if not isinstance(slopes, torch.Tensor) or slopes.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(
            "alibi_slopes must be a floating point tensor.", seen=getattr(slopes, "dtype", type(slopes).__name__).__str__()
        )
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ArgumentError(
            f"alibi_slopes must have shape (heads,) or (batch, heads) = ({batch}, {heads}).",
            seen=f"shape {tuple(slopes.shape)}",
        )
    _same_device("alibi_slopes", slopes, device)
    if slopes.requires_grad and torch.is_grad_enabled():
        _no_gradient("alibi_slopes")


def _no_gradient(name: str) -> NoReturn:
    raise ArgumentError(
        f"{name} gets no gradient.", seen=f"{name}.requires_grad=True", hint=f"pass {name}.detach(), or an additive attn_mask"
    )
