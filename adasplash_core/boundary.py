"""The one torch.library boundary: ``torch.compile``, autograd and the dispatcher see these ops and nothing of a backend.

    attention_forward  -> [out, *(tau, support if return_stats), *saved]
    attention_backward -> [dq, dk, dv, dalpha?, dmask?]
    entmax_forward     -> p
    entmax_backward    -> [dx, each row's part of dalpha?]

Gradients enter as an autograd.Function registered at the op's Autograd key, which costs a quarter of ``register_autograd``'s time.
The ops are pure functions of their inputs: dropout's seed is one of them, so recomputing a checkpointed call under torch.compile
draws the same mask without a tag. The backend's name is fixed in ``plan`` before the op; only configs are looked up inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from adasplash_core import layout, plugins
from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig
from adasplash_core.configs import ladder
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import AdasplashError, ConfigRejectedError, DoubleBackwardError
from adasplash_core.plan import Plan, decode
from adasplash_core.spec import AttentionSpec, Pass
from adasplash_core.transform_grad import gradients

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor alpha, Tensor? attn_mask, Tensor? query_offset_tensor, Tensor? kv_lengths, "
    "Tensor? kv_starts, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? dropout_seed, float scale, "
    "float dropout_p, SymInt query_offset, SymInt window_left, SymInt window_right, SymInt max_seqlen_q, SymInt max_seqlen_k, str plan"
)

_library = torch.library.Library("adasplash", "DEF")
_library.define(f"attention_forward({_INPUTS}) -> Tensor[]")
_library.define(f"attention_backward(Tensor grad_out, Tensor? out, Tensor[] saved, {_INPUTS}) -> Tensor[]")
_library.define("entmax_forward(Tensor x, Tensor alpha, str backend, str alpha_class) -> Tensor")
_library.define(
    "entmax_backward(Tensor p, Tensor grad, Tensor alpha, str backend, str alpha_class, bool alpha_grad) -> Tensor[]"
)


class _Inputs(NamedTuple):
    """The ops' common arguments, in the schema's order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    alpha: torch.Tensor
    attn_mask: torch.Tensor | None
    query_offset_tensor: torch.Tensor | None
    kv_lengths: torch.Tensor | None
    kv_starts: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    dropout_seed: torch.Tensor | None
    scale: float
    dropout_p: float
    query_offset: int
    window_left: int
    window_right: int
    max_seqlen_q: int
    max_seqlen_k: int
    plan: str

    def sizes(self) -> tuple[int, int, int]:
        """(batch, q_len, kv_len) as the spec counts them."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.shape[0] - 1, self.max_seqlen_q, self.max_seqlen_k
        return self.query.shape[0], self.query.shape[2], self.key.shape[2]

    def is_empty(self) -> bool:
        return self.query.numel() == 0 or self.key.numel() == 0

    def call(self, spec: AttentionSpec, config: KernelConfig) -> AttentionCall:
        return AttentionCall(
            spec=spec,
            config=config,
            query=self.query,
            key=self.key,
            value=self.value,
            alpha=self.alpha,
            scale=self.scale,
            attn_mask=self.attn_mask,
            query_offset=self.query_offset if self.query_offset_tensor is None else self.query_offset_tensor,
            window=(self.window_left, self.window_right),
            kv_lengths=self.kv_lengths,
            kv_starts=self.kv_starts,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            alibi_slopes=self.alibi_slopes,
            dropout_p=self.dropout_p,
            dropout_seed=self.dropout_seed,
        )


# -- what a plan means here -----------------------------------------------------------------------------------------------------


class _Resolved:
    """A plan at given sizes on a device: backend, full spec, and one pass's config."""

    __slots__ = ("backend", "config", "device", "explicit", "generation", "pass_", "spec")

    def __init__(self, plan: Plan, sizes: tuple[int, int, int], device: torch.device, pass_: Pass) -> None:
        configs = ladder()
        self.backend: AttentionBackend = plugins.registry().backend(plan.backend)
        self.spec = _with_sizes(plan.spec, *sizes)
        self.device: DeviceInfo = device_info(device)
        self.pass_: Pass = pass_
        explicit = plan.explicit(self.backend, pass_)
        self.explicit = explicit is not None
        self.generation = configs.generation
        self.config = explicit if explicit is not None else configs.find(self.backend, self.spec, self.device, pass_).config

    def reject(self, error: ConfigRejectedError) -> KernelConfig:
        """Another config after this one turned out not to run; an explicit one's error is the caller's."""
        if self.explicit:
            raise error
        found = ladder().reject(self.backend, self.spec, self.device, self.pass_, self.config, error.why)
        self.config = found.config
        return found.config


