"""EntmaxMultiheadAttention: ``torch.nn.MultiheadAttention`` whose weights are entmax instead of softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from adasplash_core.api import attention, entmax
from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.nn.alpha import Alpha


class EntmaxMultiheadAttention(nn.MultiheadAttention):
    """Drop-in for :class:`torch.nn.MultiheadAttention`: its constructor, its parameters and state dict, its ``forward``.

    ``need_weights=True``, the default as in torch, computes the weights densely: exact and differentiable, with the memory of
    (B, H, L, S) scores and none of the speed. Pass ``need_weights=False`` to train or serve (torch's encoder and decoder layers do).

    Where it differs from torch's:

    - A query whose keys are all masked gives zeros (before the output's bias), where torch's gives NaN.
    - ``is_causal=True`` needs no ``attn_mask``; where both are given the mask is not looked at.
    - A floating point ``key_padding_mask`` must consist of 0 and -inf; other biases belong in ``attn_mask``.
    - Nested tensors are refused, and torch's fast path for inference, which computes softmax, is never taken.

    Parameters
    ----------
    alpha: number in [1, 2], or one a head. Not in the state dict.
    learnable_alpha: alpha = 1 + sigmoid(theta), starting at ``alpha``; the state dict then also has ``alpha.theta``, (num_heads,).
    backend: as in :func:`adasplash_core.attention`.
    The others: as in :class:`torch.nn.MultiheadAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Sequence[float] = 1.5,
        learnable_alpha: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device=device, dtype=dtype
        )
        # Encoder layers ask this before they call their fused softmax kernel instead of self_attn: a module with separate
        # projections has none.
        self._qkv_same_embed_dim = False
        self.alpha = Alpha(alpha, heads=num_heads, learnable=learnable_alpha, persistent=False, device=device)
        self.backend = backend

    @classmethod
    def from_softmax(
        cls,
        module: nn.MultiheadAttention,
        *,
        alpha: float | Sequence[float] = 1.5,
        learnable_alpha: bool = False,
        backend: str = "auto",
    ) -> Self:
        """The same layer with entmax. It shares the parameters, so that an optimizer that has them goes on with them.

        Raises
        ------
        ArgumentTypeError: if it is no ``nn.MultiheadAttention``, or a subclass with a ``forward`` of its own.
        ArgumentError: if hooks or parametrizations hang on it.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise ArgumentTypeError("Only an nn.MultiheadAttention can be converted.", seen=type(module).__name__)
        if type(module).forward not in (nn.MultiheadAttention.forward, EntmaxMultiheadAttention.forward):
            raise ArgumentTypeError(
                "A layer that computes something of its own cannot be converted.", seen=type(module).__name__
            )
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
            raise ArgumentError(
                "A layer with hooks or parametrizations of its own cannot be converted.",
                seen=type(module).__name__,
                hint="remove them first, and add them to the new layer",
            )
        new = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
            alpha=alpha,
            learnable_alpha=learnable_alpha,
            backend=backend,
        )
        for name, parameter in module._parameters.items():
            new._parameters[name] = parameter
        new.out_proj = module.out_proj
        weight = module.out_proj.weight
        new.alpha = Alpha(alpha, heads=module.num_heads, learnable=learnable_alpha, persistent=False, device=weight.device)
        return new.train(module.training)

    def _reset_parameters(self) -> None:
        same = self.in_proj_weight is not None
        self._qkv_same_embed_dim = same
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`; masks are True where attention is *not* allowed, or added to scores.

        Raises
        ------
        ArgumentError, ArgumentTypeError: for shapes and masks that do not fit; see the class for what else is refused.
        """
        self._check(query, key, value)
        batched = query.ndim == 3
        length_first = batched and not self.batch_first
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif length_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        k, v, extra = self._extend(k, v)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        masks = self._masks(q, k, extra, key_padding_mask, None if is_causal else attn_mask, is_causal)
        weights = None
        if need_weights:
            out, weights = self._dense(q, k, v, masks)
            weights = weights.roll(-extra, -1) if extra else weights  # torch appends the keys that are put in front here
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            fused = attention(
                q, k, v, **masks, dropout_p=self.dropout if self.training else 0.0, alpha=self.alpha(), backend=self.backend
            )
            assert isinstance(fused, torch.Tensor)
            out = fused
        out = out.transpose(1, 2).flatten(2)
        out = out[0] if not batched else out.transpose(0, 1) if length_first else out
        return self.out_proj(out), weights

    # -- inputs ---------------------------------------------------------------------------------------------------------------

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ArgumentTypeError(
                "EntmaxMultiheadAttention takes padded tensors with a key_padding_mask.",
                seen="a nested tensor",
                hint="build nn.TransformerEncoder with enable_nested_tensor=False, or use replace_multihead_attention",
            )
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise ArgumentError("query, key and value must all have 2 dimensions (unbatched) or all have 3.", seen=shapes)
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            raise ArgumentError(
                f"query, key and value must have {self.embed_dim}, {self.kdim} and {self.vdim} features.", seen=shapes
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentError("key and value must have the same length and batch size.", seen=shapes)
        batch_dim = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            order = "(batch, length, features)" if self.batch_first else "(length, batch, features): batch_first=False"
            raise ArgumentError(f"query and key must have the same batch size, as {order}.", seen=shapes)

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        if self.in_proj_weight is not None:
            weights: Sequence[torch.Tensor] = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Sequence[Any] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """With the keys of ``add_bias_kv`` and ``add_zero_attn`` in front, where no causal mask hides them, and their number."""
        keys, values, batch = [k], [v], k.shape[0]
        if self.add_zero_attn:
            keys.insert(0, k.new_zeros(batch, 1, self.embed_dim))
            values.insert(0, v.new_zeros(batch, 1, self.embed_dim))
        if self.bias_k is not None and self.bias_v is not None:
            keys.insert(0, self.bias_k.to(k.dtype).expand(batch, 1, -1))
            values.insert(0, self.bias_v.to(v.dtype).expand(batch, 1, -1))
        extra = len(keys) - 1
        return (torch.cat(keys, 1), torch.cat(values, 1), extra) if extra else (k, v, 0)

    # -- masks ----------------------------------------------------------------------------------------------------------------

    def _masks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        extra: int,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> dict[str, Any]:
        """torch's masks as arguments of :func:`adasplash_core.attention`."""
        batch, heads, q_len, _ = q.shape
        kv_len = k.shape[2] - extra
        bias: torch.Tensor | None = None
        allowed: torch.Tensor | None = None
        if attn_mask is not None:
            attn_mask = _checked_mask("attn_mask", attn_mask, ((q_len, kv_len), (batch * heads, q_len, kv_len)))
            mask = attn_mask[None, None] if attn_mask.ndim == 2 else attn_mask.unflatten(0, (batch, heads))
            if mask.dtype == torch.bool:
                allowed = ~mask
            else:
                bias = mask
        if key_padding_mask is not None:
            padding = _checked_mask("key_padding_mask", key_padding_mask, ((batch, kv_len),))[:, None, None]
            if padding.dtype != torch.bool and padding.requires_grad:
                bias = padding if bias is None else bias + padding
            else:
                keys = ~_hidden(padding)
                allowed = keys if allowed is None else allowed & keys
        if bias is not None and allowed is not None:
            bias = torch.where(allowed, bias, -torch.inf)
        merged = bias if bias is not None else allowed
        if merged is not None and extra:
            merged = F.pad(merged, (extra, 0), value=True if merged.dtype == torch.bool else 0.0)
        if not is_causal:
            return {"attn_mask": merged}
        causal: dict[str, Any] = {"query_offset": extra} if extra else {}
        # is_causal and a mask exclude each other in attention(), as in SDPA; a window that is closed to the right is the same.
        return causal | ({"is_causal": True} if merged is None else {"attn_mask": merged, "window": (-1, 0)})

    # -- weights --------------------------------------------------------------------------------------------------------------

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        mask = masks.get("attn_mask")
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if masks.get("is_causal") or "window" in masks:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + masks.get("query_offset", 0))
            scores = scores.masked_fill(future, -torch.inf)
        alpha = self.alpha()
        if isinstance(alpha, torch.Tensor) and alpha.ndim:
            alpha = alpha[None, :, None, None]
        weights = F.dropout(entmax(scores, alpha), self.dropout, self.training)
        return weights.to(v.dtype) @ v, weights


def _checked_mask(name: str, mask: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ArgumentTypeError(f"{name} must be boolean (True: not allowed) or floating point (added).", seen=str(mask.dtype))
    if tuple(mask.shape) not in shapes:
        raise ArgumentError(f"{name} must have shape {' or '.join(map(str, shapes))}.", seen=f"shape {tuple(mask.shape)}")
    return mask


def _hidden(padding: torch.Tensor) -> torch.Tensor:
    """A key padding mask as boolean. Encoder layers turn a boolean one into 0 and -inf, and it must not become a dense bias."""
    if padding.dtype == torch.bool:
        return padding
    hidden = padding == -torch.inf
    torch._assert_async(
        (hidden | (padding == 0)).all(),
        "A floating point key_padding_mask must consist of 0 and -inf. Hint: add other biases through attn_mask.",
    )
    return hidden


def replace_multihead_attention(
    model: nn.Module,
    *,
    alpha: float = 1.5,
    learnable_alpha: bool = False,
    backend: str = "auto",
    where: Callable[[str, nn.MultiheadAttention], bool] = lambda name, module: True,
) -> list[str]:
    """Replace every :class:`torch.nn.MultiheadAttention` inside a model by entmax, in place, sharing the parameters.

    Also tells ``nn.TransformerEncoder`` modules not to use nested tensors.

    Parameters
    ----------
    model: any module with such layers inside; ``nn.TransformerEncoder``, for example.
    where: which of them, by name and module. Default: all that are not entmax yet.

    Returns
    -------
    The names of the replaced layers.

    Raises
    ------
    ArgumentError: if there is none; and what ``from_softmax`` raises, before anything is replaced.
    """
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.MultiheadAttention) and not isinstance(module, EntmaxMultiheadAttention)
    ]
    found = [(name, module) for name, module in found if where(name, module)]
    if not found:
        raise ArgumentError(
            "The model must have an nn.MultiheadAttention inside.",
            seen=type(model).__name__,
            hint="a single layer is converted by EntmaxMultiheadAttention.from_softmax",
        )
    options: dict[str, Any] = {"alpha": alpha, "learnable_alpha": learnable_alpha, "backend": backend}
    new = {module: EntmaxMultiheadAttention.from_softmax(module, **options) for module in dict.fromkeys(m for _, m in found)}
    for name, module in found:  # a layer that is used in several places stays one
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new[module])
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False
    return [name for name, _ in found]
