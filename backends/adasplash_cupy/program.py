"""A pass as a list of launches: built once for each static description of a call, run with the addresses of each call's tensors.

A :class:`Program` holds what does not change between calls that differ in their tensors' values and places alone: which tensors to
allocate, the fields of ``Params``, and each launch's instance and grid. In place of a pointer stands an :class:`Address`: the role of a
tensor ("q", "out", "workspace", ...) and a place in it. A call makes a table from roles to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from adasplash_cupy.instances import Instance
from adasplash_cupy.tensor_maps import TensorMap

Table = dict[str, torch.Tensor]
"""The tensors of one call by role; its order is part of what a program is found by."""

ALIGNMENT = 256
"""Bytes to which every place in the workspace is rounded up."""


class Address(NamedTuple):
    """A pointer that each call fills in: ``offset`` bytes into the tensor of this role."""

    role: str
    offset: int = 0


class Output(NamedTuple):
    """A tensor that the program allocates."""

    role: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def contiguous(cls, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Output:
        return cls(role, shape, torch.empty(shape, device="meta").stride(), dtype)

    @classmethod
    def like(cls, role: str, x: torch.Tensor, last: int | None = None) -> Output:
        """(B, H, L, ``last`` or E) in the memory order of ``x``, as ``adasplash_core.layout.empty_like`` decides it."""
        batch, heads, length, size = x.shape
        size = size if last is None else last
        head, row = (1, heads) if x.stride(1) < x.stride(2) else (length, 1)
        return cls(role, (batch, heads, length, size), (heads * length * size, head * size, row * size, 1), x.dtype)


@dataclass
class Workspace:
    """One allocation for all scratch of a pass: ``workspace.add(bytes)`` is the address of a new piece."""

    size: int = 0

    def add(self, size: int) -> Address:
        at = self.size
        self.size += -(-size // ALIGNMENT) * ALIGNMENT
        return Address("workspace", at)

    def output(self) -> Output:
        return Output("workspace", (self.size,), (1,), torch.uint8)


class Zeroed(NamedTuple):
    """What must be 0 before the first launch: ``words`` of 4 bytes."""

    address: Address
    words: int


class Step(NamedTuple):
    """One launch. ``maps``: the tensor maps that the kernel takes, by the role whose address each call puts in."""

    instance: Instance
    grid: tuple[int, ...]
    more_shared_bytes: int = 0  # beyond what the instance itself takes
    maps: tuple[tuple[str, TensorMap], ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        return (*self.grid, 1, 1)[:3]


class Run(Protocol):
    """Zeroes, and launches all steps of a program on the current stream of the device that it was made for."""

    def __call__(self, table: Table) -> None: ...


@dataclass(eq=False)
class Program:
    """See the module.

    ``values`` are fields of ``Params`` by name. ``conversions`` make what kernels read of the call's tensors in these roles.
    ``owners``: whose ids are part of the key that finds this program, kept so that no other object gets them.
    """

    outputs: Sequence[Output]
    steps: Sequence[Step] = ()
    values: Mapping[str, int | float | Address] = field(default_factory=dict)
    zeroed: Zeroed | None = None
    conversions: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    owners: tuple[object, ...] = ()
    run: Run | None = field(default=None, init=False)

    def __call__(self, table: Table, device: torch.device, prepare: Callable[[Program, Table, torch.device], Run]) -> None:
        """Convert and allocate into ``table``, and launch; nobody waits for the device. ``prepare`` makes ``run`` the first time."""
        for role, convert in self.conversions.items():
            table[role] = convert(table[role])
        for role, shape, strides, dtype in self.outputs:
            table[role] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        if not self.steps:
            for output in self.outputs:
                table[output.role].zero_()
            return
        run = self.run
        if run is None:
            run = self.run = prepare(self, table, device)
        run(table)
