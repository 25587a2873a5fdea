"""What alpha-entmax would do with captured attention: how much of it is zero, in which shapes, and how soon a kernel can know.

Everything is counted from the exact threshold tau of each row (:func:`adasplash_core.attention` with ``return_stats=True``) and
scores recomputed in chunks of rows, in float32, so memory stays bounded whatever the length. Quantities are in z units,
z = (alpha - 1) * (scale * q.k + mask), where a key has weight exactly when z > tau, and m - 1 <= tau < m for the row's maximum
m: the free bound m - 1 rules out a key before tau is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from adasplash_core.backend import AttentionCall, KernelConfig
from adasplash_core.errors import ArgumentError
from adasplash_core.masking import row_intervals
from adasplash_core.spec import AttentionSpec

if TYPE_CHECKING:
    import torch

    from adasplash_core.workload import WorkloadLayer

BLOCK = 64
"""Rows of a query block, and keys of a key block."""

GATHER_SLOWDOWN = 3.0
"""A product over gathered keys costs about this many times as much a key as a dense one (measured on an H100)."""

_CHUNK_ELEMENTS = 1 << 20  # scores held at once: few enough to stay in a CPU's cache
_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class HeadProfile:
    """One head under one alpha. Densities are fractions of what the mask allows; padding rows are left out."""

    layer: int
    head: int
    alpha: float
    rows: int  # query rows that see a key, over the batch
    keys_per_row: float  # allowed keys, mean
    support_per_row: float  # keys with weight, mean
    support_density: float  # support / allowed keys
    block_density: float  # 64 x 64 blocks with any weight
    column_density: float  # (64-row block, key) columns with any weight
    bound_density: float  # the same columns, by z > m - 1: what a kernel can rule out for free
    gap: float  # m - tau, mean; 1 is the bound m - 1 itself
    gap_quantiles: dict[str, float]  # of m - tau over rows
    residual: float  # largest |sum of p - 1|: how exact tau is


@dataclass(frozen=True, slots=True)
class Summary:
    """All heads under one alpha: every density over all layers and heads."""

    alpha: float
    heads: int
    support_per_row: float
    support_density: float
    block_density: float
    column_density: float
    bound_density: float
    gap: float
    advice: str


@dataclass(frozen=True, slots=True)
class WorkloadProfile:
    """What :func:`profile_layers` returns."""

    heads: list[HeadProfile] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_layers(
    layers: Iterable[WorkloadLayer],
    alphas: Sequence[float] = (1.5, 2.0),
    *,
    backend: str = "auto",
    progress: Callable[[WorkloadLayer], None] | None = None,
) -> WorkloadProfile:
    """Profile layers one after another; ``progress`` is called after each.

    Raises
    ------
    ArgumentError: if there is no alpha, or one is outside (1, 2] (softmax gives every key a weight).
    """
    if not alphas:
        raise ArgumentError("There must be an alpha.", seen="none")
    for alpha in alphas:
        if not 1 < alpha <= 2:
            raise ArgumentError(
                "A profile needs 1 < alpha <= 2.", seen=f"alpha={alpha}", hint="softmax (alpha=1) has no zeros to count."
            )
    heads: list[HeadProfile] = []
    totals = {alpha: _Counts() for alpha in alphas}
    for layer in layers:
        for (head, alpha), counts in _count_layer(layer, alphas, backend).items():
            heads.append(counts.profile(layer.index, layer.head_name(head), alpha))
            totals[alpha].add(counts)
        if progress is not None:
            progress(layer)
    number = len(heads) // len(totals)
    return WorkloadProfile(heads, [counts.summary(alpha, number) for alpha, counts in totals.items()])


@dataclass
class _Counts:
    """Whole numbers, so that adding heads up weighs them rightly."""

    rows: int = 0
    keys: int = 0
    support: int = 0
    blocks: int = 0
    active_blocks: int = 0
    columns: int = 0
    active_columns: int = 0
    bound_columns: int = 0
    gap_sum: float = 0.0
    residual: float = 0.0
    gaps: list[torch.Tensor] = field(default_factory=list)  # a head's alone

    def add(self, other: _Counts) -> None:
        for name in (
            "rows",
            "keys",
            "support",
            "blocks",
            "active_blocks",
            "columns",
            "active_columns",
            "bound_columns",
            "gap_sum",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.residual = max(self.residual, other.residual)

    def profile(self, layer: int, head: int, alpha: float) -> HeadProfile:
        import torch

        quantiles = {}
        if self.gaps:
            values = torch.cat(self.gaps).sort().values
            quantiles = {f"{q:g}": float(values[min(int(q * len(values)), len(values) - 1)]) for q in _QUANTILES}
        return HeadProfile(
            layer=layer,
            head=head,
            alpha=alpha,
            rows=self.rows,
            keys_per_row=_ratio(self.keys, self.rows),
            gap_quantiles=quantiles,
            residual=self.residual,
            **self._densities(),
        )

    def summary(self, alpha: float, heads: int) -> Summary:
        densities = self._densities()
        return Summary(alpha=alpha, heads=heads, advice=advice(alpha, densities["bound_density"]), **densities)

    def _densities(self) -> dict[str, float]:
        return {
            "support_per_row": _ratio(self.support, self.rows),
            "support_density": _ratio(self.support, self.keys),
            "block_density": _ratio(self.active_blocks, self.blocks),
            "column_density": _ratio(self.active_columns, self.columns),
            "bound_density": _ratio(self.bound_columns, self.columns),
            "gap": _ratio(self.gap_sum, self.rows),
        }


def advice(alpha: float, bound_density: float) -> str:
    """Whether gathering the columns above m - 1 beats dense products, in a sentence."""
    cost = bound_density * GATHER_SLOWDOWN
    if cost < 0.5:
        verdict = "gathered sparsity pays"
    elif cost < 1.0:
        verdict = "gathered sparsity pays a little, and not in every head"
    else:
        verdict = "gathered sparsity does not pay: dense products are cheaper"
    return (
        f"alpha={alpha:g}: {verdict}. After one dense pass, {bound_density:.1%} of the columns can hold weight; "
        f"gathered at {GATHER_SLOWDOWN:g}x the dense cost a key, each further product costs {cost:.0%} of a dense one."
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _count_layer(layer: WorkloadLayer, alphas: Sequence[float], backend: str) -> dict[tuple[int, float], _Counts]:
    """Counts by (head position, alpha), heads in the outer order."""
    import torch

    import adasplash_core

    batch, heads, q_len, _ = layer.query.shape
    kv_heads, kv_len = layer.key.shape[1:3]
    counts = {(head, alpha): _Counts() for head in range(heads) for alpha in alphas}
    with torch.no_grad():
        taus = {}
        for alpha in alphas:
            _, stats = adasplash_core.attention(**layer.kwargs(), alpha=alpha, return_stats=True, backend=backend)
            taus[alpha] = stats.tau
        lo, hi = _visible(layer)
        rows = max(1, _CHUNK_ELEMENTS // max(kv_len, 1) // BLOCK) * BLOCK
        for b in range(batch):
            for start in range(0, q_len, rows):
                chunk = slice(start, min(start + rows, q_len))
                if not (hi[b, chunk] > lo[b, chunk]).any():
                    continue
                mask = _ChunkMask(layer, lo[b, chunk], hi[b, chunk], b, chunk)
                for head in range(heads):
                    query = layer.query[b, head, chunk].float()
                    key = layer.key[b, head // (heads // kv_heads), mask.keys].float()
                    scores = (query @ key.T).mul_(layer.scale)
                    allowed = mask.apply(scores, head)
                    for alpha in alphas:
                        _count(counts[head, alpha], scores, allowed, taus[alpha][b, head, chunk], alpha)
    return counts


def _visible(layer: WorkloadLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible keys lo <= j < hi of each row, (B, Lq), with rows of padding emptied."""
    import torch

    batch, heads, q_len, head_dim = layer.query.shape
    _, kv_heads, kv_len, head_dim_v = layer.value.shape
    spec = AttentionSpec(
        device_type=layer.query.device.type,
        dtype=str(layer.query.dtype).removeprefix("torch."),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=layer.is_causal,
    )
    call = AttentionCall(
        spec=spec,
        config=KernelConfig(),
        query=layer.query,
        key=layer.key,
        value=layer.value,
        alpha=torch.ones(()),
        scale=layer.scale,
        window=layer.window or (-1, -1),
        kv_lengths=layer.kv_lengths,
        kv_starts=layer.kv_starts,
    )
    intervals = row_intervals(call)
    lo, hi = intervals.lo.expand(batch, -1), intervals.hi.expand(batch, -1)
    if q_len == kv_len:  # self-attention: a query outside the keys' bounds is padding as they are
        row = torch.arange(q_len, device=lo.device)
        padding = torch.zeros_like(lo, dtype=torch.bool)
        if layer.kv_starts is not None:
            padding |= row < layer.kv_starts[:, None]
        if layer.kv_lengths is not None:
            padding |= row >= layer.kv_lengths[:, None]
        hi = torch.where(padding, lo, hi)
    return lo, hi


