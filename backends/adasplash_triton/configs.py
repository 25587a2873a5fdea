"""Tunable parameters of the Triton kernels, and the heuristics that pick them when nothing was measured. Imports no triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from adasplash_core.backend import KernelConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec

LIST_ROWS = 64
"""Query rows that share one list of keys: fixed, because what the forward saves the backward must read with any config."""

MOST_REGISTERS = 255
"""Of a thread, on every NVIDIA GPU."""


Precision = Literal["ieee", "tf32"]
"""How float32 products are taken: exactly, or with operands rounded to TF32 for the tensor cores. Half precision knows "ieee" alone."""


@dataclass(frozen=True)
class ForwardConfig(KernelConfig):
    """Block sizes (keys a tile unless said), warps and stages of each pass, and when a list of keys is worth having."""

    select_blocks: int = 2  # blocks of LIST_ROWS rows per program of the dense pass
    select_keys: int = 64
    select_warps: int = 4
    select_stages: int = 3
    select_registers: int = 0  # most registers a thread; 0: as many as the compiler wants
    sample: int = 16  # the sampled pass reads every so many tiles
    sample_steps: int = 12  # most Newton steps over the sample, at least 1
    sample_worth: float = 2.5  # another step is taken while the rows' mean of sum p over the sample exceeds this
    follow_share: float = 0.03  # expected share of the keys in a list from which marking follows the running max
    list_percent: int = 85  # longer lists, in per cent of the range, are not made ...
    dense_percent: int = 50  # ... and not used once they have shrunk
    least_list: int = 1024  # lists up to this length always are
    sweeps: int = 4  # most passes that shorten a list before it is solved
    list_keys: int = 64
    list_keys_on_chip: int = 128  # longest list whose scores stay on chip
    list_warps: int = 4
    list_stages: int = 2
    list_registers: int = 0
    dense_keys: int = 64
    dense_warps: int = 4
    dense_stages: int = 3
    short_rows: int = 64  # query rows per program where whole rows of scores stay on chip
    short_warps: int = 8


@dataclass(frozen=True)
class BackwardConfig(KernelConfig):
    """The backward's block sizes (keys) and schedule."""

    block_k: int = 64  # gathered keys per tile
    block_d: int = 64  # keys per tile where all keys take part
    block_n: int = 64  # keys per program of the pass over key blocks
    num_warps: int = 4
    num_stages: int = 3


