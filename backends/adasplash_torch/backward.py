"""Backward pass (AdaSplash, arXiv 2502.12082, App. A): scores again, tile by tile; with thresholds known there is nothing to solve.

With u = p^(2-alpha), D the dropout factor (1 without) and dp = D * (dO V^T), for scores s = scale q.k + bias:

    ds = u (dp - delta),   delta_i = sum_j u_ij dp_ij / sum_j u_ij
    dQ = scale ds K,   dK = scale ds^T Q,   dV = (D p)^T dO,   d bias = ds
    d alpha = sum_i [ delta_i sum_j p_ij w_ij - sum_j dp_ij p_ij w_ij ]        (w: transform_grad.log_excess)

A tile holds whole rows, so delta needs nothing kept from the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from adasplash_core.backend import AttentionCall, Gradients
from adasplash_core.transform_grad import log_excess
from adasplash_torch.configs import BackwardConfig
from adasplash_torch.entries import Transposed
from adasplash_torch.forward import dense_dropout_factor, density_limit, dropout_factor
from adasplash_torch.parallel import for_each_block
from adasplash_torch.tiles import Block, Tile, Workspace, block_groups, mask_part

_DP, _SCRATCH = 2, 3  # workspace slots; 0 and 1 are the tile's scores and group maxima


class _Accumulators:
    """Gradients in the compute dtype, added to tile by tile. Where that is the input's dtype they are the result itself."""

    def __init__(self, call: AttentionCall, dtype: torch.dtype) -> None:
        device = call.query.device
        self.query = torch.zeros(call.query.shape, dtype=call.query.dtype, device=device)
        self.key = torch.zeros(call.key.shape, dtype=dtype, device=device)
        self.value = torch.zeros(call.value.shape, dtype=dtype, device=device)
        self.mask: torch.Tensor | None = None
        if call.spec.mask_requires_grad and call.attn_mask is not None:
            self.mask = torch.zeros(call.attn_mask.shape, dtype=dtype, device=device)
        self.alpha: torch.Tensor | None = None
        if call.spec.alpha_requires_grad:
            self.alpha = torch.zeros(call.query.shape[:3], dtype=dtype, device=device)  # each row's part

    def gradients(self, call: AttentionCall) -> Gradients:
        alpha = mask = None
        if self.alpha is not None:
            wide = self.alpha if self.alpha.device.type == "mps" else self.alpha.double()
            alpha = (wide.sum((0, 2)) if call.alpha.ndim else wide.sum()).to(call.alpha.dtype)
        if self.mask is not None and call.attn_mask is not None:
            mask = self.mask.to(call.attn_mask.dtype)
        return Gradients(self.query, self.key.to(call.key.dtype), self.value.to(call.value.dtype), alpha, mask)


def backward(call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor]) -> Gradients:
    """Gradients from ``grad_out`` (B, H, Lq, Ev), any strides, and the forward's ``peak`` (B, H, Lq)."""
    config = cast(BackwardConfig, call.config)
    (peak,) = saved
    sums = _Accumulators(call, peak.dtype)

    def compute(block: Block, workspace: Workspace) -> None:
        for tile in block.tiles(workspace):
            if not tile.width:
                continue
            query, grad = block.rows_of(call.query, tile.rows), block.rows_of(grad_out, tile.rows)
            tile_peak = block.rows_of(peak, tile.rows)[:, None]
            if tile.poisoned is not None:  # NaN stays in its row: it reaches no key
                tile_peak = tile_peak.masked_fill(tile.poisoned[:, None], 0)
                query = query.masked_fill(tile.poisoned[:, None], 0)
            if not _sparse(tile, config, query, grad, tile_peak, sums):
                _dense(tile, query, grad, tile_peak, sums, workspace)

    groups = block_groups(call, config, shares_keys=True)
    if sums.mask is not None:  # all heads may add to one entry
        groups = [[make for group in groups for make in group]]
    for_each_block(groups, compute, peak.dtype, call.query.device)
    return sums.gradients(call)


def _write_query(tile: Tile, grad_query: torch.Tensor, sums: _Accumulators) -> None:
    if tile.poisoned is not None:
        grad_query = grad_query.masked_fill(tile.poisoned[:, None], torch.nan)
    tile.block.put(sums.query, tile.rows, grad_query)


