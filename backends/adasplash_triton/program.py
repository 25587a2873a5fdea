"""A pass of attention as a list of launches: built once for each static description of a call, replayed with other addresses.

A :class:`Program` holds what does not change between calls that differ in their tensors' values and places alone: which tensors to
allocate, and for each launch the kernel, the grid, the compile options and the arguments by name. In place of a pointer stands an
:class:`~adasplash_triton.runner.Address`: the role of a tensor ("Q", "OUT", "workspace", ...) and a place in it. A call makes a table
from roles to tensors.

The first run goes through Triton, which compiles what it has not compiled; later ones through :mod:`adasplash_triton.replay`. Binaries
are found by what Triton specialises on, so a program for a new length compiles nothing and is replayed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from triton import knobs

from adasplash_core.backend import KernelConfig
from adasplash_triton.replay import Binary, Replay, make_replay
from adasplash_triton.runner import FUSED, INTERPRETED, Address, Pointer, current_device, current_stream, launching, speciality

Table = dict[str, torch.Tensor]
"""The tensors of one call by role; its order is part of what a program is found by."""

ALIGNMENT = 256
"""Bytes to which every place inside an allocation is rounded up: what is aligned at its start is aligned all through."""


class Output(NamedTuple):
    """A tensor that the program allocates; contiguous if without ``strides``."""

    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zero: bool = False
    strides: tuple[int, ...] | None = None

    def allocate(self, device: torch.device) -> torch.Tensor:
        if self.strides is None:
            return (torch.zeros if self.zero else torch.empty)(self.shape, dtype=self.dtype, device=device)
        x = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        return x.zero_() if self.zero else x


@dataclass(frozen=True, eq=False)
class Step:
    """One launch. ``arguments`` may hold more than the kernel takes; pointers are addresses."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, int]

    def resolved(self, pointer: Callable[[Address], Any]) -> dict[str, Any]:
        """The kernel's arguments by name with ``pointer(address)`` in place of addresses."""
        taken = ((name, self.arguments[name]) for name in self.kernel.arg_names)
        return {name: pointer(value) if isinstance(value, Address) else value for name, value in taken}

    def binary(self, misaligned: dict[str, int]) -> tuple[Any, ...]:
        """Everything that Triton compiles into the kernel. ``misaligned``: each role's address modulo 16."""
        found: list[Any] = [id(self.kernel), *self.options.items()]
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                found.append((type(value), value))
            elif isinstance(value, Address):
                found.append((value.dtype, (misaligned[value.role] + value.offset) % 16 == 0))
            elif isinstance(value, float):
                found.append("float")
            elif parameter.do_not_specialize:
                found.append(-(2**31) <= value < 2**31)
            else:
                found.append(speciality(value))
        return tuple(found)


@dataclass
class Workspace:
    """One allocation for all scratch of a pass: ``workspace.add(count, dtype)`` is the address of a new piece."""

    size: int = 0

    def add(self, count: int, dtype: torch.dtype) -> Address:
        at = self.size
        self.size += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return Address("workspace", at, dtype)

    def output(self) -> Output:
        return Output("workspace", (self.size,), torch.uint8)


@dataclass(eq=False)
class Program:
    """See the module. ``owners``: whose ids are part of the key that finds this program, kept so that no other object gets them."""

    config: KernelConfig
    outputs: Sequence[Output]
    steps: Sequence[Step]
    owners: tuple[object, ...] = ()
    _replay: Replay | None = field(default=None, init=False)

    def __call__(self, table: Table, device: torch.device) -> None:
        """Allocate the outputs into ``table`` and launch; nobody waits for the device.

        Raises
        ------
        ConfigRejectedError: if the config's kernels cannot run on this device.
        """
        for output in self.outputs:
            table[output.role] = output.allocate(device)
        if not self.steps:
            return
        replay = self._replay
        if replay is not None and device.index == current_device() and not hooked():
            replay(table, current_stream(device.index))
        else:
            with launching(self.config, device):
                self._run(table, device)

    def _run(self, table: Table, device: torch.device) -> None:
        if INTERPRETED:
            for step in self.steps:
                step.kernel[step.grid](**step.resolved(lambda address: _view(table, address)), **step.options)
            return
        replay = self._replay
        if replay is None:
            misaligned = {role: x.data_ptr() & 15 for role, x in table.items()}
            keys = [(device.index, step.binary(misaligned)) for step in self.steps]
            known = [_binaries[key] for key in keys if key in _binaries]
            if len(known) < len(keys):
                known = [Binary.of(_launch_by_name(step, table)) for step in self.steps]
                _binaries.update(zip(keys, known, strict=True))
                self._replay = make_replay(self.steps, known, tuple(table), device)
                return
            replay = self._replay = make_replay(self.steps, known, tuple(table), device)
        if hooked():
            for step in self.steps:
                _launch_by_name(step, table)
        else:
            replay(table, current_stream(device.index))


_binaries: dict[tuple[Any, ...], Binary] = {}  # by device and Step.binary


def _launch_by_name(step: Step, table: Table) -> Any:
    """Through Triton's own launch path: compiles, minds hooks. Returns the compiled kernel."""
    arguments = step.resolved(lambda address: Pointer(table[address.role].data_ptr() + address.offset, address.dtype))
    return step.kernel[step.grid](**arguments, **(FUSED | step.options))


def _view(table: Table, address: Address) -> torch.Tensor:
    """An address as the interpreter wants it: a tensor that starts there."""
    x = table[address.role]
    if address.offset == 0 and x.dtype == address.dtype:
        return x
    return x.view(torch.uint8).reshape(-1)[address.offset :].view(address.dtype)


def hooked() -> bool:
    """Whether someone (a profiler) asked Triton to be told of launches."""
    runtime = knobs.runtime
    return bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)
