"""Tiles of scores: which (batch, head, query) rows are computed together, against which keys, with masks and biases applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.masking import row_intervals
from adasplash_torch.configs import TileConfig
from adasplash_torch.entries import Entries, find_entries
from adasplash_torch.solver import Rule, rule_for, ties_at_infinity

COMPUTE_DTYPES = {torch.float64: torch.float64}
"""Everything but float64 is computed in float32."""


def host_reads_are_free(device: torch.device) -> bool:
    """Whether values can decide what is computed: on an accelerator reading one makes the host wait for all that was queued."""
    return device.type == "cpu"


class Intervals:
    """Key intervals of rows, and on the host their extremes over each panel of rows, so that whole key ranges can be skipped.

    On an accelerator reading them would make the host wait: there every panel sees all keys and masks each entry.
    """

    def __init__(self, call: AttentionCall, panel: int) -> None:
        lo, hi, self.diagonal = row_intervals(call)
        self.kv_len, self.panel = call.key.shape[-2], panel
        empty = hi <= lo
        self.lo, self.hi = lo.masked_fill(empty, self.kv_len), hi.masked_fill(empty, 0)
        self.on_host = host_reads_are_free(call.query.device)
        if self.on_host:
            wanted = ((self.lo, False), (self.hi, True), (self.lo, True), (self.hi, False))
            self._extremes = [self._by_panel(bound, largest) for bound, largest in wanted]
        spec = call.spec
        structural = spec.causal or spec.window or spec.kv_lengths or spec.kv_starts or spec.packed
        self._bounds = (0, self.kv_len, self.kv_len, 0) if structural else (0, self.kv_len, 0, self.kv_len)

    def _by_panel(self, bound: torch.Tensor, largest: bool) -> list[list[int]]:
        batch, rows = bound.shape
        extra = -rows % self.panel
        padded = torch.cat([bound, bound[:, -1:].expand(batch, extra)], 1) if rows else bound
        blocks = padded.view(batch, -1, self.panel)
        found: list[list[int]] = (
            (blocks.amax(-1) if largest else blocks.amin(-1)).tolist() if rows else [[] for _ in range(batch)]
        )
        return found

    def at(self, batch: int, row: int) -> tuple[int, int, int, int]:
        """For the panel that starts at ``row``: first key of any row, end of the last, and [lo, hi) seen by all its rows."""
        if not self.on_host:
            return self._bounds
        first, end, lo_all, hi_all = (e[min(batch, len(e) - 1)][row // self.panel] for e in self._extremes)
        return first, end, lo_all, hi_all

    def visible_keys(self, batches: slice) -> torch.Tensor:
        """Keys that some row of each batch sees: bool (batches or 1, Lk)."""
        lo, hi = (x if x.shape[0] == 1 else x[batches] for x in (self.lo, self.hi))
        key = torch.arange(self.kv_len, device=lo.device)
        if lo.shape[1] == 0:
            return torch.zeros(lo.shape[0], self.kv_len, dtype=torch.bool, device=lo.device)
        return (key >= lo.amin(1, keepdim=True)) & (key < hi.amax(1, keepdim=True))


@dataclass(eq=False)
class Tile:
    """Scores of ``pairs`` (batch, head) pairs by ``rows`` queries, flattened to R rows, against keys ``first`` to ``first + width``.

    ``scores`` (R, columns): columns past ``width`` are -inf, as are masked entries. ``row_max`` (R, 1): 0 where a row has no key.
    ``poisoned`` (R,): rows with a NaN, whose scores are -inf here.
    """

    block: Block
    rule: Rule
    rows: slice
    first: int
    width: int
    scores: torch.Tensor
    group_max: torch.Tensor
    row_max: torch.Tensor
    poisoned: torch.Tensor | None

    @property
    def count(self) -> int:
        """Query rows of each pair."""
        count: int = self.rows.stop - self.rows.start
        return count

    def entries(self, reach: torch.Tensor, dense_above: float) -> Entries | None:
        return find_entries(self.scores, self.row_max, self.group_max, reach, dense_above)

    def flat_columns(self, entries: Entries) -> torch.Tensor:
        """Index of each entry's key in the block's flattened keys and values."""
        offsets = [self.block.kv(i) * self.block.kv_len + self.first for i in range(len(self.block.pairs))]
        return entries.column + (torch.tensor(offsets)[entries.row // self.count] if len(offsets) > 1 else offsets[0])

    def by_pair(self, tensor: torch.Tensor) -> torch.Tensor:
        """A flattened (R, ...) tensor as (pairs, rows, ...)."""
        return tensor.view(-1, self.count, *tensor.shape[1:])

    def dense_chunks(self) -> Iterator[slice]:
        """Slices of the flattened rows whose scores fit in a core's cache."""
        step = max(1, DENSE_CHUNK // max(self.scores.shape[1], 1)) if self.block.on_host else max(len(self.scores), 1)
        for start in range(0, len(self.scores), step):
            yield slice(start, min(start + step, len(self.scores)))

    def drops(self, chunk: slice) -> torch.Tensor:
        """Scores of a chunk turned into drops, in place."""
        scores = self.scores[chunk]
        return torch.sub(self.row_max[chunk], scores, out=scores)


DENSE_CHUNK = 1 << 19
"""Scores that a dense pass works on at a time: 2 MiB in float32."""


PARALLEL_FROM = 1 << 20
"""Scores of a call from which several threads are worth starting."""


class Block:
    """The rows of a range of batches and heads: keys and values in the compute dtype, contiguous, and its tiles.

    ``pairs``: the (batch, head) indices, in order. ``keys``, ``values`` (N, Lk, E): N batches times key heads.
    """

    def __init__(
        self,
        call: AttentionCall,
        config: TileConfig,
        intervals: Intervals,
        batches: slice,
        heads: slice,
        alpha: float | torch.Tensor,
    ) -> None:
        self.call, self.config, self.intervals, self.batches, self.heads = call, config, intervals, batches, heads
        self._alpha = alpha
        self.on_host = intervals.on_host
        self.kv_len = call.key.shape[2]
        self.dtype = COMPUTE_DTYPES.get(call.query.dtype, torch.float32)
        repeat = call.spec.heads // call.spec.kv_heads
        first, last = heads.start // repeat, (heads.stop - 1) // repeat + 1
        self.kv_heads = slice(first, last)
        self.pairs = [(b, h) for b in range(batches.start, batches.stop) for h in range(heads.start, heads.stop)]
        self._kv: list[int] = [(b - batches.start) * (last - first) + h // repeat - first for b, h in self.pairs]
        self.keys, self.values, self.must_be_sparse = self._load()
        self.flat_keys, self.flat_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)

    def _load(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Keys and values (N, Lk, E). What keys hold that no row sees must not matter, NaN included, so they become 0.

        If others are not finite, a weight of 0 must not meet them: such tiles are computed from their entries only.
        """
        loaded, must_be_sparse = [], False
        for tensor in (self.call.key, self.call.value):
            part = tensor[self.batches, self.kv_heads].to(self.dtype).contiguous()
            if not self.on_host or not bool(part.sum().isfinite()):
                seen = self.intervals.visible_keys(self.batches)
                if self.call.spec.mask == "key" and self.call.attn_mask is not None:
                    mask = self.call.attn_mask
                    seen = seen & (mask if mask.shape[0] == 1 else mask[self.batches])
                part = part.masked_fill(~seen[:, None, :, None], 0)
                must_be_sparse = must_be_sparse or (self.on_host and not bool(part.isfinite().all()))
            loaded.append(part.flatten(0, 1))
        return loaded[0], loaded[1], must_be_sparse

    def kv(self, pair: int) -> int:
        """Where a pair's keys are in ``keys``."""
        return self._kv[pair]

    def _rule(self, rows: slice) -> Rule:
        alpha = self._alpha
        if isinstance(alpha, torch.Tensor):
            if alpha.ndim:
                alpha = (
                    alpha[self.heads].repeat(self.batches.stop - self.batches.start).repeat_interleave(rows.stop - rows.start)
                )
            alpha = alpha.reshape(-1, 1)
        return rule_for(alpha, self.dtype, early_stop=self.on_host)

    def tiles(self, workspace: Workspace) -> Iterator[Tile]:
        q_len = self.call.query.shape[2]
        for start in range(0, q_len, self.config.rows):
            yield self._tile(slice(start, min(start + self.config.rows, q_len)), workspace)

    def rows_of(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """Rows of a (B, H, Lq, ...) tensor, flattened to (R, ...) in the compute dtype, contiguous."""
        return tensor[self.batches, self.heads, rows].to(self.dtype).flatten(0, 2).contiguous()

    def put(self, target: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
        """The inverse of :meth:`rows_of`, casting."""
        place = target[self.batches, self.heads, rows]
        place.copy_(values.view(place.shape))

    def _tile(self, rows: slice, workspace: Workspace) -> Tile:
        panels = range(rows.start, rows.stop, self.intervals.panel)
        spans = [self.intervals.at(b, p) for b in range(self.batches.start, self.batches.stop) for p in panels]
        first = min(s[0] for s in spans)
        width = max(max(s[1] for s in spans) - first, 0)
        first = first if width else 0
        groups = -(-width // self.config.group)
        count, columns = rows.stop - rows.start, groups * self.config.group
        scores = workspace.take(0, (len(self.pairs), count, columns))
        group_max = workspace.take(1, (len(self.pairs), count, groups))
        for i, (b, h) in enumerate(self.pairs):
            for p in panels:
                panel = slice(p - rows.start, min(p + self.intervals.panel, rows.stop) - rows.start)
                part = scores[i, panel]
                self._panel(part, i, b, h, slice(p, panel.stop + rows.start), first)
                if groups:
                    torch.amax(part.view(len(part), -1, groups), 1, out=group_max[i, panel])
        return self._finish(rows, first, width, scores.flatten(0, 1), group_max.flatten(0, 1))

    def _panel(self, part: torch.Tensor, pair: int, batch: int, head: int, rows: slice, first: int) -> None:
        """Scores of one panel: scale * q.k, then biases, then masks."""
        call, intervals = self.call, self.intervals
        lo, hi, lo_all, hi_all = intervals.at(batch, rows.start)
        hi = max(hi, lo)
        part[:, : max(lo - first, 0)] = -math.inf
        part[:, max(hi - first, 0) :] = -math.inf
        if hi == lo:
            return
        query = call.query[batch, head, rows].to(self.dtype)
        inner = part[:, lo - first : hi - first]
        torch.addmm(inner, query, self.keys[self.kv(pair), lo:hi].T, beta=0, alpha=call.scale, out=inner)
        bi = min(batch, intervals.lo.shape[0] - 1)
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes if call.alibi_slopes.ndim == 1 else call.alibi_slopes[batch]
            key = torch.arange(lo, hi, device=part.device, dtype=self.dtype)
            diagonal = intervals.diagonal[min(batch, intervals.diagonal.shape[0] - 1), rows]
            inner.addcmul_(key.sub(diagonal.to(self.dtype)[:, None]).abs_(), slopes[head].to(self.dtype), value=-1)
        if call.attn_mask is not None:
            self._apply_mask(inner, batch, head, rows, slice(lo, hi))
        # Keys in [lo_all, hi_all) are seen by every row of the panel; left and right of it each row has its own bounds.
        lo_all, hi_all = min(max(lo_all, lo), hi), min(max(hi_all, lo), hi)
        if lo_all < hi_all:
            if lo < lo_all:
                key = torch.arange(lo, lo_all, device=part.device)
                inner[:, : lo_all - lo].masked_fill_(key < intervals.lo[bi, rows, None], -math.inf)
            if hi_all < hi:
                key = torch.arange(hi_all, hi, device=part.device)
                inner[:, hi_all - lo :].masked_fill_(key >= intervals.hi[bi, rows, None], -math.inf)
        else:
            key = torch.arange(lo, hi, device=part.device)
            inner.masked_fill_((key < intervals.lo[bi, rows, None]) | (key >= intervals.hi[bi, rows, None]), -math.inf)

    def _apply_mask(self, inner: torch.Tensor, batch: int, head: int, rows: slice, keys: slice) -> None:
        mask = self.call.attn_mask
        assert mask is not None
        if self.call.spec.mask == "key":
            inner.masked_fill_(~mask[min(batch, mask.shape[0] - 1), keys], -math.inf)
        elif self.call.spec.mask == "bool":
            inner.masked_fill_(~mask_part(mask, batch, head, rows, keys), -math.inf)
        else:
            inner.add_(mask_part(mask, batch, head, rows, keys))

    def _finish(self, rows: slice, first: int, width: int, scores: torch.Tensor, group_max: torch.Tensor) -> Tile:
        """Row maxima, with what is not finite put right: a row with no key, +inf scores (which share the weight), NaN."""
        if width == 0:
            return Tile(self, self._rule(rows), rows, first, width, scores, group_max, scores.new_zeros(len(scores), 1), None)
        row_max = group_max.amax(1, keepdim=True)
        poisoned = None
        if not self.on_host:
            poisoned = row_max.isnan()
            infinite = row_max == math.inf
            torch.where(infinite, ties_at_infinity(scores), scores.masked_fill(poisoned, -math.inf), out=scores)
            row_max = row_max.masked_fill(poisoned | infinite | (row_max == -math.inf), 0)
            return Tile(self, self._rule(rows), rows, first, width, scores, group_max, row_max, poisoned[:, 0])
        odd = (~row_max.isfinite()).squeeze(1).nonzero().squeeze(1)
        if len(odd):
            scores[odd] = ties_at_infinity(scores[odd]).masked_fill_(row_max[odd].isnan(), -math.inf)
            group_max[odd] = scores[odd].view(len(odd), -1, group_max.shape[1]).amax(1)
            poisoned = row_max.squeeze(1).isnan()
            row_max = row_max.index_fill(0, odd, 0)
        return Tile(self, self._rule(rows), rows, first, width, scores, group_max, row_max, poisoned)


def mask_part(mask: torch.Tensor, batch: int, head: int, rows: slice, keys: slice) -> torch.Tensor:
    """The (rows or 1, keys or 1) part of a mask broadcastable to (B, H, Lq, Lk)."""
    part = mask[min(batch, mask.shape[0] - 1), min(head, mask.shape[1] - 1)]
    return part[rows if part.shape[0] != 1 else slice(0, 1), keys if part.shape[1] != 1 else slice(0, 1)]


class Workspace:
    """Buffers reused by all tiles of a call: fresh pages for each tile would cost as much as the arithmetic."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[int, torch.Tensor] = {}

    def take(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised contiguous tensor; valid until ``slot`` is taken again."""
        size = math.prod(shape)
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < size:
            self._buffers.pop(slot, None)
            buffer = self._buffers[slot] = torch.empty(size, dtype=self._dtype, device=self._device)
        return buffer[:size].view(shape)


def block_groups(call: AttentionCall, config: TileConfig, shares_keys: bool) -> list[list[Callable[[], Block]]]:
    """Ranges of batches and heads that share tiles: several batches only with all their heads, and one alpha. Made when called.

    With ``shares_keys``, blocks that read the same key head are in one group, in order: their gradients add up there.
    """
    batch, heads, q_len, _ = call.query.shape
    if batch == 0 or heads == 0 or q_len == 0:
        return []
    rows = min(config.rows, q_len)
    panel = min(config.panel, rows)
    if rows % panel:
        panel = math.gcd(rows, panel) if math.gcd(rows, panel) * 4 >= panel else rows
    intervals = Intervals(call, panel)
    repeat = heads // call.spec.kv_heads
    groups: list[list[Callable[[], Block]]] = []
    last: tuple[int, int] | None = None  # batch and key head where the last block ended
    for b, h, batches, per_block, run, alpha in _ranges(call, config):
        in_batch, in_heads = slice(b, min(b + batches, batch)), slice(h, min(h + per_block, run.stop))
        make = partial(Block, call, config, intervals, in_batch, in_heads, alpha)
        if shares_keys and last == (b, h // repeat):
            groups[-1].append(make)
        else:
            groups.append([make])
        last = (b, (in_heads.stop - 1) // repeat)
    return groups


def _ranges(call: AttentionCall, config: TileConfig) -> Iterator[tuple[int, int, int, int, slice, float | torch.Tensor]]:
    """First batch, first head, batches and heads of each block, and its run of heads with one alpha; batch by batch."""
    batch, heads = call.query.shape[:2]
    repeat = heads // call.spec.kv_heads
    runs = list(_alpha_runs(call))
    most = config.heads
    if host_reads_are_free(call.query.device) and batch * heads * call.query.shape[2] * call.key.shape[2] > PARALLEL_FROM:
        most = min(most, -(-batch * heads // torch.get_num_threads()))  # blocks enough for all threads
    batches = max(most // heads, 1) if len(runs) == 1 else 1
    # Whole groups of heads that share a key head, or a part that divides one: blocks that straddle two would wait for each other.
    aligned = most - most % repeat if most >= repeat else max(d for d in range(1, most + 1) if repeat % d == 0)
    for b in range(0, batch, batches):
        for run, alpha in runs:
            per_block = min(aligned, run.stop - run.start)
            for h in range(run.start, run.stop, per_block):
                yield b, h, batches, per_block, run, alpha


def _alpha_runs(call: AttentionCall) -> Iterator[tuple[slice, float | torch.Tensor]]:
    """Runs of heads with equal alpha. On an accelerator a tensor's values stay on the device."""
    heads = call.spec.heads
    known = {"1": 1.0, "1.5": 1.5, "2": 2.0}.get(call.spec.alpha_class)
    if known is not None:
        yield slice(0, heads), known
    elif not host_reads_are_free(call.query.device):
        yield slice(0, heads), call.alpha
    elif call.alpha.ndim == 0:
        yield slice(0, heads), float(call.alpha)
    else:
        values = call.alpha.tolist()
        start = 0
        for h in range(1, heads + 1):
            if h == heads or values[h] != values[start]:
                yield slice(start, h), values[start]
                start = h
