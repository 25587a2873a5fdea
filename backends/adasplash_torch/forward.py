"""Forward pass: per tile of whole rows, scores -> thresholds -> weights -> output.

Scores are computed once. A sparse tile (see :mod:`adasplash_torch.entries`) is then only its entries: a lower bound of each threshold
from the groups' maxima, the entries above it, the exact threshold on those, and a gathered weighted sum of values. A tile that is not
sparse runs the same solver on all its scores, a cache-sized chunk of rows at a time, and a dense product.
"""

from __future__ import annotations

from typing import cast

import torch

from adasplash_core import dropout
from adasplash_core.backend import AttentionCall, ForwardResult
from adasplash_torch.configs import ForwardConfig, TileConfig
from adasplash_torch.entries import Entries
from adasplash_torch.parallel import for_each_block
from adasplash_torch.tiles import Block, Tile, Workspace, block_groups


class _Outputs:
    """The tensors of a ForwardResult, written tile by tile."""

    def __init__(self, call: AttentionCall, dtype: torch.dtype) -> None:
        query, spec = call.query, call.spec
        batch, heads, q_len, _ = query.shape
        self.out = query.new_zeros(batch, heads, q_len, call.value.shape[-1])
        self.peak = query.new_zeros(batch, heads, q_len, dtype=dtype) if spec.needs_grad else None
        self.tau = query.new_zeros(batch, heads, q_len, dtype=torch.float32) if spec.return_stats else None
        self.support = query.new_zeros(batch, heads, q_len, dtype=torch.int32) if spec.return_stats else None

    def write(self, tile: Tile, out: torch.Tensor, peak: torch.Tensor, support: torch.Tensor | None) -> None:
        """``out`` (R, Ev), ``peak`` (R, 1), ``support`` (R,)."""
        put, rows = tile.block.put, tile.rows
        poisoned = tile.poisoned
        put(self.out, rows, out if poisoned is None else out.masked_fill(poisoned[:, None], torch.nan))
        if self.peak is not None:
            put(self.peak, rows, peak)
        if self.tau is not None and self.support is not None and support is not None:
            tau = tile.rule.tau(tile.row_max, peak)
            put(self.tau, rows, tau if poisoned is None else tau.masked_fill(poisoned[:, None], torch.nan))
            put(self.support, rows, support)


def forward(call: AttentionCall) -> ForwardResult:
    """Attention output and, where the spec asks for them, statistics and ``peak``, each row's largest weight, for the backward."""
    config = cast(ForwardConfig, call.config)
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    outputs = _Outputs(call, dtype)

    def compute(block: Block, workspace: Workspace) -> None:
        for tile in block.tiles(workspace):
            if tile.width and not _sparse(tile, config, outputs):
                _dense(tile, config, outputs)

    for_each_block(block_groups(call, config, shares_keys=False), compute, dtype, call.query.device)
    saved = () if outputs.peak is None else (outputs.peak,)
    return ForwardResult(outputs.out, saved, outputs.tau, outputs.support)


def density_limit(block: Block, config: TileConfig) -> float:
    """Above which part of a tile's groups it is computed densely: always from entries where a dense product would be wrong (NaN times
    a weight of 0) or dear (dropout's hash of every entry)."""
    return 1.0 if block.must_be_sparse or block.call.dropout_p > 0 else config.dense_above


def _sparse(tile: Tile, config: ForwardConfig, outputs: _Outputs) -> bool:
    """Compute the tile from its entries; False, with nothing written, if it is not sparse enough."""
    block, rule = tile.block, tile.rule
    limit = density_limit(block, config)
    if not block.on_host or (limit < 1 and rule.is_dense()):
        return False
    reach = rule.bound(tile.row_max - tile.group_max, config.bound_steps)
    found = tile.entries(reach, limit)
    if found is None:
        return False
    table = found.padded()
    solution = rule.solve(table, config.iterations, reach)
    entries = found.select(rule.reach(solution.peak)[found.row, 0] > found.drop)
    p = rule.weights(entries.drop, solution.peak[entries.row, 0], out=torch.empty_like(entries.drop))
    if block.call.dropout_p > 0:
        p *= dropout_factor(tile, entries)
    out = entries.matmul(p, block.flat_values, tile.flat_columns(entries))
    outputs.write(tile, out, solution.peak, entries.counts)
    return True


def _dense(tile: Tile, config: ForwardConfig, outputs: _Outputs) -> None:
    block, rule = tile.block, tile.rule
    peak = torch.empty_like(tile.row_max)
    support = torch.empty(len(peak), dtype=torch.int32, device=peak.device) if outputs.support is not None else None
    for chunk in tile.dense_chunks():
        drop = tile.drops(chunk)
        peak[chunk] = rule.solve(drop, config.iterations).peak
        p = rule.weights(drop, peak[chunk], out=drop)
        if support is not None:
            support[chunk] = torch.count_nonzero(p, dim=1)
    p = tile.by_pair(tile.scores)[..., : tile.width]
    out = p.new_empty(*p.shape[:2], block.values.shape[-1])
    keys = slice(tile.first, tile.first + tile.width)
    for i in range(len(p)):
        weights = p[i] if block.call.dropout_p == 0 else p[i] * dense_dropout_factor(tile, i)
        torch.mm(weights, block.values[block.kv(i), keys], out=out[i])
    outputs.write(tile, out.flatten(0, 1), peak, support)


def dropout_factor(tile: Tile, entries: Entries) -> torch.Tensor:
    """keep / (1 - dropout_p) of each entry, (nnz,)."""
    call = tile.block.call
    assert call.dropout_seed is not None
    pair = entries.row // tile.count
    heads = torch.tensor([b * call.spec.heads + h for b, h in tile.block.pairs])
    row = entries.row - pair * tile.count + tile.rows.start
    kept = dropout.keep(call.dropout_seed, heads[pair], row, entries.column + tile.first, call.dropout_p)
    return kept.to(entries.drop.dtype).div_(1 - call.dropout_p)


def dense_dropout_factor(tile: Tile, pair: int) -> torch.Tensor:
    """keep / (1 - dropout_p) of one pair's entries, (rows, width)."""
    call, device = tile.block.call, tile.scores.device
    assert call.dropout_seed is not None
    b, h = tile.block.pairs[pair]
    row = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None]
    column = torch.arange(tile.first, tile.first + tile.width, device=device)
    kept = dropout.keep(call.dropout_seed, b * call.spec.heads + h, row, column, call.dropout_p)
    return kept.to(tile.scores.dtype).div_(1 - call.dropout_p)
