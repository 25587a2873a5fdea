"""What is compiled: a kernel with its template arguments, its source in one piece, and the shared memory it takes. Imports no cupy."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from adasplash_cupy.params import SOURCES

ROWS = 64
"""Query rows a block: those that share one list of keys."""
WARPS = 4
THREADS = 32 * WARPS
KEYS = 16 * WARPS
"""Keys a program of backward_keys, for at least COLUMNS columns of their gradients."""
COLUMNS = 64
SHORT_ROWS = 32
"""Query rows a program of forward_short."""

GRAD, ALIBI, DROPOUT, ALPHA_GRAD = 1, 2, 4, 8
ALL_FLAGS = GRAD | ALIBI | DROPOUT | ALPHA_GRAD
HEAD_DIMS = (16, 32, 64, 128, 256)
"""Head dims are padded to one of these."""
ELEMENTS = {"float16": "half_t", "bfloat16": "bf16_t", "float32": "float"}
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # configs are asked for what is not supported too
KERNELS = (
    "key_max",
    "forward_select",
    "forward_bound",
    "forward_mark",
    "forward_lists",
    "forward_dense",
    "forward_short",
    "backward_lists",
    "backward_rows",
    "backward_keys",
    "transform",
)


@dataclass(frozen=True, slots=True)
class Instance:
    """One kernel as it is compiled. ``key_max`` and ``transform`` depend on ``dtype`` alone."""

    kernel: str
    dtype: str
    head_dim: int = 16  # padded
    head_dim_v: int = 16
    alpha: int = 0  # 15, 20, or 0 where the device decides
    tile: int = 64  # keys at a time; backward_keys: query rows; forward_short: a warp's keys
    stages: int = 2  # tiles in flight
    flags: int = 0
    warpgroup: bool = False  # whether a block's four warps multiply together: written for Hopper alone
    programs: int = 0  # a multiprocessor, that registers must allow; 0: the kernel knows
    pairs: int = 0  # whether forward_dense's warpgroups look at two tiles at once: of equal head dims, in two stages or more

    @property
    def threads(self) -> int:
        """Threads a block."""
        return THREADS

    @property
    def architecture(self) -> str | None:
        """The only one whose instructions it is written in; None where any will do."""
        return "sm_90a" if self.warpgroup else None

    @property
    def elsewhere(self) -> Instance | None:
        """What does the same on any architecture, for an instance that is written for one; None where nothing does by itself."""
        return replace(self, warpgroup=False, pairs=0) if self.warpgroup else None

    @property
    def expression(self) -> str:
        """The name that NVRTC lowers."""
        element = ELEMENTS[self.dtype]
        if self.kernel in ("key_max", "transform"):
            return f"{self.kernel}<{element}>"
        more = [int(self.warpgroup), self.programs, self.pairs]
        while more and not more[-1]:
            more.pop()
        shape = (self.head_dim, self.head_dim_v, self.alpha, self.tile, self.stages, self.flags, *more)
        return f"{self.kernel}<Shape<{element}, {', '.join(map(str, shape))}>>"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; of ``transform`` without its cache."""
        size = ITEMSIZES[self.dtype]
        # Bytes between rows: panels of 64 columns have none, but start at multiples of 1024.
        gap, start, least = (0, 1024, 64) if self.warpgroup else (16, 0, 0)
        row_k, row_v = max(self.head_dim, least) * size + gap, max(self.head_dim_v, least) * size + gap
        if self.kernel == "key_max":
            return 0
        if self.kernel == "transform":
            return 3 * WARPS * 4
        if self.kernel == "backward_keys":
            return start + KEYS * (row_k + row_v) + self.stages * self.tile * (row_k + row_v + 8 * 4)
        if self.kernel == "forward_short":
            tiles = SHORT_ROWS * row_k + self.stages * 128 * max(row_k, row_v)
            return tiles + (64 * WARPS + 2 * self.tile + 32) * 4
        values = self.kernel not in ("forward_select", "forward_bound")
        tiles = (
            start + ROWS * row_k + self.stages * self.tile * (row_k + values * row_v) + ((self.stages + 3) * self.tile + 32) * 4
        )
        if self.kernel == "forward_select":
            return tiles + 4 * ROWS * 4
        if self.kernel == "backward_rows":
            return tiles + ROWS * row_v
        if self.kernel == "backward_lists":
            return tiles + ROWS * (row_v + 2 * (max(self.tile, least) * size + gap))
        return tiles


@dataclass(frozen=True, slots=True)
class MarkInstance(Instance):
    """``forward_mark``; ``stages`` are of 128 keys."""

    kernel: str = "forward_mark"
    dtype: str = "bfloat16"
    groups: int = 2  # of 128 queries, a warpgroup each
    programs: int = 1  # a multiprocessor
    ahead: int = 1  # 1: two products under way instead of one; 2: and groups take turns
    follow: int = 1
    split: int = 1  # warpgroups a group
    subtract: int = 0  # whether the tensor cores subtract thresholds

    @property
    def threads(self) -> int:
        return 128 * (1 + self.groups * self.split)

    @property
    def architecture(self) -> str | None:
        return "sm_90a"

    @property
    def expression(self) -> str:
        shape = (self.head_dim, self.groups, self.stages, self.programs, self.ahead, self.follow, self.split, self.subtract)
        return f"{self.kernel}<Marking<{ELEMENTS[self.dtype]}, {', '.join(map(str, shape))}>>"

    @property
    def shared_bytes(self) -> int:
        buffers, queries = 2 if self.head_dim <= 64 else 1, 128 * self.groups
        tiles = (buffers * self.groups + self.stages) * 128 * self.head_dim * 2
        barriers = (2 * buffers + 2 * self.stages + 2 + self.groups) * 8
        tiles += self.subtract * 128 * 128
        return 1024 + tiles + barriers + (4 * buffers + 1) * queries * 4 + 2 * (6 + 6 * self.groups) * 4


def padded(head_dim: int) -> int:
    """The smallest of HEAD_DIMS that holds it; beyond them, where nothing is compiled, the next power of two."""
    return max(HEAD_DIMS[0], 1 << (head_dim - 1).bit_length())


@cache
def source(kernel: str) -> str:
    """The text of ``src/<kernel>.cu`` with its headers in place: CuPy's cache on disk knows a program by its text alone."""
    return re.sub(r'^#include "(\w+\.cuh)"$', lambda found: _header(found[1]), _read(f"{kernel}.cu"), flags=re.M)


def _header(name: str) -> str:
    return _read(name).replace("#pragma once", "")


def _read(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")