def short_length(head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """Key lengths up to this keep whole rows of scores on chip; 0: none. Independent of configs: forward and backward must agree.

    K and V of this length fit a small GPU's 99 KB beside the queries.
    """
    row = _padded(max(head_dim, head_dim_v)) * itemsize
    most = 512 if row <= 128 else 256 if row <= 256 else 0
    return most // 2 if itemsize == 4 else most


def _padded(head_dim: int) -> int:
    return 1 << (max(head_dim, 16) - 1).bit_length()


def is_small(device: DeviceInfo) -> bool:
    """Whether a block has less shared memory than on data-centre GPUs: 99 KB on compute capability 8.6, 8.9 and 12.0."""
    return 0 < device.shared_memory < 128 * 1024


def fits(spec: AttentionSpec, device: DeviceInfo) -> bool:
    """Whether some config runs: the widest float32 heads do not fit a small GPU, nor their backward 163 KB."""
    return _bytes_per_row(spec) <= 512 or not (is_small(device) or (spec.needs_grad and _too_large(172032, device)))


def precision_of(spec: AttentionSpec, device: DeviceInfo) -> Precision:
    """How a call's products are taken: in TF32 where its spec allows it and the backward's rows fit; beside Q and dO its products need
    copies in the layout that TF32's operands must have."""
    fits_tf32 = spec.tf32 and _padded(max(spec.head_dim, spec.head_dim_v)) <= (64 if is_small(device) else 128)
    return "tf32" if fits_tf32 else "ieee"


def _bytes_per_row(spec: AttentionSpec) -> int:
    """Shared memory of one row of the wider of K and V, padded to a power of two."""
    return _padded(max(spec.head_dim, spec.head_dim_v)) * _itemsize(spec)


def _before_hopper(device: DeviceInfo) -> bool:
    """Whether products are mma.sync's alone, whose operands take registers."""
    return device.capability is not None and device.capability < (9, 0)


def _has_tensor_memory(device: DeviceInfo) -> bool:
    """Whether products are tcgen05's, which run beside the program: compute capability 10 and 11."""
    return device.capability is not None and device.capability[0] in (10, 11)


def _too_large(shared_bytes: int, device: DeviceInfo) -> bool:
    """More shared memory than a block may have, where that is known."""
    return 0 < device.shared_memory < shared_bytes


def _itemsize(spec: AttentionSpec) -> int:
    return 4 if spec.dtype == "float32" else 2


def default_forward(spec: AttentionSpec, device: DeviceInfo) -> ForwardConfig:
    """Large tiles where shared memory and registers allow, smaller for wide heads, float32 and small GPUs."""
    row = _bytes_per_row(spec)
    if row <= 128:
        config = ForwardConfig()
        if (spec.batch or 1) * spec.heads * (spec.q_len or 0) >= 4096 * LIST_ROWS:  # enough blocks to run three at a time
            config = replace(config, list_registers=168)
    elif row <= 256:
        config = ForwardConfig(list_keys_on_chip=64, dense_stages=2)
    elif row <= 512:
        config = ForwardConfig(
            select_blocks=1, select_keys=64, select_warps=8, select_stages=2,
            list_keys=32, list_keys_on_chip=32, list_warps=8, list_stages=1,
            dense_keys=32, dense_warps=8, dense_stages=1,
        )  # fmt: skip
    else:
        config = ForwardConfig(
            select_blocks=1, select_keys=16, select_warps=16, select_stages=1,
            list_keys=16, list_keys_on_chip=16, list_warps=8, list_stages=1,
            dense_keys=16, dense_warps=8, dense_stages=1,
        )  # fmt: skip
    if precision_of(spec, device) == "tf32":
        config = replace(config, select_warps=8, list_warps=8, dense_warps=8, dense_keys=64 if row <= 128 else 32)
        if _before_hopper(device):
            config = replace(config, list_keys=32, list_keys_on_chip=min(config.list_keys_on_chip, 64), dense_keys=32)
    elif _itemsize(spec) == 4 and row <= 512:  # a product without tensor cores is unrolled: larger tiles spill
        keys = 32 if row <= 256 else 16
        config = replace(
            config, select_blocks=1, select_keys=32, select_warps=8,
            list_keys=keys, list_keys_on_chip=keys, list_warps=8, dense_keys=keys, dense_warps=8,
        )  # fmt: skip
    if _before_hopper(device) and config.select_blocks > 1:
        config = replace(config, select_blocks=1)  # accumulators of 64 x 128 spill with mma.sync's layout
    if device.capability is not None and device.capability >= (10, 0):
        config = replace(config, list_warps=8)  # fewer would park 3 KB a thread there; not measured
    if is_small(device):
        config = replace(config, select_stages=max(1, config.select_stages - 1), list_stages=1, dense_stages=1)
    return config


def default_backward(spec: AttentionSpec, device: DeviceInfo) -> BackwardConfig:
    """As :func:`default_forward`."""
    row = _bytes_per_row(spec)
    if row <= 128:
        config = BackwardConfig()
    elif row <= 256:
        config = BackwardConfig(block_k=32, block_d=32, block_n=32)
    elif row <= 512:
        config = BackwardConfig(block_d=32, block_n=32, num_stages=1, num_warps=8)
    else:
        config = BackwardConfig(block_k=16, block_d=16, block_n=16, num_stages=1, num_warps=8)
    if precision_of(spec, device) == "tf32":
        tight = (row > 256 and _before_hopper(device)) or (row > 128 and is_small(device))
        keys = 16 if tight else config.block_d
        config = replace(config, block_k=keys, block_d=keys)
    elif _itemsize(spec) == 4 and 128 < row <= 512:
        keys = 64 if row <= 256 else 16
        config = BackwardConfig(block_k=keys, block_d=keys, block_n=keys, num_stages=1, num_warps=8)
    if is_small(device):
        config = replace(config, num_stages=1)
        if row >= 512:
            config = replace(config, block_k=16, block_d=16, block_n=16)
    return config


def forward_space(spec: AttentionSpec, device: DeviceInfo) -> Iterator[ForwardConfig]:
    """Candidates around the default, one or two fields away."""
    base = default_forward(spec, device)
    if 0 < (spec.kv_len or 0) <= short_length(spec.head_dim, spec.head_dim_v, _itemsize(spec)):
        for rows in (16, 32, 64, 128):
            for warps in (4, 8, 16):
                yield replace(base, short_rows=rows, short_warps=warps)
        return
    for blocks, keys, warps in ((1, 64, 4), (1, 128, 4), (2, 64, 4), (2, 128, 8)):
        for stages in (2, 3, 4):
            if _too_large((LIST_ROWS * blocks + keys * stages) * _bytes_per_row(spec), device):
                continue
            for registers in (0, 168):
                yield replace(
                    base,
                    select_blocks=blocks,
                    select_keys=keys,
                    select_warps=warps,
                    select_stages=stages,
                    select_registers=registers,
                )
    for sample in (8, 16, 32):
        for worth in (1.5, 2.5, 4.0):
            yield replace(base, sample=sample, sample_worth=worth)
    for share in (0.1, 0.5):
        yield replace(base, follow_share=share)
    for keys in (32, 64):
        for registers in (0, 168):
            for sweeps in (1, 2, 4):
                yield replace(base, list_keys=keys, list_registers=registers, sweeps=sweeps)
    for stages in (2, 3):
        if _too_large((LIST_ROWS + stages * base.list_keys + base.list_keys // 2) * _bytes_per_row(spec), device):
            continue
        for on_chip in (64, 128):
            yield replace(base, list_keys_on_chip=on_chip, list_stages=stages)
    for keys in (32, 64, 128):
        for warps in (4, 8):
            yield replace(base, dense_keys=keys, dense_warps=warps)


def backward_space(spec: AttentionSpec, device: DeviceInfo) -> Iterator[BackwardConfig]:
    """Candidates around the default."""
    base = default_backward(spec, device)
    tiles = [
        replace(base, block_k=block_k, num_stages=stages, num_warps=warps)
        for block_k in (16, 32, 64)
        for stages in (1, 2, 3)
        for warps in (4, 8)
    ]
    sizes = (32, 64, 128) if _bytes_per_row(spec) <= 512 else (16, 32)
    tiles += [replace(base, block_d=block_d, block_n=block_n) for block_d in sizes for block_n in sizes]
    for config in tiles:
        if _backward_registers(config, spec) < MOST_REGISTERS and not _too_large(
            _backward_shared(config, spec, device), device
        ):
            yield config


def _backward_registers(config: BackwardConfig, spec: AttentionSpec) -> int:
    """Registers a thread that the sums ds K and u K of a block of rows take, which live as long as it does.

    Two of 64 x 256 in float32 over 4 warps leave none: on Hopper such candidates spill twice what 8 warps do, and on Blackwell the
    assembler gives up.
    """
    return 2 * LIST_ROWS * _padded(spec.head_dim) // (32 * config.num_warps)


def _backward_shared(config: BackwardConfig, spec: AttentionSpec, device: DeviceInfo) -> int:
    """Bytes of shared memory of the larger of the backward's kernels: two blocks of its own, tiles of two matrices for each load ahead,
    and what products take. Counted in rows of K's width; fitted to what Triton asks for."""
    row = _bytes_per_row(spec)
    ahead = max(config.num_stages - 1, 1)
    lists = 2 * LIST_ROWS + (2 * config.num_stages + 3) * config.block_k
    rows = 2 * LIST_ROWS + (2 * ahead + 1 / 2) * config.block_d
    keys = (2 + 1 / 4) * config.block_n + (2 * ahead + 1 / 8) * LIST_ROWS
    barriers = 0
    if config.num_stages > 1 and _has_tensor_memory(device) and _itemsize(spec) == 2:
        # Products run beside the program and read shared memory meanwhile: tiles are held a step longer, and one more for ds and u.
        barriers = 3 * 1024
        rows = 2 * LIST_ROWS + (2 * config.num_stages + 1) * config.block_d
        if config.block_n >= 64:  # as many rows as these products have at least; for fewer the older ones are taken
            staged = 2 * LIST_ROWS * config.block_n * 2 / row
            keys = 2 * config.block_n + 2 * config.num_stages * LIST_ROWS + staged
    return int(max(lists, rows, keys) * row) + barriers