_resolved: dict[tuple[Any, ...], _Resolved] = {}
_NOTHING: tuple[None, ...] = (None,) * len(_Inputs._fields)
_ALPHA, _MASK = _Inputs._fields.index("alpha"), _Inputs._fields.index("attn_mask")


def _resolve(inputs: _Inputs, pass_: Pass) -> _Resolved:
    sizes = inputs.sizes()
    key = (inputs.plan, pass_, sizes, inputs.query.device)
    known = _resolved.get(key)
    if known is None or known.generation != ladder().generation:
        if len(_resolved) >= 8192:
            _resolved.clear()
        known = _resolved[key] = _Resolved(decode(inputs.plan), sizes, inputs.query.device, pass_)
    return known


def _with_sizes(spec: AttentionSpec, batch: int, q_len: int, kv_len: int) -> AttentionSpec:
    return AttentionSpec(**{**spec.as_dict(), "batch": batch, "q_len": q_len, "kv_len": kv_len})


def _saved_spec(inputs: _Inputs) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the saved tensors; sizes may be symbolic."""
    plan = decode(inputs.plan)
    if not plan.spec.needs_grad:
        return []
    spec = _with_sizes(plan.spec, inputs.query.shape[0], inputs.query.shape[2], inputs.key.shape[2])
    saved = plugins.registry().backend(plan.backend).saved_spec(spec)
    return [(tuple(shape), getattr(torch, dtype)) for shape, dtype in saved]


# -- forward --------------------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> list[torch.Tensor]:
    inputs = _Inputs(*arguments)
    if inputs.is_empty():
        return _allocate(inputs, torch.Tensor.new_zeros)
    resolved = _resolve(inputs, "forward")
    call = inputs.call(resolved.spec, resolved.config)
    try:
        result = resolved.backend.forward(call)
    except ConfigRejectedError as error:
        call.config = resolved.reject(error)
        result = resolved.backend.forward(call)
    out = layout.conform(_inputless(result.out, inputs), inputs.query)
    stats = _stats(result, inputs, resolved.backend) if resolved.spec.return_stats else ()
    return [out, *stats, *(s.contiguous() for s in result.saved)]


def _inputless(out: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
    expected = (*inputs.query.shape[:3], inputs.value.shape[3])
    if out.shape != expected or out.dtype != inputs.query.dtype:
        raise AdasplashError(
            f"Backend {decode(inputs.plan).backend!r} broke its contract: forward must return {expected} in {inputs.query.dtype}, "
            f"got {tuple(out.shape)} in {out.dtype}. Hint: run `adasplash backends check`."
        )
    return out


def _stats(result: ForwardResult, inputs: _Inputs, backend: AttentionBackend) -> tuple[torch.Tensor, torch.Tensor]:
    if result.tau is None or result.support is None:
        raise AdasplashError(f"Backend {backend.name!r} declares the feature 'stats' and returned no tau or support.")
    return result.tau.to(torch.float32).contiguous(), result.support.to(torch.int32).contiguous()


def _allocate(inputs: _Inputs, new: Any) -> list[torch.Tensor]:
    """All outputs by shape and layout alone: for tracing with ``new_empty``, for empty inputs with ``new_zeros``."""
    query = inputs.query
    out = layout.empty_like(query, inputs.value.shape[3])
    if new is torch.Tensor.new_zeros:
        out.zero_()
    stats = (torch.float32, torch.int32) if decode(inputs.plan).spec.return_stats else ()
    return [
        out,
        *(new(query, query.shape[:3], dtype=dtype) for dtype in stats),
        *(new(query, shape, dtype=dtype) for shape, dtype in _saved_spec(inputs)),
    ]


def _forward_fake(*arguments: Any) -> list[torch.Tensor]:
    return _allocate(_Inputs(*arguments), torch.Tensor.new_empty)


# -- backward -------------------------------------------------------------------------------------------------------------------


def _backward(
    grad_out: torch.Tensor, out: torch.Tensor | None, saved: Sequence[torch.Tensor], *arguments: Any
) -> list[torch.Tensor]:
    inputs = _Inputs(*arguments)
    if inputs.is_empty():
        return [g.zero_() for g in _backward_fake(grad_out, out, saved, *arguments)]
    resolved = _resolve(inputs, "backward")
    call = inputs.call(resolved.spec, resolved.config)
    try:
        gradients = resolved.backend.backward(call, grad_out, saved, out)
    except ConfigRejectedError as error:
        call.config = resolved.reject(error)
        gradients = resolved.backend.backward(call, grad_out, saved, out)
    return _flatten(gradients, inputs, resolved)


def _flatten(gradients: Gradients, inputs: _Inputs, resolved: _Resolved) -> list[torch.Tensor]:
    spec, backend = resolved.spec, resolved.backend
    flat = [
        layout.conform(gradient if gradient.dtype == like.dtype else gradient.to(like.dtype), like)
        for gradient, like in ((gradients.query, inputs.query), (gradients.key, inputs.key), (gradients.value, inputs.value))
    ]
    for wanted, gradient, like in (
        (spec.alpha_requires_grad, gradients.alpha, inputs.alpha),
        (spec.mask_requires_grad, gradients.attn_mask, inputs.attn_mask),
    ):
        if wanted and like is not None:
            if gradient is None:
                raise AdasplashError(f"Backend {backend.name!r} took a call that asks for a gradient and returned none: {spec}")
            flat.append(gradient.to(like.dtype).reshape(like.shape).contiguous())
    return flat


def _backward_fake(
    grad_out: torch.Tensor, out: torch.Tensor | None, saved: Sequence[torch.Tensor], *arguments: Any
) -> list[torch.Tensor]:
    inputs = _Inputs(*arguments)
    spec = decode(inputs.plan).spec
    flat = [layout.empty_like(x) for x in (inputs.query, inputs.key, inputs.value)]
    if spec.alpha_requires_grad:
        flat.append(inputs.alpha.new_empty(inputs.alpha.shape))
    if spec.mask_requires_grad and inputs.attn_mask is not None:
        flat.append(inputs.attn_mask.new_empty(inputs.attn_mask.shape))
    return flat


# -- autograd -------------------------------------------------------------------------------------------------------------------

_TENSORS = 12  # of _Inputs' fields, the first this many are tensors or None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        if _is_watched(arguments[0]):
            with torch._C._AutoDispatchBelowAutograd():
                outputs = torch.ops.adasplash.attention_forward(*arguments)
        else:
            outputs = _forward(*arguments)
        plan = decode(arguments[-1])
        out, *rest = outputs
        needs_out = plugins.registry().backend(plan.backend).backward_needs_out
        saved = rest[2:] if plan.spec.return_stats else rest
        ctx.save_for_backward(*arguments[:_TENSORS], *((out,) if needs_out else ()), *saved)
        ctx.numbers, ctx.needs_out, ctx.spec = arguments[_TENSORS:], needs_out, plan.spec
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if gradients[0] is None:
            return _NOTHING
        tensors = ctx.saved_tensors
        arguments, kept = tensors[:_TENSORS], list(tensors[_TENSORS:])
        out = kept.pop(0) if ctx.needs_out else None
        if torch.is_grad_enabled() or _is_watched(gradients[0]):
            flat = torch.ops.adasplash.attention_backward(gradients[0], out, kept, *arguments, *ctx.numbers)
        else:
            flat = _backward(gradients[0], out, kept, *arguments, *ctx.numbers)
        nothing: list[torch.Tensor | None] = [*flat[:3], *_NOTHING[3:]]
        rest = iter(flat[3:])
        if ctx.spec.alpha_requires_grad:
            nothing[_ALPHA] = next(rest)
        if ctx.spec.mask_requires_grad:
            nothing[_MASK] = next(rest)
        return tuple(nothing)


# ``Function.apply`` less its care for functorch, which looks at each argument: where nobody listens, functorch is not there.
_apply = super(torch.autograd.Function, _Attention).apply


def _forward_autograd(*arguments: Any) -> list[torch.Tensor]:
    if not decode(arguments[-1]).spec.needs_grad:
        with torch._C._AutoDispatchBelowAutograd():
            result: list[torch.Tensor] = torch.ops.adasplash.attention_forward(*arguments)
        return result
    return list(_Attention.apply(*arguments))  # type: ignore[no-untyped-call]


def _backward_autograd(*arguments: Any) -> list[torch.Tensor]:
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise DoubleBackwardError("attention")
    with torch._C._AutoDispatchBelowAutograd():
        result: list[torch.Tensor] = torch.ops.adasplash.attention_backward(*arguments)
    return result


def attention_forward(needs_grad: bool, *arguments: Any) -> list[torch.Tensor]:
    """The op's result. Where nobody listens to the dispatcher, straight from the kernel: that saves a third of a call's host time."""
    if _is_watched(arguments[0]):
        result: list[torch.Tensor] = torch.ops.adasplash.attention_forward(*arguments)
        return result
    return list(_apply(*arguments)) if needs_grad else _forward(*arguments)  # type: ignore[no-untyped-call]


def _is_watched(query: torch.Tensor) -> bool:
    """Whether tracing, a dispatch mode, a tensor subclass, functorch or the profiler must see an op."""
    return (
        torch.compiler.is_compiling()
        or type(query) not in _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


# -- the entmax transform -------------------------------------------------------------------------------------------------------


def _entmax_forward(x: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str) -> torch.Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    return _in_layout_of(plugins.registry().backend(backend).transform_forward(x, alpha, alpha_class), x)


def _entmax_fake(x: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str) -> torch.Tensor:
    return torch.empty_like(x)


def _entmax_backward(
    p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str, alpha_grad: bool
) -> list[torch.Tensor]:
    dx, by_row = plugins.registry().backend(backend).transform_backward(p, grad, alpha, alpha_class, alpha_grad)
    dx = _in_layout_of(dx, p)
    return [dx] if by_row is None else [dx, by_row.to(_wide(p)).contiguous()]


def _entmax_backward_fake(
    p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str, alpha_grad: bool
) -> list[torch.Tensor]:
    dx = torch.empty_like(p)
    return [dx, p.new_empty((*p.shape[:-1], 1), dtype=_wide(p))] if alpha_grad else [dx]


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in_layout_of(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``y``, or a copy of it, with the strides that ``torch.empty_like`` foretells."""
    if x.is_contiguous():
        return y.contiguous()
    like = torch.empty_like(x, device="meta")
    return y if y.stride() == like.stride() else torch.empty_like(x).copy_(y)


