"""Runs the backend's CUDA kernels on the CPU: the same sources compiled by the C++ compiler against a twin of ``ptx.cuh``.

A library an instance, compiled when first launched and kept in the temp folder under a hash of everything it is made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from adasplash_core.backend import HeadDims
from adasplash_cupy import params
from adasplash_cupy.backend import CupyBackend
from adasplash_cupy.instances import ALL_FLAGS, Instance, MarkInstance, source
from adasplash_cupy.program import Address, Program, Run, Step, Table
from adasplash_cupy.tensor_maps import BYTES, TensorMap

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
_FLAGS = (
    "-std=c++17", "-fPIC", "-march=native", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"
)  # fmt: skip
_lock = threading.Lock()  # one block at a time, in one thread

order = 0
"""In which order the threads of a block take turns: 0 ascending, 1 descending, 2 mixed. No result may depend on it."""


class EmulatedCupyBackend(CupyBackend):
    """The backend as it is, on CPU tensors."""

    device_types: ClassVar[frozenset[str] | None] = frozenset({"cpu"})

    def unavailable_reasons(self) -> list[str]:
        return [] if COMPILER else ["no C++ compiler is installed"]


def limited(high: int, *dtypes: str) -> EmulatedCupyBackend:
    """An emulated backend that declares fewer head dims and dtypes: each pair of padded ones is compiled anew."""
    attributes = {"head_dims": HeadDims(low=8, high=high, multiple_of=8), "dtypes": frozenset(dtypes)}
    return type("Limited", (EmulatedCupyBackend,), attributes)()


def prepare(program: Program, table: Table, device: torch.device) -> Run:
    """In place of :func:`adasplash_cupy.runner.prepare`."""
    for step in program.steps:
        compiled(step.instance)

    def run(table: Table) -> None:
        values = {name: address(table, x) if isinstance(x, Address) else x for name, x in program.values.items()}
        if program.zeroed is not None:
            ctypes.memset(address(table, program.zeroed.address), 0, 4 * program.zeroed.words)
        for step in program.steps:
            maps = [replace(of, address=table[role].data_ptr()) for role, of in step.maps]
            launch(step, values, maps)

    return run


def address(table: Table, of: Address) -> int:
    return table[of.role].data_ptr() + of.offset


def compiled(instance: Instance) -> ctypes.CDLL:
    return _library(merged(instance))


def launch(step: Step, values: Mapping[str, int | float], maps: Sequence[TensorMap]) -> None:
    """One kernel, to its end."""
    instance = step.instance
    contents = [params.pack(values), *map(encode, maps)]
    arguments = (ctypes.c_char_p * len(contents))(*contents)
    with _lock:
        blocks = (ctypes.c_int * 3)(*step.blocks)
        failure = compiled(instance).launch(arguments, blocks, instance.shared_bytes + step.more_shared_bytes, order)
    if failure:
        raise AssertionError(f"{instance.expression}: {failure.decode()}")


def encode(of: TensorMap) -> bytes:
    """``TensorMap`` of fibers.h."""
    size = of.dtype.itemsize
    return struct.pack("P4q3q4i", of.address, *of.lengths, *of.strides, of.columns, of.rows, size, 1).ljust(BYTES, b"\0")


def merged(instance: Instance) -> Instance:
    """The most general instance that does the same: fewer to compile."""
    if instance.kernel in ("key_max", "transform"):
        return Instance(instance.kernel, instance.dtype)
    if isinstance(instance, MarkInstance):
        return instance
    return replace(instance, alpha=instance.alpha if instance.head_dim == 64 else 0, flags=ALL_FLAGS, programs=0)


def shared_bytes(instance: Instance) -> int:
    """What the C++ layout of an instance takes."""
    return int(_library(merged(instance)).shared_bytes())


def params_size() -> int:
    return int(_library(Instance("key_max", "float32")).params_size())


_LAYOUTS = {
    "key_max": "0",
    "transform": "3 * WARPS * 4",
    "forward_select": "Tiles<SHAPE>::bytes(false) + 4 * ROWS * 4",
    "forward_bound": "Tiles<SHAPE>::bytes(false)",
    "forward_mark": "MarkTiles<SHAPE>::bytes()",
    "forward_lists": "Tiles<SHAPE>::bytes(true)",
    "forward_dense": "Tiles<SHAPE>::bytes(true)",
    "forward_short": "ShortTiles<SHAPE>::bytes()",
    "backward_lists": "RowsTiles<SHAPE, true>::bytes()",
    "backward_rows": "RowsTiles<SHAPE, false>::bytes()",
    "backward_keys": "KeysTiles<SHAPE>::bytes()",
}


def _text(instance: Instance) -> str:
    """One source: the kernel with the twin of ptx.cuh, and what the host calls."""
    kernel = source(instance.kernel)
    machines = []
    for name in ("ptx.cuh", "wgmma.cuh", "hopper.cuh"):
        machine = (params.SOURCES / name).read_text(encoding="utf-8").replace("#pragma once", "")
        if machine in kernel:
            machines.append(name)
            kernel = kernel.replace(machine, "")
    assert "asm" not in re.findall(r"\w+", kernel)
    maps = (
        ["*static_cast<const ptx::TensorMap*>(a[1])", "*static_cast<const ptx::TensorMap*>(a[2])"]
        if isinstance(instance, MarkInstance)
        else []
    )
    arguments = ", ".join(["*static_cast<const Params*>(a[0])", *maps])
    includes = "\n".join(f'#include "{name}"' for name in machines)
    return f"""{includes}
{kernel}
using SHAPE = {instance.expression.partition("<")[2][:-1]};
#define API extern "C" __attribute__((visibility("default")))
static void entry(const void* p) {{
    auto a = static_cast<const void* const*>(p);
    {instance.expression}({arguments});
}}
API const char* launch(const void* const* a, const int* grid, int shared, int order) {{
    return fibers::run(entry, a, {{grid[0], grid[1], grid[2]}}, {instance.threads}, shared, order);
}}
API int shared_bytes() {{ return {_LAYOUTS[instance.kernel]}; }}
API int params_size() {{ return sizeof(Params); }}
"""


@cache
def _library(instance: Instance) -> ctypes.CDLL:
    path = build(instance)
    library = ctypes.CDLL(str(path))
    library.launch.restype = ctypes.c_char_p
    library.launch.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int]
    return library


def run(headers: Sequence[str], text: str, tensors: Sequence[torch.Tensor], shared: int) -> None:
    """One block of ``entry(addresses)`` in ``text``, which may use the kernels' headers."""
    own = [(params.SOURCES / name).read_text(encoding="utf-8") for name in headers if not (HERE / name).exists()]
    machines = [f'#include "{name}"' for name in headers if (HERE / name).exists()]
    launch = """
extern "C" __attribute__((visibility("default"))) const char* launch(const void* a, int shared, int order) {
    return fibers::run(entry, a, {1, 1, 1}, 128, shared, order);
}
"""
    library = ctypes.CDLL(str(_build("\n".join([*machines, *own, text, launch]).replace("#pragma once", ""))))
    library.launch.restype = ctypes.c_char_p
    addresses = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
    with _lock:
        failure = library.launch(addresses, shared, order)
    if failure:
        raise AssertionError(failure.decode())


