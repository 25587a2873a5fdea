"""Forward, backward and transform as the core calls them, and the programs behind them: workspace, grids and order of the kernels.

A call gathers the caller's tensors into a table by role and describes itself: shapes, strides, dtypes, numbers, spec and config. The
description finds a program, or it is built here. So what depends on sizes and features is computed once, and a call that was described
before costs a look-up, a few allocations and the launches (:mod:`adasplash_cupy.runner`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients, KernelConfig
from adasplash_core.device import device_info
from adasplash_core.errors import AdasplashWarning, ConfigRejectedError
from adasplash_core.programs import Programs, describe
from adasplash_cupy.binaries import ArchitectureError
from adasplash_cupy.configs import (
    BackwardConfig,
    ForwardConfig,
    backward_instances,
    forward_instances,
    short_instance,
    short_tile,
    uses_lists,
)
from adasplash_cupy.driver import DriverError
from adasplash_cupy.instances import COLUMNS, KEYS, ROWS, SHORT_ROWS, Instance
from adasplash_cupy.nvrtc import CompileError
from adasplash_cupy.operands import Values, add_output, converted, inputs_of, shared_values
from adasplash_cupy.program import Address, Output, Program, Step, Table, Workspace, Zeroed
from adasplash_cupy.runner import prepare
from adasplash_cupy.tensor_maps import TensorMap, encode, reason_against, tensor_map

_KEYS_A_BLOCK = 128  # of key_max.cu
_COUNTERS = 6  # of params.cuh
_MOST_ENTRIES = 2**31 - 1  # positions in the pools are int32
_CACHED_KEYS = 16 * 2**20  # bytes of K that stay in the L2 cache while forward_mark reads them time and again
_CACHED_BYTES = 48 * 1024  # scores of a row that the transform keeps in shared memory
_SAVED = ("o2", "m", "c", "blocks", "pool")

_forwards, _backwards, _transforms = Programs[Program](), Programs[Program](), Programs[Program]()


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
    """Launch the forward; the kernels' files say what each pass does.

    Raises
    ------
    ConfigRejectedError: where a kernel does not compile or asks for more than the device has.
    """
    table = inputs_of(call)
    _run(_forwards, _forward_program, call, table)
    saved = [table[role] for role in _SAVED] if call.spec.needs_grad else []
    return ForwardResult(table["out"], saved, table.get("tau"), table.get("support"))


def backward(call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor]) -> Gradients:
    """Launch the backward: blocks of rows with lists (dQ, and their part of dK and dV), those without (dQ), and blocks of keys (the
    rest of dK and dV).

    Raises
    ------
    ConfigRejectedError: as :func:`forward`.
    """
    table = inputs_of(call)
    table["d_out"] = grad_out
    table["o2"], table["m"], table["c"], table["blocks"], table["pool"] = saved
    _run(_backwards, _backward_program, call, table)
    d_alpha = None
    if call.spec.alpha_requires_grad:
        parts = table["d_alpha"]
        d_alpha = (parts.sum() if call.alpha.ndim == 0 else parts.sum((0, 2))).to(call.alpha.dtype)
    return Gradients(table["d_q"], table["d_k"], table["d_v"], d_alpha)


def transform_forward(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha-entmax of ``x`` (..., n) over its last dimension, in its dtype; ``alpha`` () or broadcastable, size 1 in the last."""
    n = x.shape[-1]
    rows = x.reshape(-1, n) if x.numel() else x.new_empty(0, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    alphas = alpha.to(torch.float64)
    if alpha.numel() > 1:
        alphas = alphas.expand(*x.shape[:-1], 1).contiguous()
    table = {"q": rows, "alpha": alphas}
    key = (x.shape, rows.stride(), x.dtype, x.get_device(), alpha.numel() > 1)
    program = _transforms.find(key)
    if program is not None:
        _launch(program, table, x.device, None)
    else:
        program = _transform_program(x, rows, alpha.numel() > 1)
        _launch(program, table, x.device, None)
        _transforms.keep(key, program)
    return table["out"]


def _run(programs: Programs[Program], build: Callable[..., Program], call: AttentionCall, table: Table) -> None:
    key = describe(call, table)
    program = programs.find(key)
    if program is not None:
        _launch(program, table, call.query.device, call.config)
        return
    inputs, refused = dict(table), frozenset[Instance]()
    program = None
    while program is None:
        program = build(call, dict(inputs), refused)
        try:
            _launch(program, table, call.query.device, call.config)
        except ArchitectureError as error:
            if error.instances <= refused:
                raise ConfigRejectedError("cupy", call.config, str(error)) from error
            warnings.warn(f"NVRTC does not compile Hopper's kernel, a slower one runs instead: {error}", AdasplashWarning, 2)
            program, refused = None, refused | error.instances
            table.clear()
            table.update(inputs)
    programs.keep(key, program)  # one whose kernels do not run is not kept


def _admitted(instances: dict[str, Instance], refused: frozenset[Instance]) -> dict[str, Instance]:
    """Without those that NVRTC refuses; in their place what does the same elsewhere, if something does."""
    found = {name: instance.elsewhere if instance in refused else instance for name, instance in instances.items()}
    return {name: instance for name, instance in found.items() if instance is not None}


def _launch(program: Program, table: Table, device: torch.device, config: KernelConfig | None) -> None:
    try:
        program(table, device, prepare)
    except ArchitectureError:
        raise
    except CompileError as error:
        raise ConfigRejectedError("cupy", config, str(error)) from error
    except DriverError as error:
        if not error.rejects:
            raise
        raise ConfigRejectedError("cupy", config, str(error)) from error


# -- forward ----------------------------------------------------------------------------------------------------------------------


def _forward_program(call: AttentionCall, table: Table, refused: frozenset[Instance] = frozenset()) -> Program:
    """The forward of calls that are described like this one. ``refused``: by NVRTC, among those written for one architecture."""
    config, spec = call.config, call.spec
    assert isinstance(config, ForwardConfig)
    conversions = converted(table)
    query, key, value = table["q"], table["k"], table["v"]
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, head_dim_v = key.shape[1], value.shape[2], value.shape[3]
    values = shared_values(call, table)
    outputs = [add_output(values, Output.like("out", call.query, head_dim_v))]
    if spec.needs_grad:
        shapes = saved_shapes(
            (batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v), query.element_size(), not spec.deterministic
        )
        dtypes = (query.dtype, torch.float32, torch.float32, torch.int32, torch.int32)
        saved = [Output.contiguous(*given) for given in zip(_SAVED, shapes, dtypes, strict=True)]
        outputs += saved
        keeps_lists = not spec.deterministic and uses_lists(spec, kv_len)
        for output in saved if keeps_lists else saved[:3]:
            add_output(values, output)
        if keeps_lists:
            values["pool_size"] = min(shapes[4][0], _MOST_ENTRIES)
    if spec.return_stats:
        for role, dtype in (("tau", torch.float32), ("support", torch.int32)):
            outputs.append(add_output(values, Output.contiguous(role, (batch, heads, q_len), dtype)))
    owners = (spec, config)
    if 0 in (batch, heads, q_len, kv_len, head_dim_v):
        return Program(outputs, owners=owners)

    tile = short_tile(spec, kv_len)
    if tile:
        blocks = batch * heads * -(-q_len // SHORT_ROWS)
        return Program(outputs, [Step(short_instance(spec, config, tile), (blocks,))], values, None, conversions, owners)
    head_bytes = kv_len * (head_dim + head_dim_v) * key.element_size()
    together = max(1, config.turn_mib * 2**20 // head_bytes * (heads // kv_heads))
    values["heads_in_turn"] = min(together, batch * heads)
    instances = _admitted(forward_instances(spec, config), refused)
    steps: list[Step] = []
    zeroed = None
    if uses_lists(spec, kv_len):
        workspace = Workspace()
        steps, zeroed = _select(config, table, values, instances, workspace, head_dim_v)
        outputs.append(workspace.output())
    steps.append(Step(instances["forward_dense"], (batch * heads * -(-q_len // ROWS),)))
    return Program(outputs, steps, values, zeroed, conversions, owners)


def _select(
    config: ForwardConfig,
    table: Table,
    values: Values,
    instances: dict[str, Instance],
    workspace: Workspace,
    head_dim_v: int,
) -> tuple[list[Step], Zeroed]:
    """Lists of keys for blocks of rows, then the rows that have one."""
    query, key, device = table["q"], table["k"], table["q"].device
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    # Workspace in proportion to the inputs and the output: a block whose list finds the pool full is computed over all keys.
    items = batch * heads * -(-q_len // ROWS)
    elements = (batch * heads * q_len + batch * kv_heads * kv_len) * (head_dim + head_dim_v)
    io_bytes = elements * query.element_size()
    hit_words = (-(-kv_len // 128) + 1) * 8
    multiprocessors = device_info(device).multiprocessors if device.type == "cuda" else 1
    maps = _maps(query, key) if "forward_mark" in instances else None
    if maps:
        programs = min(batch * heads * -(-q_len // (128 * config.mark_groups)), multiprocessors * config.mark_programs)
        words = programs * 2 * config.mark_groups * hit_words * 2  # of two items, and u32
    else:
        programs = min(items, multiprocessors * config.select_programs)
        words = programs * hit_words
    lists = min(io_bytes * 3 // 16 + 1024, _MOST_ENTRIES)
    counted = 2 * _COUNTERS + batch * kv_heads
    counters = workspace.add(4 * counted)
    values.update(
        counters=counters,
        key_max=Address(counters.role, counters.offset + 8 * _COUNTERS),
        t=workspace.add(4 * batch * heads * q_len),
        margin=workspace.add(4 * batch * heads * q_len),
        hits=workspace.add(2 * words),
        entries=workspace.add(8 * items),
        queue=workspace.add(4 * items),
        lists=workspace.add(4 * lists),
        hit_words=hit_words,
        lists_size=lists,
        sample=config.mark_sample if maps else config.sample,
        heads_together=max(1, _CACHED_KEYS // (kv_len * head_dim * key.element_size())) * (heads // kv_heads),
        sample_steps=config.sample_steps,
        sample_worth=config.mark_worth if maps else config.sample_worth,
        list_percent=config.list_percent,
        dense_percent=config.dense_percent,
        least_list=config.least_list,
    )
    steps = [Step(instances["key_max"], (-(-kv_len // _KEYS_A_BLOCK) * batch * kv_heads,))]
    if maps:
        steps.append(Step(instances["forward_bound"], (items,)))
        steps.append(Step(instances["forward_mark"], (programs,), maps=maps))
    else:
        steps.append(Step(instances["forward_select"], (programs,)))
    steps.append(Step(instances["forward_lists"], (items,)))
    return steps, Zeroed(counters, counted)


def _maps(query: torch.Tensor, key: torch.Tensor) -> tuple[tuple[str, TensorMap], ...] | None:
    """Of Q and K; None where the copy engine cannot read them, or the driver does not know of it."""
    maps = [(role, found) for role, x in (("q", query), ("k", key)) if (found := tensor_map(x)) is not None]
    if len(maps) < 2:
        return None
    if query.device.type == "cuda":
        if reason_against() is not None:
            return None
        try:
            for _, of in maps:
                encode(of, query.get_device())  # asks the driver once
        except RuntimeError as error:
            warnings.warn(f"Hopper's kernel does not take this call, a slower one runs instead: {error}", AdasplashWarning, 2)
            return None
    return tuple(maps)


# -- backward and transform -------------------------------------------------------------------------------------------------------


def _backward_program(call: AttentionCall, table: Table, refused: frozenset[Instance] = frozenset()) -> Program:
    """As :func:`_forward_program`."""
    config, spec = call.config, call.spec
    assert isinstance(config, BackwardConfig)
    conversions = converted(table)
    query, key, value = table["q"], table["k"], table["v"]
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len, head_dim_v = key.shape[1], value.shape[2], value.shape[3]
    blocks, workspace, zeroed = -(-q_len // ROWS), Workspace(), None
    values = shared_values(call, table)
    likes = (("d_q", call.query), ("d_k", call.key), ("d_v", call.value))
    outputs = [add_output(values, Output.like(role, x)) for role, x in likes]
    if spec.alpha_requires_grad:
        outputs.append(add_output(values, Output.contiguous("d_alpha", (batch, heads, blocks), torch.float32)))
    owners = (spec, config)
    if 0 in (batch, heads, q_len, kv_heads, kv_len, head_dim, head_dim_v):
        return Program(outputs, owners=owners)

    if not spec.deterministic and uses_lists(spec, kv_len):
        keys = batch * kv_heads * kv_len
        sums = workspace.add(4 * keys * (head_dim + head_dim_v))
        values.update(dk_sum=sums, dv_sum=Address(sums.role, sums.offset + 4 * keys * head_dim))
        zeroed = Zeroed(sums, keys * (head_dim + head_dim_v))
    else:
        values.update(blocks=0, pool=0)
    values["delta"] = workspace.add(4 * batch * heads * q_len)
    group = heads // kv_heads
    # A query head's share of K and V, or its Q and dO.
    head_bytes = max(q_len, -(-kv_len // group)) * (head_dim + head_dim_v) * query.element_size()
    values["heads_in_turn"] = min(max(1, config.turn_mib * 2**20 // (head_bytes * group)) * group, batch * heads)
    outputs.append(workspace.output())
    instances = _admitted(backward_instances(spec, config), refused)
    chunks = -(-max(head_dim, head_dim_v) // COLUMNS)
    lists = [Step(instances["backward_lists"], (batch * heads * blocks,))] if zeroed is not None else []
    steps = [
        *lists,
        Step(instances["backward_rows"], (batch * heads * blocks,)),
        Step(instances["backward_keys"], (-(-kv_len // KEYS) * batch * kv_heads, chunks)),
    ]
    return Program(outputs, steps, values, zeroed, conversions, owners)


def _transform_program(x: torch.Tensor, rows: torch.Tensor, alpha_per_row: bool) -> Program:
    out = Output.contiguous("out", tuple(x.shape), x.dtype)
    if x.numel() == 0:
        return Program([out])
    count, n = rows.shape
    cached = n * 4 <= _CACHED_BYTES - 1024
    values: Values = {
        "q": Address("q"),
        "out": Address("out"),
        "alpha": Address("alpha"),
        "alpha_head": int(alpha_per_row),
        "q_row": rows.stride(0),
        "out_row": n,
        "kv_len": n,
        "lists_size": count,
        "left": int(cached),
    }
    across = min(count, 2**16)
    instance = Instance("transform", str(x.dtype).removeprefix("torch."))
    return Program([out], [Step(instance, (across, -(-count // across)), n * 4 if cached else 0)], values)
