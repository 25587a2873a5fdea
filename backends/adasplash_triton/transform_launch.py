"""Shapes, tiles and launches of the entmax transform's kernels. Sizes alone decide what is launched: no host sync, static shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from adasplash_core.backend import KernelConfig
from adasplash_core.programs import Programs
from adasplash_triton.kernels.transform_long import (
    transform_long_backward_kernel,
    transform_scan_kernel,
    transform_scatter_kernel,
    transform_solve_kernel,
    transform_sums_kernel,
)
from adasplash_triton.kernels.transform_rows import transform_rows_backward_kernel, transform_rows_kernel
from adasplash_triton.program import Output, Program, Step, Table, Workspace
from adasplash_triton.runner import Address

MOST_ON_CHIP = 16384
"""Longest row that one program keeps in registers where alpha is known to be 1.5 or 2, with 32 entries a thread. The backward and
other alphas have more to keep an entry, and take 16 and 8."""
CHUNK = 4096
"""Entries per program of longer rows, and how many of them it may list; see kernels/transform_long.py."""
LISTED = 512
_STRIDED_ROWS = 16
"""Rows that a program takes at least where a row's entries are not neighbours in memory, but those of several rows are."""
_ALPHAS = {"1.5": 15, "2": 20}
_TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-5, torch.bfloat16: 3e-5}


class Tile(NamedTuple):
    """Rows and entries (powers of two) of a program, and its warps."""

    rows: int
    entries: int
    warps: int


