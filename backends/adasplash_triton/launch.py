"""Forward and backward as the core calls them, and the programs behind them: workspace, grids and order of the kernels.

A call first gathers the caller's tensors into a table by role and describes itself: shapes, strides, dtypes, numbers, spec and config.
The description finds a program, or it is built here, by :func:`forward_program` or :func:`backward_program`. The program allocates
outputs and scratch into the table and launches its steps with the table's addresses (:mod:`adasplash_triton.program`), on NVIDIA
straight through the driver (:mod:`adasplash_triton.replay`). So what depends on sizes and features is computed once, and a call that
was described before costs a look-up, a few allocations and the launches.

Arguments go by name. A new kernel argument is an entry in ``arguments`` of the program that launches it; a new kernel is a
:class:`Step`, its scratch ``workspace.add(...)``, a new output an :class:`Output` under a role of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.device import device_info
from adasplash_core.programs import Programs, describe
from adasplash_triton.configs import LIST_ROWS, BackwardConfig, ForwardConfig, Precision, precision_of
from adasplash_triton.kernels.backward_keys import backward_keys_kernel
from adasplash_triton.kernels.backward_rows import backward_rows_kernel
from adasplash_triton.kernels.columns import key_max_kernel
from adasplash_triton.kernels.forward_dense import forward_dense_kernel
from adasplash_triton.kernels.forward_lists import forward_lists_kernel
from adasplash_triton.kernels.forward_select import forward_select_kernel
from adasplash_triton.kernels.forward_short import forward_short_kernel
from adasplash_triton.operands import (
    address,
    dense_rows,
    inputs_of,
    is_short,
    output_like,
    row_steps,
    shared_arguments,
    strides,
)
from adasplash_triton.program import ALIGNMENT, Output, Program, Step, Table, Workspace
from adasplash_triton.runner import Address

SLOTS_PER_MULTIPROCESSOR = 4
"""Rows of scratch for marking keys: at least as many as programs run at a time, or some would wait."""
SHORT_TILE = 128
"""Keys per register tile of the short forward."""
_MOST_ENTRIES = 2**31 - 1  # positions in the pools are int32
_PAD = ALIGNMENT // 4  # entries of 4 bytes

_forwards, _backwards = Programs[Program](), Programs[Program]()


def forward(call: AttentionCall) -> ForwardResult:
    """Launch the forward; the kernels' files say what each pass does."""
    table = inputs_of(call)
    _run(_forwards, forward_program, call, table)
    saved = [table["O2"], table["rows"], table["lists"]] if call.spec.needs_grad else []
    return ForwardResult(table["OUT"], saved, table.get("TAU"), table.get("SUPPORT"))


def backward(call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor]) -> Gradients:
    """Launch the backward: blocks of rows first (dQ, and dK, dV over lists), then blocks of keys (the rest of dK and dV)."""
    table = inputs_of(call)
    table["DO"] = dense_rows(grad_out)
    table["O2"], table["rows"], table["lists"] = saved
    _run(_backwards, backward_program, call, table)
    d_alpha = None
    if call.spec.alpha_requires_grad:
        parts = table["DALPHA"]
        d_alpha = (parts.sum() if call.alpha.ndim == 0 else parts.sum((0, 2))).to(call.alpha.dtype)
    return Gradients(table["DQ"], table["DK"], table["DV"], d_alpha)


def _run(
    programs: Programs[Program],
    build: Callable[[AttentionCall, Table, Precision], Program],
    call: AttentionCall,
    table: Table,
) -> None:
    key, device = describe(call, table), call.query.device
    program = programs.find(key)
    if program is not None:
        program(table, device)
        return
    program = build(call, table, precision_of(call.spec, device_info(device)))
    program(table, device)
    programs.keep(key, program)  # one whose kernels do not run is not kept


# -- what is kept for the backward ------------------------------------------------------------------------------------------------


def saved_shapes(spec_sizes: tuple[int, int, int, int, int, int, int], itemsize: int, lists: bool) -> list[tuple[int, ...]]:
    """Shapes of O2; m and c; and list entries per block of rows (offset, length or -1) with the pool of lists; sizes may be symbolic.

    The pool takes a fifth of the bytes of q, k, v and O2; blocks that find it full keep no list, and their backward walks all keys.
    """
    batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v = spec_sizes
    pool = (batch * (heads * q_len + kv_heads * kv_len) * (head_dim + head_dim_v) * itemsize) // 20 + 1024
    return [
        (batch, heads, q_len, head_dim_v),
        (2, _padded(batch * heads * q_len)),
        (list_entries(batch, heads, q_len) + pool,) if lists else (1,),
    ]


