"""Workspace, grids and order of the kernels of one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from adasplash_core import layout
from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.device import device_info
from adasplash_core.errors import AdasplashWarning
from adasplash_cupy.configs import (
    BackwardConfig,
    ForwardConfig,
    backward_instances,
    forward_instances,
    short_instance,
    short_tile,
    uses_lists,
)
from adasplash_cupy.instances import COLUMNS, KEYS, ROWS, SHORT_ROWS, Instance
from adasplash_cupy.nvrtc import CompileError
from adasplash_cupy.operands import Operands, aligned_rows
from adasplash_cupy.runner import Launcher, launching
from adasplash_cupy.tensor_maps import TensorMap, encode, reason_against, tensor_map

_KEYS_A_BLOCK = 128  # of key_max.cu
_COUNTERS = 6  # of params.cuh
_MOST_ENTRIES = 2**31 - 1  # positions in the pools are int32
_CACHED_KEYS = 16 * 2**20  # bytes of K that stay in the L2 cache while forward_mark reads them time and again
_CACHED_BYTES = 48 * 1024  # scores of a row that the transform keeps in shared memory


def saved_shapes(sizes: tuple[int, int, int, int, int, int, int], itemsize: int, lists: bool) -> list[tuple[int, ...]]:
    """Shapes of O2, m, c, list entries per block of rows (offset, length or -1), and the pool of lists; sizes may be symbolic.

    The pool takes a fifth of the bytes of q, k, v and O2; blocks that find it full keep no list, and their backward walks all keys.
    """
    batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v = sizes
    pool = (batch * (heads * q_len + kv_heads * kv_len) * (head_dim + head_dim_v) * itemsize) // 20 + 1024
    blocks = (q_len + ROWS - 1) // ROWS
    rows = (batch, heads, q_len)
    return [(*rows, head_dim_v), rows, rows, (batch, heads, blocks, 2) if lists else (1,), (pool,) if lists else (1,)]


def forward(call: AttentionCall) -> ForwardResult:
    """Launch the forward; the kernels' files say what each pass does."""
    config = call.config
    assert isinstance(config, ForwardConfig)
    query, key, value, spec, device = call.query, call.key, call.value, call.spec, call.query.device
    batch, heads, q_len, head_dim = query.shape
    kv_len, head_dim_v = value.shape[2], value.shape[3]
    out = layout.empty_like(query, head_dim_v)
    saved: list[torch.Tensor] = []
    if spec.needs_grad:
        sizes = (batch, heads, key.shape[1], q_len, kv_len, head_dim, head_dim_v)
        shapes = saved_shapes(sizes, query.element_size(), not spec.deterministic)
        dtypes = (query.dtype, torch.float32, torch.float32, torch.int32, torch.int32)
        saved = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    tau = torch.empty(batch, heads, q_len, device=device) if spec.return_stats else None
    support = torch.empty(batch, heads, q_len, dtype=torch.int32, device=device) if spec.return_stats else None
    result = ForwardResult(out, saved, tau, support)
    if out.numel() == 0 or kv_len == 0:
        for x in (out, *saved, tau, support):
            if x is not None:
                x.zero_()
        return result

    operands = Operands.of(call)
    operands.view("out", out)
    operands.point("tau", tau)
    operands.point("support", support)
    if saved:
        for name, x in zip(("o2", "m", "c"), saved, strict=False):
            operands.point(name, x)
        if not spec.deterministic and uses_lists(spec, kv_len):
            operands.point("blocks", saved[3])
            operands.point("pool", saved[4])
            operands.values["pool_size"] = min(saved[4].numel(), _MOST_ENTRIES)
    tile = short_tile(spec, kv_len)
    instances = forward_instances(spec, config)
    items = batch * heads * operands.values["q_blocks"]
    with launching("cupy", config, device) as launch:
        if tile:
            blocks = batch * heads * -(-q_len // SHORT_ROWS)
            launch(short_instance(spec, config, tile), (blocks,), operands.values)
            return result
        if uses_lists(spec, kv_len):
            _select(config, operands, instances, launch, out)
        launch(instances["forward_dense"], (int(items),), operands.values)
    return result


def _select(
    config: ForwardConfig, operands: Operands, instances: dict[str, Instance], launch: Launcher, out: torch.Tensor
) -> None:
    """Lists of keys for blocks of rows, then the rows that have one."""
    query, key, values, device = operands.query, operands.key, operands.values, operands.query.device
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    # Workspace in proportion to the inputs and the output: a block whose list finds the pool full is computed over all keys.
    items = batch * heads * int(values["q_blocks"])
    io_bytes = (query.numel() + key.numel() + operands.value.numel() + out.numel()) * query.element_size()
    hit_words = (-(-kv_len // 128) + 1) * 8
    multiprocessors = device_info(device).multiprocessors if device.type == "cuda" else 1
    maps = _maps(operands) if "forward_mark" in instances else None
    if maps:
        programs = min(batch * heads * -(-q_len // (128 * config.mark_groups)), multiprocessors * config.mark_programs)
        words = programs * 2 * config.mark_groups * hit_words * 2  # of two items, and u32
    else:
        programs = min(items, multiprocessors * config.select_programs)
        words = programs * hit_words
    lists = min(io_bytes * 3 // 16 + 1024, _MOST_ENTRIES)
    zeroed = torch.zeros(2 * _COUNTERS + batch * kv_heads, dtype=torch.int32, device=device)
    operands.point("counters", zeroed)
    values["key_max"] = zeroed.data_ptr() + 8 * _COUNTERS
    operands.point("t", torch.empty(batch * heads * q_len, device=device))
    operands.point("margin", torch.empty(batch * heads * q_len, device=device))
    operands.point("hits", torch.empty(words, dtype=torch.int16, device=device))
    operands.point("entries", torch.empty(items * 2, dtype=torch.int32, device=device))
    operands.point("queue", torch.empty(items, dtype=torch.int32, device=device))
    operands.point("lists", torch.empty(lists, dtype=torch.int32, device=device))
    values.update(
        hit_words=hit_words,
        lists_size=lists,
        sample=config.mark_sample if maps else config.sample,
        heads_together=max(1, _CACHED_KEYS // (kv_len * key.shape[3] * key.element_size())) * (heads // kv_heads),
        sample_steps=config.sample_steps,
        sample_worth=config.mark_worth if maps else config.sample_worth,
        list_percent=config.list_percent,
        dense_percent=config.dense_percent,
        least_list=config.least_list,
    )
    launch(instances["key_max"], (-(-kv_len // _KEYS_A_BLOCK) * batch * kv_heads,), values)
    marked = False
    if maps:
        launch(instances["forward_bound"], (items,), values)
        try:
            launch(instances["forward_mark"], (programs,), values, maps=maps)
            marked = True
        except CompileError as error:
            warnings.warn(f"NVRTC does not compile Hopper's kernel, a slower one runs instead: {error}", AdasplashWarning, 2)
    if not marked:
        launch(instances["forward_select"], (programs,), values)
    launch(instances["forward_lists"], (items,), values)


def _maps(operands: Operands) -> list[TensorMap] | None:
    """Of Q and K; None where the copy engine cannot read them, or the driver does not know of it."""
    maps = [found for found in (tensor_map(operands.query), tensor_map(operands.key)) if found is not None]
    if len(maps) < 2:
        return None
    if operands.query.device.type == "cuda":
        if reason_against() is not None:
            return None
        try:
            for of in maps:
                encode(of)  # kept for the launch
        except RuntimeError as error:
            warnings.warn(f"Hopper's kernel does not take this call, a slower one runs instead: {error}", AdasplashWarning, 2)
            return None
    return maps


def backward(call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor]) -> Gradients:
    """Launch the backward: blocks of rows first (dQ, and dK, dV over lists), then blocks of keys (the rest of dK and dV)."""
    config = call.config
    assert isinstance(config, BackwardConfig)
    query, key, value, spec, device = call.query, call.key, call.value, call.spec, call.query.device
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, head_dim_v = key.shape[1], value.shape[2], value.shape[3]
    d_query, d_key, d_value = (layout.empty_like(x) for x in (query, key, value))
    if 0 in (d_query.numel(), d_key.numel(), d_value.numel()):
        d_alpha = torch.zeros_like(call.alpha) if spec.alpha_requires_grad else None
        return Gradients(d_query.zero_(), d_key.zero_(), d_value.zero_(), d_alpha)

    operands = Operands.of(call)
    operands.view("d_out", aligned_rows(grad_out))
    for name, x in zip(("o2", "m", "c"), saved, strict=False):
        operands.point(name, x)
    for name, x in (("d_q", d_query), ("d_k", d_key), ("d_v", d_value)):
        operands.view(name, x)
    if not spec.deterministic and uses_lists(spec, kv_len):
        operands.point("blocks", saved[3])
        operands.point("pool", saved[4])
        sums = torch.zeros(batch * kv_heads * kv_len * (head_dim + head_dim_v), device=device)
        operands.point("dk_sum", sums)
        operands.point("dv_sum", sums[d_key.numel() :])
    operands.point("delta", torch.empty(batch, heads, q_len, device=device))
    parts = torch.empty(batch, heads, int(operands.values["q_blocks"]), device=device) if spec.alpha_requires_grad else None
    operands.point("d_alpha", parts)
    instances = backward_instances(spec, config)
    chunks = -(-max(head_dim, head_dim_v) // COLUMNS)
    with launching("cupy", config, device) as launch:
        launch(instances["backward_rows"], (batch * heads * int(operands.values["q_blocks"]),), operands.values)
        launch(instances["backward_keys"], (-(-kv_len // KEYS) * batch * kv_heads, chunks), operands.values)
    d_alpha = None
    if parts is not None:
        d_alpha = (parts.sum() if call.alpha.ndim == 0 else parts.sum((0, 2))).to(call.alpha.dtype)
    return Gradients(d_query, d_key, d_value, d_alpha)


def transform_forward(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha-entmax of ``x`` (..., n) over its last dimension, in its dtype; ``alpha`` () or broadcastable, size 1 in the last."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    alphas = alpha.to(torch.float64)
    if alpha.numel() > 1:
        alphas = alphas.expand(*x.shape[:-1], 1).contiguous()
    cached = n * 4 <= _CACHED_BYTES - 1024
    values: dict[str, int | float] = {
        "q": rows.data_ptr(),
        "out": out.data_ptr(),
        "alpha": alphas.data_ptr(),
        "alpha_head": 1 if alpha.numel() > 1 else 0,
        "q_row": rows.stride(0),
        "out_row": n,
        "kv_len": n,
        "lists_size": rows.shape[0],
        "left": int(cached),
    }
    across = min(rows.shape[0], 2**16)
    instance = Instance("transform", str(x.dtype).removeprefix("torch."))
    with launching("cupy", None, x.device) as launch:
        launch(instance, (across, -(-rows.shape[0] // across)), values, n * 4 if cached else 0)
    return out