class _ChunkMask:
    """The mask over a chunk of one sequence's rows, some of which see keys, and ``keys``, from the first block they see."""

    def __init__(self, layer: WorkloadLayer, lo: torch.Tensor, hi: torch.Tensor, b: int, chunk: slice) -> None:
        import torch

        seen = hi > lo
        self.keys = slice(int(lo[seen].min()) // BLOCK * BLOCK, int(hi[seen].max()))
        key = torch.arange(self.keys.start, self.keys.stop, device=lo.device)
        self._inside = (key >= lo[:, None]) & (key < hi[:, None])
        self._shared = _Allowed(self._inside)
        self._extra: torch.Tensor | None = None  # (1 or H, rows or 1, keys or 1)
        if (mask := layer.attn_mask) is not None:
            mask = mask[b if mask.shape[0] > 1 else 0]
            mask = mask[:, chunk] if mask.shape[1] > 1 else mask
            self._extra = mask[..., self.keys] if mask.shape[2] > 1 else mask

    def apply(self, scores: torch.Tensor, head: int) -> _Allowed:
        """Mask the scores (rows, keys) in place with -inf; what is allowed."""
        allowed = self._shared
        if self._extra is not None:
            extra = self._extra[head if self._extra.shape[0] > 1 else 0]
            if extra.is_floating_point():
                scores += extra
                extra = extra > float("-inf")
            allowed = _Allowed(self._inside & extra)
        scores.masked_fill_(allowed.forbidden, float("-inf"))
        return allowed


class _Allowed:
    """Which (row, key) of a chunk may have weight, with its counts."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.forbidden = ~mask
        self.rows = mask.any(-1)
        self.entries = int(mask.count_nonzero())
        columns = _column_max(mask.float())
        self.columns = int((columns > 0).sum())
        self.blocks = _active_blocks(columns)


def _count(counts: _Counts, scores: torch.Tensor, allowed: _Allowed, tau: torch.Tensor, alpha: float) -> None:
    """Add one chunk of one head: ``scores`` (rows, keys) float32 with -inf where masked, ``tau`` (rows,)."""
    import torch

    if not allowed.entries:
        return
    z = scores * (alpha - 1)
    top = z.amax(-1).nan_to_num(neginf=0.0)  # a row without keys stays -inf minus something finite
    above = z - tau.float()[:, None]
    columns = _column_max(above)
    bound = _column_max(z.sub_((top - 1)[:, None]))
    weight = above.clamp_(min=0)
    counts.support += int(weight.count_nonzero())
    if alpha == 1.5:
        total = torch.linalg.vector_norm(weight, dim=-1).square()
    else:
        total = (weight if alpha == 2 else weight.pow(1 / (alpha - 1))).sum(-1)
    gap = (top - tau)[allowed.rows]
    counts.rows += len(gap)
    counts.keys += allowed.entries
    counts.columns += allowed.columns
    counts.blocks += allowed.blocks
    counts.active_columns += int((columns > 0).sum())
    counts.active_blocks += _active_blocks(columns)
    counts.bound_columns += int((bound > 0).sum())
    counts.gaps.append(gap.cpu())
    counts.gap_sum += float(gap.double().sum())
    counts.residual = max(counts.residual, float((total[allowed.rows] - 1).abs().max()))


def _column_max(x: torch.Tensor) -> torch.Tensor:
    """(rows, keys) -> (row blocks, keys): each key's maximum over a block of rows, the last block filled up with -inf."""
    return _pad(x, (0, 0, 0, -x.shape[0] % BLOCK)).view(-1, BLOCK, x.shape[1]).amax(1)


def _active_blocks(columns: torch.Tensor) -> int:
    """How many BLOCK x BLOCK blocks have a positive entry, from (row blocks, keys) column maxima."""
    blocks = _pad(columns, (0, -columns.shape[1] % BLOCK)).view(columns.shape[0], -1, BLOCK)
    return int((blocks.amax(-1) > 0).sum())


def _pad(x: torch.Tensor, amounts: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.nn.functional.pad(x, amounts, value=float("-inf")) if any(amounts) else x
