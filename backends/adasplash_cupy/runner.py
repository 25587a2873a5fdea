"""Compiling instances through CuPy and launching them on torch's current stream."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from adasplash_core.backend import KernelConfig
from adasplash_core.errors import ConfigRejectedError
from adasplash_cupy import nvrtc
from adasplash_cupy.instances import Instance, source
from adasplash_cupy.nvrtc import CompileError
from adasplash_cupy.params import pack
from adasplash_cupy.tensor_maps import TensorMap, encode

OPTIONS = ("-std=c++17",)
"""Compile options; CuPy adds the device's architecture. No fast math: the solve counts on log1p, expm1 and division."""

_STATIC_SHARED_BYTES = 48 * 1024  # more must be asked for
_kernels: dict[tuple[Instance, int], Any] = {}
_refused: dict[Instance, CompileError] = {}  # by NVRTC, of those that are written for one architecture
_compiling = threading.Lock()


class Launcher(Protocol):
    """Launches an instance with a grid, the parameters by name, shared memory beyond what the instance itself takes, and tensor maps.

    The parameters are packed at the first launch: a call's launches share them, and they must not change in between.
    """

    def __call__(
        self,
        instance: Instance,
        grid: tuple[int, ...],
        values: Mapping[str, int | float],
        more_shared_bytes: int = 0,
        maps: Sequence[TensorMap] = (),
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
        instance: Instance,
        grid: tuple[int, ...],
        values: Mapping[str, int | float],
        more_shared_bytes: int = 0,
        maps: Sequence[TensorMap] = (),
    ) -> None:
        if not packed:
            packed.append(_argument(pack(values)))
        kernel = _kernels.get((instance, index))
        if kernel is None:
            kernel = _compile(instance, index)
        blocks = (*grid, 1, 1)[:3]
        arguments = (*packed, *(_argument(encode(of)) for of in maps))
        kernel(blocks, (instance.threads, 1, 1), arguments, shared_mem=instance.shared_bytes + more_shared_bytes)

    try:
        with torch.cuda.device(index), cupy.cuda.Device(index), stream:
            yield launch
    except (CompileError, cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError) as error:
        raise ConfigRejectedError(backend, config, str(error)) from error


def _compile(instance: Instance, index: int) -> Any:
    """The kernel for the current device; CuPy keeps the binary on disk for the next process."""
    import cupy

    with _compiling:
        if instance in _refused:
            raise _refused[instance]
        if (instance, index) not in _kernels:
            if instance.architecture is None:
                module = cupy.RawModule(code=source(instance.kernel), options=OPTIONS, name_expressions=[instance.expression])
                kernel = module.get_function(instance.expression)
            else:
                try:
                    path, symbol = _binary(instance, instance.architecture, cache_folder())
                except CompileError as error:
                    _refused[instance] = error
                    raise
                kernel = cupy.RawModule(path=str(path)).get_function(symbol)
            if instance.shared_bytes > _STATIC_SHARED_BYTES:
                kernel.max_dynamic_shared_size_bytes = instance.shared_bytes
            _kernels[(instance, index)] = kernel
        return _kernels[(instance, index)]


def cache_folder() -> Path:
    """Where CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _binary(instance: Instance, architecture: str, folder: Path) -> tuple[Path, str]:
    """An instance compiled for an architecture that CuPy does not ask for, kept beside what CuPy keeps; and the kernel's name."""
    known = "\n".join((source(instance.kernel), instance.expression, architecture, nvrtc.version(), *nvrtc.OPTIONS))
    prefix = f"adasplash-{hashlib.sha256(known.encode()).hexdigest()[:32]}"
    found = sorted(folder.glob(f"{prefix}.*.cubin"))
    if not found:
        program = nvrtc.compile_instance(instance, architecture)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(program.binary)
        found = [folder / f"{prefix}.{program.symbol}.cubin"]
        Path(file.name).replace(found[0])
    return found[0], found[0].name.split(".")[1]


def _argument(content: bytes) -> Any:
    """A struct as CuPy passes it by value: a numpy scalar of its bytes."""
    import numpy

    return numpy.frombuffer(content, dtype=numpy.dtype((numpy.void, len(content))))
