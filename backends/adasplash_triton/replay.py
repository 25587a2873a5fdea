"""Launching compiled kernels again with other addresses, with as little work on the host as Python allows.

On NVIDIA a launch is one call of ``cuLaunchKernel`` through ctypes. Everything it is handed was prepared when the program was built:
the array of pointers to parameters, the constants they point at, and one buffer for all addresses of all launches, which a call fills
in one ``struct.pack_into``. That bypasses Triton's launcher, so it is done only for kernels whose parameters are certain: the list
derived from Triton's signature must agree with the one that the kernel's PTX declares. Others, and AMD's, go through the compiled
kernel's ``run``.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from adasplash_triton.runner import Address

if TYPE_CHECKING:
    from adasplash_triton.program import Step

_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_SCRATCH = 2
"""Triton appends two pointers to scratch memory, null for kernels that need none."""
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class Replay(Protocol):
    """Launches a program's kernels on a stream, with the addresses of ``table``'s tensors."""

    def __call__(self, table: dict[str, torch.Tensor], stream: int) -> None: ...


@dataclass(frozen=True, eq=False)
class Binary:
    """A compiled kernel, and whether :func:`is_plain` holds for it."""

    compiled: Any
    plain: bool

    @classmethod
    def of(cls, compiled: Any) -> Binary:
        return cls(compiled, is_plain(compiled))


def make_replay(steps: Sequence[Step], binaries: Sequence[Binary], roles: tuple[str, ...], device: torch.device) -> Replay:
    if driver() is not None and all(binary.plain for binary in binaries):
        return DriverReplay(steps, binaries, roles, device)
    return TritonReplay(steps, binaries)


# -- what a kernel's parameters are -----------------------------------------------------------------------------------------------


def parameters(signature: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, type) of the arguments that became parameters: not compile-time constants, nor integers specialised to 1."""
    return [(name, kind) for name, kind in signature.items() if kind != "constexpr"]


def parameter_sizes(signature: Mapping[str, str]) -> list[int] | None:
    """Bytes of each parameter, scratch pointers included; None if the signature holds types that are not known here."""
    kinds = [kind for _, kind in parameters(signature)]
    if not all(isinstance(kind, str) and (kind[0] == "*" or kind in _NUMBERS) for kind in kinds):
        return None
    return [8 if kind[0] == "*" else ctypes.sizeof(_NUMBERS[kind]) for kind in kinds] + [8] * _SCRATCH


