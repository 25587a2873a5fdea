"""Compiling instances through CuPy and launching them on torch's current stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from adasplash_core.backend import KernelConfig
from adasplash_core.errors import ConfigRejectedError
from adasplash_cupy.instances import THREADS, Instance, source
from adasplash_cupy.params import pack

OPTIONS = ("-std=c++17",)
"""Compile options; CuPy adds the device's architecture. No fast math: the solve counts on log1p, expm1 and division."""

_STATIC_SHARED_BYTES = 48 * 1024  # more must be asked for
_kernels: dict[tuple[Instance, int], Any] = {}
_compiling = threading.Lock()


class Launcher(Protocol):
    """Launches an instance with a grid, the parameters by name, and shared memory beyond what the instance itself takes.

    The parameters are packed at the first launch: a call's launches share them, and they must not change in between.
    """

    def __call__(
        self, instance: Instance, grid: tuple[int, ...], values: Mapping[str, int | float], more_shared_bytes: int = 0
    ) -> None: ...


class _Stream:
    """A stream's handle in the form in which CUDA libraries hand them to each other."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@contextmanager
def launching(backend: str, config: KernelConfig | None, device: torch.device) -> Iterator[Launcher]:
    """Within, a launcher for a device and torch's current stream there.

    Raises
    ------
    ConfigRejectedError: where a kernel does not compile or asks for more than the device has.
    """
    import cupy

    index = torch.cuda.current_device() if device.index is None else device.index
    stream = cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(index).cuda_stream))

    packed: list[Any] = []

    def launch(
        instance: Instance, grid: tuple[int, ...], values: Mapping[str, int | float], more_shared_bytes: int = 0
    ) -> None:
        if not packed:
            packed.append(_argument(values))
        kernel = _kernels.get((instance, index))
        if kernel is None:
            kernel = _compile(instance, index)
        blocks = (*grid, 1, 1)[:3]
        kernel(blocks, (THREADS, 1, 1), tuple(packed), shared_mem=instance.shared_bytes + more_shared_bytes)

    try:
        with torch.cuda.device(index), cupy.cuda.Device(index), stream:
            yield launch
    except (cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError) as error:
        raise ConfigRejectedError(backend, config, str(error)) from error


def _compile(instance: Instance, index: int) -> Any:
    """The kernel for the current device; CuPy keeps the binary on disk for the next process."""
    import cupy

    with _compiling:
        if (instance, index) not in _kernels:
            module = cupy.RawModule(code=source(instance.kernel), options=OPTIONS, name_expressions=[instance.expression])
            kernel = module.get_function(instance.expression)
            if instance.shared_bytes > _STATIC_SHARED_BYTES:
                kernel.max_dynamic_shared_size_bytes = instance.shared_bytes
            _kernels[(instance, index)] = kernel
        return _kernels[(instance, index)]


def _argument(values: Mapping[str, int | float]) -> Any:
    """Params as CuPy passes a struct by value: a numpy scalar of its bytes."""
    import numpy

    content = pack(values)
    return numpy.frombuffer(content, dtype=numpy.dtype((numpy.void, len(content))))
