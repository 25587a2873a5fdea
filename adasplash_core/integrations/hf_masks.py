"""What transformers calls an attention mask, kept as structure: a window, an offset, the keys that exist, packed sequences.

transformers composes index functions (causal, sliding, packed, ...) and asks the registered mask function once a forward to make
a mask of them. A dense (B, 1, Lq, Lk) one would cost more memory than the attention, so the common compositions become a
:class:`StructuredMask`; any other becomes the dense mask that transformers' own SDPA gets. Nothing on a device is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function, sdpa_mask

from adasplash_core.errors import ArgumentError

_AND = and_masks(causal_mask_function).__code__  # every composed function of and_masks shares it
_OPEN = -1


class StructuredMask:
    """Which keys each query row sees. transformers hands it from the model to its attention modules like any mask.

    Row i of the queries stands at key d = i + query_offset and sees the keys d - left <= j <= d + right that exist.

    Parameters
    ----------
    left, right: keys kept on each side of the diagonal; -1 is open. Causal masks have right = 0.
    query_offset: key position of query 0; an integer, or an integer tensor () for static caches.
    keys: boolean (B, Lk), which keys exist (padding is False), or None for all.
    cu_seqlens: int32 (S + 1,): sequences packed into the flattened batch of B * Lq tokens, or None.
    """

    ndim = 4  # transformers passes masks with four dimensions on as they are

    def __init__(
        self,
        left: int,
        right: int,
        query_offset: int | torch.Tensor = 0,
        keys: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        self.left, self.right = left, right
        self.query_offset = query_offset
        self.keys = keys
        self.cu_seqlens = cu_seqlens

    def dim(self) -> int:
        return self.ndim

    def to(self, device: Any, non_blocking: bool = False) -> StructuredMask:
        """For models whose layers live on several devices: accelerate moves every argument that has this method."""

        def move(x: Any) -> Any:
            return x.to(device, non_blocking=non_blocking) if isinstance(x, torch.Tensor) else x

        return StructuredMask(self.left, self.right, move(self.query_offset), move(self.keys), move(self.cu_seqlens))

    def contiguous(self) -> StructuredMask:
        """``generate`` asks it of every mask it makes for a static cache."""
        return self

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse("indexes its mask")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(f"calls {getattr(function, '__name__', function)} with its mask")


def _refuse(seen: str) -> NoReturn:
    """A model that computes with masks has an attention of its own, which would be softmax."""
    raise ArgumentError(
        "Only models that leave their masks and their attention to transformers' interfaces can use the entmax attention.",
        seen=f"a model that {seen}",
        hint='use attn_implementation="eager" or "sdpa" for it',
    )


def entmax_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> torch.Tensor | StructuredMask:
    """The mask function of the attention "entmax", with the arguments of transformers' ``sdpa_mask``.

    Returns
    -------
    A :class:`StructuredMask` for padded, causal, sliding and packed attention; boolean (B, 1, Lq, Lk) for anything else. Never None:
    a model whose attention does not come from transformers' interface must fail rather than go on with softmax.
    """
    if isinstance(attention_mask, StructuredMask):  # made in advance by generate(), for a static cache
        return attention_mask
    bidirectional = allow_is_bidirectional_skip is not None
    could_be_packed = (
        attention_mask is None
        and not bidirectional
        and not allow_is_causal_skip
        and q_length == kv_length
        and isinstance(q_offset, int)
        and q_offset == 0
    )
    window = _window(mask_function, local_size, use_vmap, bidirectional, could_be_packed, config)
    if window is None:
        everything: torch.Tensor = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return everything
    keys = _existing_keys(attention_mask, kv_length, kv_offset)
    cu_seqlens = None
    if could_be_packed and mask_function is not causal_mask_function:
        cu_seqlens = _packed_sequences(mask_function, batch_size, q_length, device)
    # A static cache moves its length, () or (1,), in place before the first layer attends: the difference is a copy of it.
    offset = q_offset - kv_offset
    if isinstance(offset, torch.Tensor):
        offset = offset.reshape(())
    return StructuredMask(*window, query_offset=offset, keys=keys, cu_seqlens=cu_seqlens)


def _window(
    mask_function: Callable[..., Any],
    local_size: int | None,
    use_vmap: bool,
    bidirectional: bool,
    could_be_packed: bool,
    config: Any,
) -> tuple[int, int] | None:
    """(left, right) of compositions that are known to be windows; None for others.

    Only what tracing can see too is asked: which function it is, whether it came from ``and_masks`` (a union of masks has other
    code), and what transformers says of it beside: ``use_vmap`` (the user's own masks) and ``local_size``.
    """
    if mask_function is causal_mask_function:
        return _OPEN, 0
    if mask_function is bidirectional_mask_function:
        return _OPEN, _OPEN
    if use_vmap or getattr(mask_function, "__code__", None) is not _AND:
        return None
    if bidirectional:
        return None if local_size is None else (local_size, local_size)
    if local_size is None:
        return (_OPEN, 0) if could_be_packed else None
    if local_size == getattr(config, "attention_chunk_size", None):
        return None
    return local_size - 1, 0


def _existing_keys(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """(B, Lk) of the 2-d mask that the user gave; keys of a static cache that are not filled yet do not exist."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ArgumentError(
            "attention_mask must be (batch, keys), or (batch, 1 or heads, queries, keys).",
            seen=f"shape {tuple(attention_mask.shape)}",
            hint="unsqueeze(1) makes four dimensions of (batch, queries, keys)",
        )
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    # Contiguous: compiled decoding would compile again where a stride changes.
    return attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool).contiguous()


def _packed_sequences(
    mask_function: Callable[..., Any], batch_size: int, length: int, device: torch.device | str
) -> torch.Tensor:
    """cu_seqlens of the flattened batch: a sequence starts where a token does not see the one before it.

    How many there are is known on the device alone, so there is room for one a token; those beyond the last are empty.
    """
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    token = torch.arange(length, device=device)[None]
    before, is_first = (token - 1).clamp(min=0), token == 0
    ahead = mask_function(batch, head, before, token) & ~is_first
    torch._assert_async(  # a device-side check: nothing waits for it
        ~ahead.any(), "The entmax attention does not know this combination of packed sequences and bidirectional blocks."
    )
    joined = mask_function(batch, head, token, before) & ~is_first
    return boundaries(~joined.expand(batch_size, length))


def boundaries(starts: torch.Tensor) -> torch.Tensor:
    """int32 (B * L + 1,) cu_seqlens from boolean (B, L), True where a sequence starts."""
    sequence = starts.flatten().cumsum(0) - 1
    edges = torch.arange(sequence.shape[0] + 1, device=starts.device)
    return torch.searchsorted(sequence, edges).to(torch.int32)