class _Entmax(torch.autograd.Function):
    """Backward from the output p alone; where second derivatives may be asked for, in differentiable torch operations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str) -> torch.Tensor:
        if _is_watched(x):
            with torch._C._AutoDispatchBelowAutograd():
                p: torch.Tensor = torch.ops.adasplash.entmax_forward(x, alpha, backend, alpha_class)
        else:
            p = _entmax_forward(x, alpha, backend, alpha_class)
        ctx.save_for_backward(p, alpha)
        ctx.names = backend, alpha_class
        return p

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        p, alpha = ctx.saved_tensors
        wants_x, wants_alpha = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            grad_x, by_row = gradients(p, grad, alpha, wants_alpha)
        else:
            run: Any = torch.ops.adasplash.entmax_backward if _is_watched(grad) else _entmax_backward
            grad_x, *rest = run(p, grad, alpha, *ctx.names, wants_alpha)
            by_row = rest[0] if rest else None
        grad_alpha = None
        if by_row is not None:
            grad_alpha = (by_row.sum_to_size(alpha.shape) if alpha.ndim else by_row.sum()).to(alpha.dtype)
        return grad_x if wants_x else None, grad_alpha, None, None


def _entmax_autograd(x: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str) -> torch.Tensor:
    result: torch.Tensor = _Entmax.apply(x, alpha, backend, alpha_class)  # type: ignore[no-untyped-call]
    return result


def entmax_forward(x: torch.Tensor, alpha: torch.Tensor, backend: str, alpha_class: str) -> torch.Tensor:
    """The op's result; straight from the kernel where nobody listens to the dispatcher."""
    if _is_watched(x):
        result: torch.Tensor = torch.ops.adasplash.entmax_forward(x, alpha, backend, alpha_class)
        return result
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
        return _entmax_autograd(x, alpha, backend, alpha_class)
    return _entmax_forward(x, alpha, backend, alpha_class)


for _name, _kernel, _fake, _autograd in (
    ("attention_forward", _forward, _forward_fake, _forward_autograd),
    ("attention_backward", _backward, _backward_fake, _backward_autograd),
    ("entmax_forward", _entmax_forward, _entmax_fake, _entmax_autograd),
    ("entmax_backward", _entmax_backward, _entmax_backward_fake, None),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    if _autograd is not None:
        _library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"adasplash::{_name}", _fake, lib=_library)