def _sparse(
    tile: Tile, config: BackwardConfig, query: torch.Tensor, grad: torch.Tensor, peak: torch.Tensor, sums: _Accumulators
) -> bool:
    """Compute the tile from its entries; False, with nothing added, if it is not sparse enough."""
    block, rule, call = tile.block, tile.rule, tile.block.call
    limit = density_limit(block, config)
    if not block.on_host or (limit < 1 and rule.is_dense()):
        return False
    entries = tile.entries(rule.reach(peak), limit)
    if entries is None:
        return False
    row, column = entries.row, tile.flat_columns(entries)
    p = rule.weights(entries.drop, peak[row, 0], out=torch.empty_like(entries.drop))
    u = rule.support_power(p)
    grad_p = entries.dot(grad, block.flat_values, column)
    kept_p = p
    if call.dropout_p > 0:
        factor = dropout_factor(tile, entries)
        grad_p, kept_p = grad_p * factor, p * factor
    total = entries.row_sums(u)
    delta = entries.row_sums(u * grad_p).div_(torch.where(total > 0, total, 1.0))
    grad_s = grad_p.sub(delta[row]).mul_(u)

    _write_query(tile, entries.matmul(grad_s, block.flat_keys, column).mul_(call.scale), sums)
    by_key = Transposed(row, column, len(block.flat_keys))
    _add_kv(block, sums.key, by_key.matmul(grad_s, query), call.scale)
    _add_kv(block, sums.value, by_key.matmul(kept_p, grad), 1.0)
    if sums.mask is not None:
        _scatter_mask(tile, sums.mask, row, entries.column, grad_s)
    if sums.alpha is not None:
        pw = _weighted_excess(p, rule.beta)
        block.put(sums.alpha, tile.rows, delta * entries.row_sums(pw) - entries.row_sums(grad_p * pw))
    return True


def _dense(
    tile: Tile, query: torch.Tensor, grad: torch.Tensor, peak: torch.Tensor, sums: _Accumulators, workspace: Workspace
) -> None:
    block, rule, call = tile.block, tile.rule, tile.block.call
    keys = slice(tile.first, tile.first + tile.width)
    p, grad_p = tile.scores, workspace.take(_DP, tuple(tile.scores.shape))
    p_of, grad_p_of = tile.by_pair(p)[..., : tile.width], tile.by_pair(grad_p)[..., : tile.width]
    query, grad = tile.by_pair(query), tile.by_pair(grad)
    grad_p.view(len(grad_p), -1)[:, tile.width :] = 0
    factors: list[torch.Tensor] = []
    for i in range(len(grad)):
        torch.mm(grad[i], block.values[block.kv(i), keys].T, out=grad_p_of[i])
        if call.dropout_p > 0:
            factors.append(dense_dropout_factor(tile, i))
            grad_p_of[i].mul_(factors[i])
    alpha_part = peak.new_empty(len(peak))
    for chunk in tile.dense_chunks():
        rule.weights(tile.drops(chunk), peak[chunk], out=p[chunk])
        u = rule.support_power(p[chunk], out=workspace.take(_SCRATCH, tuple(p[chunk].shape)))
        total = u.sum(-1, keepdim=True)
        delta = torch.linalg.vecdot(u, grad_p[chunk])[:, None].div_(torch.where(total > 0, total, 1.0))
        if sums.alpha is not None:
            pw = _weighted_excess(p[chunk], rule.beta)
            alpha_part[chunk] = delta[:, 0] * pw.sum(-1) - torch.linalg.vecdot(grad_p[chunk], pw)
        grad_p[chunk].sub_(delta).mul_(u)
    if sums.alpha is not None:
        block.put(sums.alpha, tile.rows, alpha_part)
    grad_query = query.new_empty(query.shape)
    for i, (b, h) in enumerate(block.pairs):
        kv_head = block.kv_heads.start + block.kv(i) % (block.kv_heads.stop - block.kv_heads.start)
        grad_s, weights = grad_p_of[i], p_of[i]
        torch.addmm(grad_query[i], grad_s, block.keys[block.kv(i), keys], beta=0, alpha=call.scale, out=grad_query[i])
        key_sum, value_sum = sums.key[b, kv_head, keys], sums.value[b, kv_head, keys]
        torch.addmm(key_sum, grad_s.T, query[i], alpha=call.scale, out=key_sum)
        if call.dropout_p > 0:
            weights = weights * factors[i]
        torch.addmm(value_sum, weights.T, grad[i], out=value_sum)
        if sums.mask is not None:
            part = mask_part(sums.mask, b, h, tile.rows, keys)
            part += grad_s.sum_to_size(part.shape)
    _write_query(tile, grad_query.flatten(0, 1), sums)


def _add_kv(block: Block, target: torch.Tensor, values: torch.Tensor, factor: float) -> None:
    """Add ``values`` (N * Lk, D), of the block's keys, to their place in ``target`` (B, Hkv, Lk, D)."""
    place = target[block.batches, block.kv_heads]
    place.add_(values.view(place.shape), alpha=factor)


def _scatter_mask(tile: Tile, target: torch.Tensor, row: torch.Tensor, column: torch.Tensor, grad_s: torch.Tensor) -> None:
    """Add each entry's gradient to a mask of a shape broadcastable to (B, H, Lq, Lk)."""
    pair = row // tile.count
    places = torch.tensor(tile.block.pairs)[pair].unbind(1)
    index = torch.zeros_like(row)
    query = row - pair * tile.count + tile.rows.start
    for place, size, stride in zip((*places, query, column + tile.first), target.shape, target.stride(), strict=True):
        if size > 1:
            index.add_(place, alpha=stride)
    target.view(-1).index_add_(0, index, grad_s)


def _weighted_excess(p: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """p w, 0 where p is."""
    positive = p > 0
    log_p = torch.where(positive, p, 1.0).log_()
    return log_excess(log_p, beta).mul_(p)
