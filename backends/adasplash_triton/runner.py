"""Launching one Triton kernel with little work on the host, and what all launches need to know of device and stream.

``JITFunction.run`` spends over 100 us a launch on kernels with many arguments. :func:`run` looks at what Triton specialises on once a
call (:func:`plan`); a compiled kernel is then one dictionary access away, and is handed addresses and numbers in order. Attention's
passes, several launches each, are programs (:mod:`adasplash_triton.program`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from adasplash_core.backend import KernelConfig
from adasplash_core.errors import ConfigRejectedError

FUSED = {"enable_fp_fusion": True}
"""Multiplications and additions as one instruction with one rounding, whatever the version of Triton holds for the default."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_compiled: dict[tuple[int, Any], tuple[Any, tuple[str, ...], tuple[int, ...]]] = {}
_plans: dict[tuple[Any, ...], int] = {}
_interpreter = threading.Lock()  # the interpreter patches triton.language while it runs: one thread at a time


class Pointer:
    """An address with the dtype that a kernel sees there: cheaper than a tensor, and enough for Triton."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Address(NamedTuple):
    """A pointer that each call fills in: ``offset`` bytes into the tensor of this role, seen by the kernel as ``dtype``."""

    role: str
    offset: int
    dtype: torch.dtype


def plan(*parts: Any) -> int:
    """A small number for everything that decides which binaries a call runs, so that launches need not look at it again."""
    return _plans.setdefault(parts, len(_plans))


def speciality(value: int) -> Any:
    """What of an integer decides which binary may run: whether it is 1, a multiple of 16, and its width."""
    return 1 if value == 1 else (value & 15 == 0, -(2**31) <= value < 2**31)


def run(kernel: Any, grid: int | tuple[int, int], arguments: Mapping[str, Any], plan_number: Any, **options: int) -> None:
    """Launch ``kernel`` on the current device and stream with those of ``arguments`` that it takes, by name.

    ``plan_number`` must differ wherever a compile-time constant, a dtype, an alignment, a number's speciality or an option does.
    """
    blocks = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)
    key = (id(kernel), plan_number)
    found = None if INTERPRETED else _compiled.get(key)
    if found is None:
        launched = kernel[blocks](**{name: arguments[name] for name in kernel.arg_names}, **options)
        if not INTERPRETED:
            # Names of tensors are upper case, as those of compile-time constants are.
            places = tuple(i for i, p in enumerate(kernel.params) if p.name.isupper() and not p.is_constexpr)
            _compiled[key] = (launched, tuple(kernel.arg_names), places)
        return
    compiled, names, tensors = found
    values = [arguments[name] for name in names]
    for place in tensors:
        values[place] = values[place].data_ptr()  # Triton asks the driver about every tensor, but takes addresses as they are
    stream = current_stream(current_device())
    compiled.run(*blocks, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def current_device() -> int:
    """Index of the calling thread's device; CUDA must have been initialised (as by any tensor there)."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """Handle of the calling thread's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device)


class launching:  # noqa: N801
    """On the right device; what Triton raises for a config that cannot run here becomes the contract's error."""

    def __init__(self, config: KernelConfig, device: torch.device) -> None:
        self.config = config
        self.context: AbstractContextManager[Any] = nullcontext()
        if INTERPRETED:
            self.context = _interpreter
        elif device.type == "cuda" and device.index != current_device():
            self.context = torch.cuda.device(device)

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.context.__exit__(kind, error, trace)
        if isinstance(error, (OutOfResources, PTXASError)):
            raise ConfigRejectedError("triton", self.config, str(error)) from error