def list_entries(batch: int, heads: int, q_len: int) -> int:
    """How many of the entries of ``lists`` stand before the pool: (batch, heads, blocks, 2), and padding."""
    return _padded(batch * heads * ((q_len + LIST_ROWS - 1) // LIST_ROWS) * 2)


def _padded(entries: int) -> int:
    return (entries + _PAD - 1) // _PAD * _PAD


def _saved_addresses(rows: tuple[int, ...], entries: int, lists: bool) -> dict[str, Address]:
    """M, C, BLOCKS and POOL in the tensors of :func:`saved_shapes`; without lists nobody reads the latter two."""
    return {
        "M": Address("rows", 0, torch.float32),
        "C": Address("rows", 4 * rows[1], torch.float32),
        "BLOCKS": Address("lists", 0, torch.int32),
        "POOL": Address("lists", 4 * entries if lists else 0, torch.int32),
    }


# -- forward ----------------------------------------------------------------------------------------------------------------------


def forward_program(call: AttentionCall, table: Table, precision: Precision = "ieee") -> Program:
    """The forward of calls that are described like this one."""
    config, spec = call.config, call.spec
    assert isinstance(config, ForwardConfig)
    query, key, value = table["Q"], table["K"], table["V"]
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, head_dim_v = key.shape[1], value.shape[2], value.shape[3]
    outputs = [output_like("OUT", query, head_dim_v)]
    out = Address("OUT", 0, query.dtype)
    arguments = shared_arguments(call, table, precision)
    arguments.update(OUT=out, O2=out, M=out, C=out, BLOCKS=out, POOL=out, TAU=out, SUPPORT=out, pool_size=0)
    arguments.update(row_steps("out", outputs[0]))
    if spec.needs_grad:
        sizes = (batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v)
        o2, rows, lists = saved_shapes(sizes, query.element_size(), not spec.deterministic)
        outputs += [Output("O2", o2, query.dtype), Output("rows", rows, torch.float32), Output("lists", lists, torch.int32)]
        entries = list_entries(batch, heads, q_len)
        arguments.update(O2=Address("O2", 0, query.dtype), **_saved_addresses(rows, entries, arguments["KEEP"]))
        arguments["pool_size"] = min(lists[0] - entries, _MOST_ENTRIES) if arguments["KEEP"] else 0
    if spec.return_stats:
        outputs += [Output("TAU", query.shape[:3], torch.float32), Output("SUPPORT", query.shape[:3], torch.int32)]
        arguments.update(TAU=Address("TAU", 0, torch.float32), SUPPORT=Address("SUPPORT", 0, torch.int32))
    owners = (spec, config)
    if 0 in (batch, heads, q_len, head_dim_v, kv_len):
        return Program(config, [x._replace(zero=True) for x in outputs], [], owners)
    if is_short(query, key, value):
        return Program(config, outputs, [_short(config, arguments, batch * heads)], owners)
    workspace = Workspace()
    io_bytes = (query.numel() + key.numel() + value.numel() + batch * heads * q_len * head_dim_v) * query.element_size()
    steps = _select_solve(config, arguments, workspace, batch, io_bytes, query.device)
    return Program(config, [*outputs, workspace.output()], steps, owners)


def _short(config: ForwardConfig, arguments: dict[str, Any], sequences: int) -> Step:
    """Whole rows of scores on chip, one launch."""
    rows = min(config.short_rows, max(16, 1 << (arguments["q_len"] - 1).bit_length()))
    row_blocks = -(-arguments["q_len"] // rows)
    tiles = 1 << (-(-arguments["kv_len"] // SHORT_TILE) - 1).bit_length()
    arguments.update(q_blocks=row_blocks, BM=rows, BT=SHORT_TILE, TILES=tiles)
    options = {"num_warps": config.short_warps, "num_stages": 1}
    return Step(forward_short_kernel, (row_blocks * sequences, 1, 1), arguments, options)


def _select_solve(
    config: ForwardConfig, arguments: dict[str, Any], workspace: Workspace, batch: int, io_bytes: int, device: torch.device
) -> list[Step]:
    """Lists of keys for blocks of rows, then the rows that have one, then the others."""
    heads, kv_heads, q_len, kv_len, q_blocks = (
        arguments[name] for name in ("heads", "kv_heads", "q_len", "kv_len", "q_blocks")
    )
    # Workspace in proportion to the inputs and the output: a block whose list finds the pool full is computed over all keys.
    items = batch * heads * q_blocks
    hits_stride = -(-kv_len // 1024) * 1024 + 1024
    slot_bytes = hits_stride * config.select_blocks
    slots = max(1, min(items, _multiprocessors(device) * SLOTS_PER_MULTIPROCESSOR, io_bytes // 8 // slot_bytes))
    key_block = max(16, 8192 // arguments["BE"])
    key_blocks = -(-kv_len // key_block)
    lists = min(io_bytes * 3 // 16 + 1024, _MOST_ENTRIES)
    # What must be 0 before the other kernels run: the pools' tops (int64), then a flag a slot. The first kernel sees to it.
    counters = workspace.add(slots + 4, torch.int32)
    arguments.update(
        COUNTERS=counters,
        counters=slots + 4,
        TOP=counters._replace(dtype=torch.int64),
        POOL_TOP=counters._replace(offset=counters.offset + 8, dtype=torch.int64),
        SLOTS=counters._replace(offset=counters.offset + 16),
        KEY_MAX=workspace.add(batch * kv_heads * key_blocks, torch.float32),
        HITS=workspace.add(slots * slot_bytes, torch.int8),
        T=workspace.add(batch * heads * q_len, torch.float32),
        MARGIN=workspace.add(batch * heads * q_len, torch.float32),
        ROW_MAX=workspace.add(batch * heads * q_len if arguments["ALPHA"] < 15 else 1, torch.float32),
        ENTRIES=workspace.add(items * 2, torch.int32),
        LISTS=workspace.add(lists, torch.int32),
        slots=slots,
        hits_stride=hits_stride,
        lists_size=lists,
        key_blocks=key_blocks,
        KEY_BLOCK=key_block,
        ROWS=LIST_ROWS,
        BLOCKS_PER_PROGRAM=config.select_blocks,
        SELECT_ROWS=LIST_ROWS * config.select_blocks,
        SELECT_KEYS=config.select_keys,
        SAMPLE=config.sample,
        SAMPLE_STEPS=config.sample_steps,
        SAMPLE_WORTH=config.sample_worth,
        FOLLOW_SHARE=config.follow_share,
        SELECT_GROUPS=min(config.select_keys // 16, config.select_warps),
        LIST_GROUPS=min(config.list_keys // 16, config.list_warps),
        SWEEPS=config.sweeps,
        LIST_PERCENT=config.list_percent,
        DENSE_PERCENT=config.dense_percent,
        LEAST=config.least_list,
        BK=config.list_keys,
        BS=config.list_keys_on_chip,
        BD=config.dense_keys,
    )
    groups = -(-q_blocks // config.select_blocks)
    select = {"num_warps": config.select_warps, "num_stages": config.select_stages} | _most(config.select_registers)
    solve = {"num_warps": config.list_warps, "num_stages": config.list_stages} | _most(config.list_registers)
    dense = {"num_warps": config.dense_warps, "num_stages": config.dense_stages}
    return [
        Step(key_max_kernel, (key_blocks, batch * kv_heads, 1), arguments, {"num_warps": 4}),
        Step(forward_select_kernel, (batch * heads * groups, 1, 1), arguments, select),
        Step(forward_lists_kernel, (items, 1, 1), arguments, solve),
        Step(forward_dense_kernel, (items, 1, 1), arguments, dense),
    ]


# -- backward ---------------------------------------------------------------------------------------------------------------------


def backward_program(call: AttentionCall, table: Table, precision: Precision = "ieee") -> Program:
    """The backward of calls that are described like this one."""
    config, spec = call.config, call.spec
    assert isinstance(config, BackwardConfig)
    query, key, value, grad_out = table["Q"], table["K"], table["V"], table["DO"]
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, head_dim_v = key.shape[1], value.shape[2], value.shape[3]
    arguments, workspace = shared_arguments(call, table, precision), Workspace()
    q_blocks = arguments["q_blocks"]
    outputs = [output_like(role, x) for role, x in (("DQ", query), ("DK", key), ("DV", value))]
    delta = workspace.add(batch * heads * q_len, torch.float32)
    arguments.update({x.role: Address(x.role, 0, x.dtype) for x in outputs}, DELTA=delta, DALPHA=delta)
    for x in outputs:
        arguments.update(row_steps(x.role.lower(), x))
    if spec.alpha_requires_grad:
        outputs.append(Output("DALPHA", (batch, heads, q_blocks), torch.float32))
        arguments["DALPHA"] = Address("DALPHA", 0, torch.float32)
    owners = (spec, config)
    if 0 in (batch, heads, q_len, kv_heads, kv_len, head_dim, head_dim_v):
        return Program(config, [x._replace(zero=True) for x in outputs], [], owners)

    lists = not (spec.deterministic or is_short(query, key, value))
    dk_sum = dv_sum = arguments["DK"]
    if lists:
        keys = batch * kv_heads * kv_len
        outputs.append(Output("sums", (keys * (head_dim + head_dim_v),), torch.float32, zero=True))
        dk_sum, dv_sum = Address("sums", 0, torch.float32), Address("sums", keys * head_dim * 4, torch.float32)
    arguments.update(
        DO=address(table, "DO"), O2=address(table, "O2"), DK_SUM=dk_sum, DV_SUM=dv_sum,
        **_saved_addresses(table["rows"].shape, list_entries(batch, heads, q_len), not spec.deterministic),
        DENSE=workspace.add(batch * heads * q_blocks if lists else 1, torch.int32),
        LISTS=lists, BK=config.block_k, BD=config.block_d, BN=config.block_n, **strides("do", grad_out),
    )  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    steps = [
        Step(backward_rows_kernel, (batch * heads * q_blocks, 1, 1), arguments, options),
        Step(backward_keys_kernel, (-(-kv_len // config.block_n), batch * kv_heads, 1), arguments, options),
    ]
    return Program(config, [*outputs, workspace.output()], steps, owners)


def _most(registers: int) -> dict[str, int]:
    """The compile option that bounds registers per thread; none for 0, and on AMD GPUs, whose compiler does not take it."""
    return {"maxnreg": registers} if registers and not torch.version.hip else {}


def _multiprocessors(device: torch.device) -> int:
    return device_info(device).multiprocessors if device.type == "cuda" else 2