def tile_of(n: int, near: bool, per_thread: int) -> Tile:
    """About ``per_thread`` entries a thread. One warp as long as that is enough: its reductions need no barrier."""
    entries = 1 << (n - 1).bit_length()
    rows = max(1, 32 * per_thread // entries)
    if not near:
        rows = max(rows, _STRIDED_ROWS)
    return Tile(rows, entries, max(1, min(16, rows * entries // (32 * per_thread))))


class Rows(NamedTuple):
    """Tensors of one shape (..., n) seen as rows that count through two dimensions (outer, inner)."""

    number: int
    inner: int
    strides: tuple[tuple[int, int, int], ...]  # of each tensor: outer, inner, step

    @classmethod
    def of(cls, *tensors: torch.Tensor) -> Rows | None:
        """None where more than two dimensions would be needed."""
        shape = tensors[0].shape[:-1]
        dims: list[tuple[int, tuple[int, ...]]] = []
        for i, size in enumerate(shape):
            if size == 1:
                continue
            strides = tuple(x.stride(i) for x in tensors)
            if dims and all(before == here * size for before, here in zip(dims[-1][1], strides, strict=True)):
                dims[-1] = (dims[-1][0] * size, strides)
            else:
                dims.append((size, strides))
        if len(dims) > 2:
            return None
        none = (0,) * len(tensors)
        while len(dims) < 2:
            dims.insert(0, (1, none))
        (outer, outer_strides), (inner, inner_strides) = dims
        steps = (1 if x.shape[-1] == 1 else x.stride(-1) for x in tensors)
        return cls(outer * inner, inner, tuple(zip(outer_strides, inner_strides, steps, strict=True)))

    @property
    def near(self) -> bool:
        """Whether each row's entries are neighbours in memory."""
        return all(step == 1 for *_, step in self.strides)

    def arguments(self, *names: str) -> dict[str, int]:
        found = {"inner": self.inner}
        for name, (outer, inner, step) in zip(names, self.strides, strict=True):
            found |= {f"{name}_outer": outer, f"{name}_inner": inner, f"{name}_step": step}
        return found

    def suits(self, n: int, longest: int) -> bool:
        """Whether the kernels take these strides: distant entries only in rows that, several at a time, stay on chip."""
        return self.near or n <= longest // _STRIDED_ROWS


_programs = Programs[Program]()


def forward(x: torch.Tensor, alpha: torch.Tensor, alpha_class: str) -> torch.Tensor:
    """alpha-entmax of ``x`` (..., n) over its last dimension, in its dtype and, where that suits the kernels, its layout.

    ``alpha`` as in :meth:`AttentionBackend.transform_forward`. Computed in float32.
    """
    p = torch.empty_like(x)
    if x.numel() == 0:
        return p
    alpha = _alpha_of_rows(alpha, alpha_class, x)
    table = {"X": x, "P": p, "A": alpha}
    key = ("forward", alpha_class, *_static(table))
    program = _programs.find(key)
    if program is None:
        program = forward_program(table, alpha_class)
        if program is None:
            return forward(x.contiguous(), alpha.view(*x.shape[:-1], 1) if alpha.ndim else alpha, alpha_class)
        program(table, x.device)
        _programs.keep(key, program)  # one whose kernels do not run is not kept
    else:
        program(table, x.device)
    return p


def forward_program(table: Table, alpha_class: str) -> Program | None:
    """The launches for tensors X and P (..., n) and A, () or one a row; None where X must be copied to contiguous memory first."""
    x, constants = table["X"], _alpha_constants(table["A"], alpha_class)
    n = x.shape[-1]
    per_thread = 32 if constants["ALPHA"] >= 15 else 8
    longest = MOST_ON_CHIP * per_thread // 32
    rows = Rows.of(x, table["P"])
    if rows is None or not rows.suits(n, longest):
        return None
    constants["TOLERANCE"] = _TOLERANCE[x.dtype]
    arguments = {"n": n, **rows.arguments("x", "p"), **_addresses(table), **constants}
    if n > longest:
        return _long_forward_program(rows, x, arguments)
    tile = tile_of(n, rows.near, per_thread)
    group = _group(rows, x) if tile.entries >= 256 else 1
    arguments |= {"row_count": rows.number, "NEAR": rows.near, "R": tile.rows, "N": tile.entries, "GROUP": group}
    return Program(KernelConfig(), (), [_step(transform_rows_kernel, -(-rows.number // tile.rows), arguments, tile.warps)])


def _group(rows: Rows, x: torch.Tensor) -> int:
    """Of how many entries the first steps see the largest: those that a thread loads at once, or else 8 distant ones."""
    aligned = rows.near and x.shape[-1] % 16 == 0 and all(stride % 16 == 0 for stride in rows.strides[0][:2])
    return 16 // x.element_size() if aligned else -8


def _long_forward_program(rows: Rows, x: torch.Tensor, arguments: dict[str, Any]) -> Program:
    chunks = -(-x.shape[-1] // CHUNK)
    items = rows.number * chunks
    space = Workspace()
    reals = {"SCORES": items * LISTED, "TOPS": items, "LOWS": items, "C": rows.number, "M": rows.number}
    arguments |= {name: space.add(size, torch.float32) for name, size in reals.items()}
    arguments |= {name: space.add(size, torch.int32) for name, size in {"PLACES": items * LISTED, "COUNTS": items}.items()}
    tile = min(2048, CHUNK)
    across = min(64, 1 << (chunks - 1).bit_length())
    arguments |= {"chunks": chunks, "N": CHUNK, "GROUP": _group(rows, x), "LISTED": LISTED, "B": tile}
    arguments["ENTRIES"] = max(tile // across, 1)
    steps = [
        _step(transform_scan_kernel, items, arguments, 8),
        _step(transform_solve_kernel, rows.number, arguments, 8),
        _step(transform_scatter_kernel, items, arguments, 4),
    ]
    return Program(KernelConfig(), [space.output()], steps)


def backward(
    p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, alpha_class: str, alpha_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient to the scores, like ``p``, and, if asked for, every row's part of the gradient to alpha: float32 (..., 1)."""
    dx = torch.empty_like(p)
    shape = (*p.shape[:-1], 1)
    if p.numel() == 0:
        return dx, torch.zeros(shape, device=p.device) if alpha_grad else None
    alpha = _alpha_of_rows(alpha, alpha_class, p)
    table = {"P": p, "G": grad, "A": alpha, "DX": dx}
    key = ("backward", alpha_class, alpha_grad, *_static(table))
    program = _programs.find(key)
    if program is None:
        program = backward_program(table, alpha_class, alpha_grad)
        if program is None:
            wide = alpha.view(shape) if alpha.ndim else alpha
            return backward(p.contiguous(), grad.contiguous(), wide, alpha_class, alpha_grad)
        program(table, p.device)
        _programs.keep(key, program)
    else:
        program(table, p.device)
    if not alpha_grad:
        return dx, None
    return dx, (_alpha_gradient(table, alpha) if "ALPHA_SUMS" in table else table["DALPHA"]).view(shape)


def backward_program(table: Table, alpha_class: str, alpha_grad: bool) -> Program | None:
    """As :func:`forward_program`, for P, G and DX (..., n) and A; makes DALPHA, or SUMS and ALPHA_SUMS, if ``alpha_grad``."""
    p, n = table["P"], table["P"].shape[-1]
    longest = MOST_ON_CHIP // 2
    rows = Rows.of(p, table["G"], table["DX"])
    if rows is None or not rows.suits(n, longest):
        return None
    constants = _alpha_constants(table["A"], alpha_class) | {"ALPHA_GRAD": alpha_grad}
    arguments = {"n": n, **rows.arguments("p", "g", "dx"), **_addresses(table), **constants}
    if n > longest:
        chunks = -(-n // CHUNK)
        items = rows.number * chunks
        outputs = [Output("SUMS", (rows.number, chunks, 2), torch.float32)]
        if alpha_grad:
            outputs.append(Output("ALPHA_SUMS", (rows.number, chunks, 5), torch.float32))
        arguments |= {"SUMS": Address("SUMS", 0, torch.float32), "ALPHA_SUMS": Address(outputs[-1].role, 0, torch.float32)}
        arguments |= {"chunks": chunks, "N": CHUNK}
        steps = [_step(kernel, items, arguments, 8) for kernel in (transform_sums_kernel, transform_long_backward_kernel)]
        return Program(KernelConfig(), outputs, steps)
    tile = tile_of(n, rows.near, 16)
    outputs = [Output("DALPHA", (rows.number,), torch.float32)] if alpha_grad else []
    arguments["DALPHA"] = Address("DALPHA", 0, torch.float32) if alpha_grad else arguments["DX"]
    arguments |= {"row_count": rows.number, "NEAR": rows.near, "R": tile.rows, "N": tile.entries}
    step = _step(transform_rows_backward_kernel, -(-rows.number // tile.rows), arguments, tile.warps)
    return Program(KernelConfig(), outputs, [step])


def _alpha_gradient(table: Table, alpha: torch.Tensor) -> torch.Tensor:
    """Each row's part from its chunks' sums; see alpha_gradient in kernels/transform_rows.py."""
    gpk, pk, gp, gpl, pl = table["ALPHA_SUMS"].sum(1).unbind(-1)
    s = table["SUMS"][..., 0].sum(1)
    h = (alpha.clamp(1, 2) - 1).float()
    return -(gpk - pk * gp + h * (pk * gpl - pl * gpk)) / torch.where(s > 0, s, 1)


def _alpha_of_rows(alpha: torch.Tensor, alpha_class: str, x: torch.Tensor) -> torch.Tensor:
    """alpha as the kernels read it: (), or one a row."""
    if alpha.ndim == 0:
        return alpha
    if alpha_class in _ALPHAS or alpha.numel() == 1:
        return alpha.reshape(-1)[0]
    return alpha.expand(*x.shape[:-1], 1).reshape(-1)


def _alpha_constants(alpha: torch.Tensor, alpha_class: str) -> dict[str, Any]:
    if alpha.ndim:
        return {"ALPHA": 0, "PER_ROW": True}
    return {"ALPHA": _ALPHAS.get(alpha_class, 1), "PER_ROW": False}


def _static(table: Table) -> list[Any]:
    """All of a table that decides what is launched: forms, places in memory modulo what vector loads want, and this module's sizes."""
    found: list[Any] = [MOST_ON_CHIP, CHUNK, LISTED]
    for x in table.values():
        found += (x.shape, x.stride(), x.dtype, x.data_ptr() & 15)
    found.append(x.device)
    return found


def _addresses(table: Table) -> dict[str, Address]:
    return {role: Address(role, 0, x.dtype) for role, x in table.items()}


def _step(kernel: Any, programs: int, arguments: dict[str, Any], warps: int) -> Step:
    # No fused multiply-adds: with one entry a thread, u * u fused into the sum across threads is rounded differently in each of them,
    # so that threads of a row can leave the solver's loop at different steps. With them, wrong rows were seen once on an H100.
    return Step(kernel, (programs, 1, 1), arguments, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False})
