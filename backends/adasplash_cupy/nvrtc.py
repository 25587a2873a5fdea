"""NVRTC through its C interface: what CuPy does not ask of it, an architecture other than the device's plain one and a report."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adasplash_cupy import requirements
from adasplash_cupy.instances import Instance, source

OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""As CuPy compiles."""


class CompileError(Exception):
    """NVRTC's log."""


@dataclass(frozen=True)
class Program:
    """A compiled instance: the binary, the kernel's name in it, and what the compiler said.

    With the options ``-Xptxas -v`` it says what the kernel takes: registers a thread, and bytes that a thread spills; else -1.
    """

    binary: bytes
    symbol: str
    log: str

    @property
    def registers(self) -> int:
        return max(map(int, re.findall(r"Used (\d+) registers", self.log)), default=-1)

    @property
    def spilled(self) -> int:
        found = re.findall(r"(\d+) bytes spill (?:stores|loads)", self.log)
        return sum(map(int, found)) if found else -1


def compile_instance(instance: Instance, architecture: str, *options: str) -> Program:
    """Compile one instance.

    Raises
    ------
    CompileError: with NVRTC's log.
    """
    nvrtc = _nvrtc()
    program, expression = ctypes.c_void_p(), instance.expression.encode()
    text = source(instance.kernel).encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, f"{instance.kernel}.cu".encode(), 0, None, None))
    try:
        _check(nvrtc, nvrtc.nvrtcAddNameExpression(program, expression))
        given = [option.encode() for option in (*OPTIONS, *options, f"-arch={architecture}")]
        status = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = _read(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(f"{instance.expression} for {architecture}: {log}")
        symbol = ctypes.c_char_p()
        _check(nvrtc, nvrtc.nvrtcGetLoweredName(program, expression, ctypes.byref(symbol)))
        return Program(_read(nvrtc, "CUBIN", program), (symbol.value or b"").decode(), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def is_available() -> bool:
    """Whether NVRTC is installed."""
    return requirements.nvrtc_library() is not None


@cache
def identity() -> str:
    """Of the library that compiles, without loading it: its file's name and size."""
    path = _path()
    return "" if path is None else f"{Path(path).resolve().name} {Path(path).stat().st_size if Path(path).exists() else 0}"


def _read(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw[: size.value]


@cache
def _nvrtc() -> ctypes.CDLL:
    path = _path()
    if path is None:
        raise CompileError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(path)


def _path() -> str | None:
    """CuPy's NVRTC if it is known which that is, else any."""
    return requirements.nvrtc_library(requirements.cupy_major()) or requirements.nvrtc_library()


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(nvrtc.nvrtcGetErrorString(status).decode())
