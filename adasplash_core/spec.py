"""AttentionSpec: what one call asks for, without tensors, so that it can be hashed, compared, printed and tuned for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")

AlphaClass = Literal["1", "1.5", "2", "other", "any"]
"""What is known of alpha on the host: one of three special numbers, another number, or (a tensor, or while compiling) nothing."""

MaskKind = Literal["none", "key", "bool", "additive"]
"""``key`` is a boolean mask over keys alone, (B, Lk), holes allowed; the others are broadcastable to (B, H, Lq, Lk)."""

Alignment = Literal["top_left", "bottom_right"]

FEATURES: dict[str, str] = {
    "causal": "causal masks",
    "bottom_right": "bottom-right causal alignment",
    "query_offset": "query offsets",
    "window": "sliding windows",
    "kv_lengths": "per-sequence key lengths",
    "kv_starts": "per-sequence key starts (left padding)",
    "packed": "packed sequences (cu_seqlens)",
    "alibi": "ALiBi slopes",
    "key_mask": "boolean key masks",
    "bool_mask": "dense boolean masks",
    "additive_mask": "additive masks",
    "mask_grad": "gradients to an additive mask",
    "dropout": "dropout",
    "gqa": "grouped-query attention",
    "softmax": "alpha = 1 (softmax)",
    "alpha_other": "alpha other than 1, 1.5 and 2",
    "alpha_tensor": "alpha as a device tensor",
    "alpha_per_head": "one alpha per head",
    "alpha_grad": "gradients to alpha",
    "backward": "gradients",
    "deterministic": "deterministic gradients",
    "stats": "return_stats",
    "unequal_head_dims": "value head dims other than the query's",
}
"""Everything a call can ask for beyond plain 1.5-entmax: the words in which backends declare what they support."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one call of :func:`adasplash_core.attention` asks for. Frozen and hashable; holds no tensors.

    ``batch``, ``q_len`` and ``kv_len`` are ``None`` where they are not known (choosing a backend under ``torch.compile``) and
    may be symbolic integers inside ``saved_spec``: compute with them, never branch on them there. For packed input ``q_len``
    and ``kv_len`` are the longest sequence's (``max_seqlen_q``/``max_seqlen_k``) and ``batch`` the number of sequences.
    """

    device_type: str  # "cuda", "cpu", ...
    dtype: str  # "float32": torch's name of the dtype of query, key and value
    heads: int
    kv_heads: int
    head_dim: int  # of query and key
    head_dim_v: int
    batch: int | None = None
    q_len: int | None = None
    kv_len: int | None = None
    causal: bool = False
    causal_alignment: Alignment = "top_left"
    query_offset: bool = False  # given explicitly, number or tensor
    window: bool = False
    kv_lengths: bool = False
    kv_starts: bool = False
    packed: bool = False
    alibi: bool = False
    mask: MaskKind = "none"
    mask_requires_grad: bool = False
    alpha_class: AlphaClass = "1.5"
    alpha_per_head: bool = False
    alpha_requires_grad: bool = False
    dropout: bool = False
    needs_grad: bool = False  # a backward may follow: keep what it needs
    deterministic: bool = False
    return_stats: bool = False
    tf32: bool = False  # float32 on NVIDIA's GPUs alone: PyTorch's setting lets products be rounded to TF32

    @property
    def arithmetic(self) -> str:
        """The dtype's name, or "tf32" where float32 products may be: what speed and error depend on."""
        return "tf32" if self.tf32 else self.dtype

    def features(self) -> Iterator[str]:
        """The keys of :data:`FEATURES` that this call needs."""
        needs = {
            "causal": self.causal,
            "bottom_right": self.causal_alignment == "bottom_right",
            "query_offset": self.query_offset,
            "window": self.window,
            "kv_lengths": self.kv_lengths,
            "kv_starts": self.kv_starts,
            "packed": self.packed,
            "alibi": self.alibi,
            "key_mask": self.mask == "key",
            "bool_mask": self.mask == "bool",
            "additive_mask": self.mask == "additive",
            "mask_grad": self.mask_requires_grad,
            "dropout": self.dropout,
            "gqa": self.heads != self.kv_heads,
            "softmax": self.alpha_class == "1",
            "alpha_other": self.alpha_class in ("other", "any"),
            "alpha_tensor": self.alpha_class == "any",
            "alpha_per_head": self.alpha_per_head,
            "alpha_grad": self.alpha_requires_grad,
            "backward": self.needs_grad,
            "deterministic": self.deterministic,
            "stats": self.return_stats,
            "unequal_head_dims": self.head_dim != self.head_dim_v,
        }
        return (name for name, needed in needs.items() if needed)

    def without_lengths(self) -> AttentionSpec:
        """The same call with sizes that vary from step to step unknown."""
        return replace(self, batch=None, q_len=None, kv_len=None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