def ptx_parameter_sizes(ptx: str) -> list[int] | None:
    """Bytes of each parameter of the only entry in a PTX text; None where one is not a plain number."""
    entry = re.match(r"\.entry\s+[\w$]+\s*\(([^)]*)\)", ptx[max(ptx.find(".entry"), 0) :])
    if entry is None or ptx.count(".entry") != 1:
        return None
    sizes = []
    for declared in entry[1].split(","):
        kind = re.search(r"\.param\s+\.[usfb](8|16|32|64)\b(?!.*\[)", declared)
        if kind is None:
            return None
        sizes.append(int(kind[1]) // 8)
    return sizes


def is_plain(compiled: Any) -> bool:
    """Whether a compiled kernel is launched by grid, block, shared memory and known parameters alone."""
    metadata = compiled.metadata
    wants_more = (
        getattr(metadata, "num_ctas", 1) != 1
        or getattr(metadata, "launch_cooperative_grid", False)
        or getattr(metadata, "launch_pdl", False)
        or getattr(metadata, "global_scratch_size", 0)
        or getattr(metadata, "profile_scratch_size", 0)
    )
    if wants_more or "ptx" not in compiled.asm:
        return False
    sizes = parameter_sizes(compiled.src.signature)
    return sizes is not None and sizes == ptx_parameter_sizes(compiled.asm["ptx"])


# -- through the driver -----------------------------------------------------------------------------------------------------------


@cache
def driver() -> Any:
    """The CUDA driver's library; None where there is none. Calls release the interpreter's lock: a launch may wait for a full queue."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


class DriverReplay:
    """One ``cuLaunchKernel`` a step. The driver copies parameters before it returns, so one buffer serves all calls, one at a time."""

    def __init__(self, steps: Sequence[Step], binaries: Sequence[Binary], roles: tuple[str, ...], device: torch.device) -> None:
        self.device = device
        self.kernels = [binary.compiled for binary in binaries]  # Triton unloads what nobody holds
        self.launch = driver().cuLaunchKernel
        places = {role: i for i, role in enumerate(roles)}
        slots: dict[tuple[int, int], int] = {}
        plans = []
        for step, compiled in zip(steps, self.kernels, strict=True):
            plan: list[Any] = []
            for name, kind in parameters(compiled.src.signature):
                value = step.arguments[name]
                if kind[0] == "*":
                    plan.append(slots.setdefault((places[value.role], value.offset), len(slots)))
                else:
                    plan.append(_NUMBERS[kind](value))
            plans.append(plan)
        self.slots = tuple(slots)
        self.buffer = (ctypes.c_uint64 * (len(slots) + 1))()  # the last stays null, for the scratch pointers
        self.pack = struct.Struct(f"={len(slots)}Q").pack_into
        start = ctypes.addressof(self.buffer)
        self.constants = [[value for value in plan if not isinstance(value, int)] for plan in plans]  # kept alive
        self.launches = []
        for step, compiled, plan in zip(steps, self.kernels, plans, strict=True):
            pointers = [start + 8 * value if isinstance(value, int) else ctypes.addressof(value) for value in plan]
            pointers += [start + 8 * len(slots)] * _SCRATCH
            metadata = compiled.metadata
            before = (ctypes.c_void_p(compiled.function), *step.grid, 32 * metadata.num_warps, 1, 1, metadata.shared)
            self.launches.append((before, (ctypes.c_void_p * len(pointers))(*pointers)))
        self.lock = threading.Lock()

    def __call__(self, table: dict[str, torch.Tensor], stream: int) -> None:
        launch, on = self.launch, ctypes.c_void_p(stream)
        bases = [x.data_ptr() for x in table.values()]
        addresses = [bases[place] + offset for place, offset in self.slots]
        with self.lock:
            self.pack(self.buffer, 0, *addresses)
            for before, pointers in self.launches:
                if error := launch(*before, on, pointers, None):
                    if error == _INVALID_CONTEXT:  # a thread that has not used the device yet
                        enter_context(self.device)
                        error = launch(*before, on, pointers, None)
                    if error:
                        raise RuntimeError(f"CUDA refused to launch a kernel: {error_name(error)}")


def enter_context(device: torch.device) -> None:
    """Make the device's primary context the calling thread's."""
    cuda, number, context = driver(), ctypes.c_int(), ctypes.c_void_p()
    for error in (
        cuda.cuDeviceGet(ctypes.byref(number), device.index),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number),
        cuda.cuCtxSetCurrent(context),
    ):
        if error:
            raise RuntimeError(f"CUDA gave this thread no context on {device}: {error_name(error)}")


def error_name(error: int) -> str:
    """``CUDA_ERROR_...`` and the number."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(error, ctypes.byref(name))
    return f"{name.value.decode() if name.value else 'unknown error'} ({error})"


# -- through Triton ---------------------------------------------------------------------------------------------------------------


class TritonReplay:
    """Triton's launcher with addresses as integers, which spares it asking the driver about each tensor."""

    def __init__(self, steps: Sequence[Step], binaries: Sequence[Binary]) -> None:
        self.launches = []
        for step, binary in zip(steps, binaries, strict=True):
            values = [step.arguments[name] for name in step.kernel.arg_names]
            addresses = [(i, value.role, value.offset) for i, value in enumerate(values) if isinstance(value, Address)]
            self.launches.append((step.grid, binary.compiled, values, addresses))

    def __call__(self, table: dict[str, torch.Tensor], stream: int) -> None:
        for grid, compiled, constants, addresses in self.launches:
            values = list(constants)
            for i, role, offset in addresses:
                values[i] = table[role].data_ptr() + offset
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
