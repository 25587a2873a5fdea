"""Workspace, grids and order of the kernels of one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.device import device_info
from adasplash_triton.configs import LIST_ROWS, BackwardConfig, ForwardConfig
from adasplash_triton.kernels.backward_keys import backward_keys_kernel
from adasplash_triton.kernels.backward_rows import backward_rows_kernel
from adasplash_triton.kernels.columns import key_max_kernel
from adasplash_triton.kernels.forward_dense import forward_dense_kernel
from adasplash_triton.kernels.forward_lists import forward_lists_kernel
from adasplash_triton.kernels.forward_select import forward_select_kernel
from adasplash_triton.kernels.forward_short import forward_short_kernel
from adasplash_triton.operands import Operands, dense_rows, strides
from adasplash_triton.runner import carve, launching, run

SLOTS_PER_MULTIPROCESSOR = 4
"""Rows of scratch for marking keys: at least as many as programs run at a time, or some would wait."""
SHORT_TILE = 128
"""Keys per register tile of the short forward."""
_MOST_ENTRIES = 2**31 - 1  # positions in the pools are int32


def saved_shapes(spec_sizes: tuple[int, int, int, int, int, int, int], itemsize: int, lists: bool) -> list[tuple[int, ...]]:
    """Shapes of O2, m, c, list entries per block of rows (offset, length or -1), and the pool of lists; sizes may be symbolic.

    The pool takes a fifth of the bytes of q, k, v and O2; blocks that find it full keep no list, and their backward walks all keys.
    """
    batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v = spec_sizes
    pool = (batch * (heads * q_len + kv_heads * kv_len) * (head_dim + head_dim_v) * itemsize) // 20 + 1024
    blocks = (q_len + LIST_ROWS - 1) // LIST_ROWS
    rows = (batch, heads, q_len)
    return [(*rows, head_dim_v), rows, rows, (batch, heads, blocks, 2) if lists else (1,), (pool,) if lists else (1,)]


def forward(call: AttentionCall) -> ForwardResult:
    """Launch the forward; the kernels' files say what each pass does."""
    config = call.config
    assert isinstance(config, ForwardConfig)
    query, key, value, spec, device = call.query, call.key, call.value, call.spec, call.query.device
    batch, heads, q_len, head_dim = query.shape
    kv_len, head_dim_v = value.shape[2], value.shape[3]
    out = torch.empty(batch, heads, q_len, head_dim_v, dtype=query.dtype, device=device)
    saved: list[torch.Tensor] = []
    if spec.needs_grad:
        sizes = (batch, heads, key.shape[1], q_len, kv_len, head_dim, head_dim_v)
        shapes = saved_shapes(sizes, query.element_size(), not spec.deterministic)
        dtypes = (query.dtype, torch.float32, torch.float32, torch.int32, torch.int32)
        saved = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    tau = torch.empty(batch, heads, q_len, device=device) if spec.return_stats else None
    support = torch.empty(batch, heads, q_len, dtype=torch.int32, device=device) if spec.return_stats else None
    if out.numel() == 0 or kv_len == 0:
        for x in (out, *saved, tau, support):
            if x is not None:
                x.zero_()
        return ForwardResult(out, saved, tau, support)

    operands = Operands.of(call)
    o2, m, c, blocks, pool = saved or [out] * 5
    operands.arguments.update(
        OUT=out,
        O2=o2,
        M=m,
        C=c,
        BLOCKS=blocks,
        POOL=pool,
        TAU=out if tau is None else tau,
        SUPPORT=out if support is None else support,
    )
    with launching(config, device):
        if operands.is_short():
            rows = min(config.short_rows, max(16, 1 << (q_len - 1).bit_length()))
            row_blocks = -(-q_len // rows)
            tiles = 1 << (-(-kv_len // SHORT_TILE) - 1).bit_length()
            operands.arguments.update(q_blocks=row_blocks, BM=rows, BT=SHORT_TILE, TILES=tiles)
            plan = (operands.plan, rows, tiles)
            grid = row_blocks * batch * heads
            run(forward_short_kernel, grid, operands.arguments, plan, num_warps=config.short_warps, num_stages=1)
        else:
            _select_solve(config, operands, out, pool)
    return ForwardResult(out, saved, tau, support)


def _select_solve(config: ForwardConfig, operands: Operands, out: torch.Tensor, pool: torch.Tensor) -> None:
    """Lists of keys for blocks of rows, then the rows that have one, then the others."""
    query, key, arguments, device = operands.query, operands.key, operands.arguments, operands.query.device
    batch, heads, q_len, _ = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    # Workspace in proportion to the inputs and the output: a block whose list finds the pool full is computed over all keys.
    items = batch * heads * operands.q_blocks
    io_bytes = (query.numel() + key.numel() + operands.value.numel() + out.numel()) * query.element_size()
    hits_stride = -(-kv_len // 1024) * 1024 + 1024
    slot_bytes = hits_stride * config.select_blocks
    slots = max(1, min(items, _multiprocessors(device) * SLOTS_PER_MULTIPROCESSOR, io_bytes // 8 // slot_bytes))
    key_block = max(16, 8192 // arguments["BE"])
    key_blocks = -(-kv_len // key_block)
    lists = min(io_bytes * 3 // 16 + 1024, _MOST_ENTRIES)
    counters = torch.zeros(slots + 4, dtype=torch.int32, device=device)
    tops = counters[:4].view(torch.int64)
    arguments.update(
        carve(
            device,
            KEY_MAX=(batch * kv_heads * key_blocks, torch.float32),
            HITS=(slots * slot_bytes, torch.int8),
            T=(batch * heads * q_len, torch.float32),
            MARGIN=(batch * heads * q_len, torch.float32),
            ENTRIES=(items * 2, torch.int32),
            LISTS=(lists, torch.int32),
        )
    )
    arguments.update(
        SLOTS=counters[4:],
        TOP=tops[:1],
        POOL_TOP=tops[1:],
        slots=slots,
        hits_stride=hits_stride,
        lists_size=lists,
        pool_size=min(pool.numel(), _MOST_ENTRIES),
        kv_heads=kv_heads,
        key_blocks=key_blocks,
        KEY_BLOCK=key_block,
        ROWS=LIST_ROWS,
        BLOCKS_PER_PROGRAM=config.select_blocks,
        SELECT_ROWS=LIST_ROWS * config.select_blocks,
        SELECT_KEYS=config.select_keys,
        SAMPLE=config.sample,
        SAMPLE_STEPS=config.sample_steps,
        SAMPLE_WORTH=config.sample_worth,
        LIST_PERCENT=config.list_percent,
        DENSE_PERCENT=config.dense_percent,
        LEAST=config.least_list,
        BK=config.list_keys,
        BS=config.list_keys_on_chip,
        BD=config.dense_keys,
    )
    run(key_max_kernel, (key_blocks, batch * kv_heads), arguments, operands.plan, num_warps=4)
    groups = -(-operands.q_blocks // config.select_blocks)
    select = {"num_warps": config.select_warps, "num_stages": config.select_stages} | _most(config.select_registers)
    run(forward_select_kernel, batch * heads * groups, arguments, operands.plan, **select)
    solve = {"num_warps": config.list_warps, "num_stages": config.list_stages} | _most(config.list_registers)
    run(forward_lists_kernel, items, arguments, operands.plan, **solve)
    run(forward_dense_kernel, items, arguments, operands.plan, num_warps=config.dense_warps, num_stages=config.dense_stages)


def backward(call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor]) -> Gradients:
    """Launch the backward: blocks of rows first (dQ, and dK, dV over lists), then blocks of keys (the rest of dK and dV)."""
    config = call.config
    assert isinstance(config, BackwardConfig)
    query, key, value, spec, device = call.query, call.key, call.value, call.spec, call.query.device
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, head_dim_v = key.shape[1], value.shape[2], value.shape[3]
    d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, key, value))
    if 0 in (d_query.numel(), d_key.numel(), d_value.numel()):
        d_alpha = torch.zeros_like(call.alpha) if spec.alpha_requires_grad else None
        return Gradients(d_query.zero_(), d_key.zero_(), d_value.zero_(), d_alpha)

    grad_out = dense_rows(grad_out)
    operands = Operands.of(call, grad_out, *saved)
    o2, m, c, blocks, pool = saved
    lists = not (spec.deterministic or operands.is_short())
    dk_sum = dv_sum = d_key
    if lists:
        sums = torch.zeros(batch * kv_heads * kv_len * (head_dim + head_dim_v), device=device)
        dk_sum, dv_sum = sums[: d_key.numel()], sums[d_key.numel() :]
    delta = torch.empty(batch, heads, q_len, device=device)
    parts = torch.empty(batch, heads, operands.q_blocks, device=device) if spec.alpha_requires_grad else delta
    arguments = operands.arguments
    arguments.update(
        DO=grad_out, O2=o2, M=m, C=c, BLOCKS=blocks, POOL=pool, DELTA=delta, DALPHA=parts, DQ=d_query, DK=d_key, DV=d_value,
        DK_SUM=dk_sum, DV_SUM=dv_sum, LISTS=lists, BK=config.block_k, BD=config.block_d, BN=config.block_n, **strides("do", grad_out),
    )  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    plan = (operands.plan, lists)
    with launching(config, device):
        run(backward_rows_kernel, batch * heads * operands.q_blocks, arguments, plan, **options)
        run(backward_keys_kernel, (-(-kv_len // config.block_n), batch * kv_heads), arguments, plan, **options)
    d_alpha = None
    if spec.alpha_requires_grad:
        d_alpha = (parts.sum() if call.alpha.ndim == 0 else parts.sum((0, 2))).to(call.alpha.dtype)
    return Gradients(d_query, d_key, d_value, d_alpha)


def _most(registers: int) -> dict[str, int]:
    """The compile option that bounds registers per thread; none for 0, and on AMD GPUs, whose compiler does not take it."""
    return {"maxnreg": registers} if registers and not torch.version.hip else {}


def _multiprocessors(device: torch.device) -> int:
    return device_info(device).multiprocessors if device.type == "cuda" else 2