def build(instance: Instance) -> Path:
    """The shared library of an instance, compiled unless it is there."""
    return _build(_text(instance))


def _build(text: str) -> Path:
    assert COMPILER is not None
    machine = _machine()
    name = hashlib.sha256((text + machine.name + " ".join(_FLAGS)).encode()).hexdigest()[:24]
    path = machine.parent / f"{name}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=machine.parent) as folder:
            unit, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            unit.write_text(text, encoding="utf-8")
            # Compiling takes longer than what most kernels do here, and -Og takes two thirds of -O1's time.
            _compile([*_FLAGS, "-Og", f"-I{HERE}", "-shared", str(unit), str(machine), "-o", str(made)])
            made.replace(path)
    return path


@cache
def _machine() -> Path:
    """The object file of the machine, in a folder of this user's."""
    parts = ("fibers.cpp", "hopper.cpp")
    content = b"".join(
        (HERE / name).read_bytes() for name in ("fibers.h", "machine.h", "ptx.cuh", "wgmma.cuh", "hopper.cuh", *parts)
    )
    folder = Path(tempfile.gettempdir()) / f"adasplash-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.o"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            objects = [f"{made}/{name}.o" for name in parts]
            for name, to in zip(parts, objects, strict=True):
                _compile([*_FLAGS, "-O3", "-c", str(HERE / name), "-o", to])
            _compile(["-r", "-nostdlib", *objects, "-o", f"{made}/machine.o"])
            (Path(made) / "machine.o").replace(path)
    return path


def _compile(arguments: list[str]) -> None:
    result = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-6000:]
