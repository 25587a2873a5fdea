"""Compiled instances: from this process's memory, from CuPy's cache folder, or by NVRTC, several at a time.

CuPy's NVRTC compiles for the device's architecture; what needs another one goes through :mod:`adasplash_cupy.nvrtc`. A process that
finds all its kernels in the folder imports no CuPy.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from adasplash_cupy import nvrtc
from adasplash_cupy.instances import Instance, source
from adasplash_cupy.nvrtc import CompileError

OPTIONS = nvrtc.OPTIONS[:2]
"""Compile options; CuPy adds the others. No fast math: the solve counts on log1p, expm1 and division."""

_refused: dict[Instance, CompileError] = {}  # of those that are written for one architecture


class Binary(NamedTuple):
    """A cubin, or PTX where NVRTC is older than the device, and the kernel's name in it.

    ``registers`` and ``spilled`` (bytes) are a thread's, -1 where the compiler was not asked.
    """

    content: bytes
    symbol: str
    registers: int = -1
    spilled: int = -1


class ArchitectureError(CompileError):
    """NVRTC does not compile ``instances``, which are written for one architecture; those that any GPU runs are not concerned."""

    def __init__(self, log: str, instances: frozenset[Instance]) -> None:
        super().__init__(log)
        self.instances = instances


def compiled(instances: Sequence[Instance], index: int, capability: tuple[int, int]) -> list[Binary]:
    """The binaries of instances for a device, in their order. NVRTC compiles those not found on disk at once, a thread each.

    Raises
    ------
    CompileError: with NVRTC's log; ArchitectureError: if nothing else is wrong.
    """
    folder = cache_folder()
    paths = [folder / _file_name(instance, capability) for instance in instances]
    found = [_read(path) for path in paths]
    jobs = [(instance, path) for instance, path, binary in zip(instances, paths, found, strict=True) if binary is None]
    if jobs:
        if any(instance.architecture is None for instance, _ in jobs):
            import cupy  # noqa: F401 (once, before threads ask for it at the same time)
        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1), "adasplash-nvrtc") as pool:
            made = list(pool.map(lambda job: _made(job[0], job[1], index), jobs))
        errors = {job[0]: result for job, result in zip(jobs, made, strict=True) if isinstance(result, CompileError)}
        for instance, error in errors.items():
            if instance.architecture is None:
                raise error
        if errors:
            raise ArchitectureError("\n".join(map(str, errors.values())), frozenset(errors))
        new = iter(made)
        found = [next(new) if binary is None else binary for binary in found]  # type: ignore[misc]
    return [binary for binary in found if binary is not None]


def compiled_ahead(instance: Instance, capability: tuple[int, int]) -> Binary:
    """The binary of an instance for a device that need not be here, kept where :func:`compiled` finds it.

    Raises
    ------
    CompileError: with NVRTC's log.
    """
    path = cache_folder() / _file_name(instance, capability)
    if (binary := _read(path)) is None:
        architecture = instance.architecture or f"sm_{capability[0]}{capability[1]}"
        program = nvrtc.compile_instance(instance, architecture, "-Xptxas", "-v")
        binary = Binary(program.binary, program.symbol, program.registers, program.spilled)
        _keep(path, binary)
    return binary


def cache_folder() -> Path:
    """Where CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _file_name(instance: Instance, capability: tuple[int, int]) -> str:
    """Holds a hash of everything that the binary follows from."""
    architecture = instance.architecture or f"{capability[0]}.{capability[1]}"
    known = (source(instance.kernel), instance.expression, architecture, nvrtc.identity(), *nvrtc.OPTIONS)
    return f"adasplash-{hashlib.sha256(chr(0).join(known).encode()).hexdigest()[:32]}.kernel"


def _read(path: Path) -> Binary | None:
    """What :func:`_keep` wrote; None where there is nothing, or not all of it."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    parts = head.rsplit(b" ", 3)
    if len(parts) != 4 or parts[3] != _digest(content):
        return None
    return Binary(content, parts[0].decode(), int(parts[1]), int(parts[2]))


def _keep(path: Path, binary: Binary) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            head = f"{binary.symbol} {binary.registers} {binary.spilled} {_digest(binary.content).decode()}\n"
            file.write(head.encode() + binary.content)
        Path(file.name).replace(path)  # whoever reads finds all of it
    except OSError:  # nowhere to keep it: the next process compiles again
        pass


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _made(instance: Instance, path: Path, index: int) -> Binary | CompileError:
    """Compiled and kept; the error is returned, so that the other threads' work is not lost."""
    if instance in _refused:
        return _refused[instance]
    try:
        if instance.architecture is None:
            binary = _by_cupy(instance, index)
        else:
            program = nvrtc.compile_instance(instance, instance.architecture)
            binary = Binary(program.binary, program.symbol)
    except CompileError as error:
        if instance.architecture is not None:
            _refused[instance] = error
        return error
    _keep(path, binary)
    return binary


def _by_cupy(instance: Instance, index: int) -> Binary:
    """CuPy knows which architectures its NVRTC can compile for, and asks for PTX where the device is newer."""
    import cupy
    from cupy.cuda import compiler

    with cupy.cuda.Device(index):  # of this thread
        try:
            content, symbols = compiler.compile_using_nvrtc(
                source(instance.kernel),
                options=OPTIONS,
                filename=f"{instance.kernel}.cu",
                name_expressions=(instance.expression,),
            )
        except compiler.CompileException as error:
            raise CompileError(f"{instance.expression}: {error}") from error
    return Binary(content, symbols[instance.expression])
