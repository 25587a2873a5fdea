"""Ahead-of-time compilation of exactly the kernels that a call would launch, for a GPU that need not be here.

The launch code runs on CPU tensors with the kernels replaced by recorders; what they were given is then compiled for the target, and
the resources are read from the metadata (shared memory) and, on NVIDIA, from the ``cuobjdump`` that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adasplash_core.backend import AttentionCall
from adasplash_triton import launch
from adasplash_triton.runner import Pointer

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Largest shared memory of one block, in bytes."""

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, and compile options."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. Sizes in bytes; ``registers``, ``stack`` and ``local`` are -1 where no tool reads them."""

    name: str
    shared: int
    registers: int = -1
    stack: int = -1
    local: int = -1


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, launches of this backend's kernels are listed instead of run."""
    launches: list[Launch] = []

    def record(kernel: JITFunction[Any], grid: object, arguments: dict[str, Any], plan: object, **options: int) -> None:
        launches.append(Launch(kernel, {name: arguments[name] for name in kernel.arg_names}, options))

    original = vars(launch)["run"]
    setattr(launch, "run", record)  # noqa: B010
    try:
        yield launches
    finally:
        setattr(launch, "run", original)  # noqa: B010


def launches_of(forward_call: AttentionCall, backward_call: AttentionCall | None = None) -> list[Launch]:
    """The launches of a call's forward and, if given (the same call with a backward config), its backward. Any device, any values."""
    with recording() as launches:
        result = launch.forward(forward_call)
        if backward_call is not None:
            launch.backward(backward_call, torch.empty_like(result.out), list(result.saved))
    return launches


def target(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_launch(recorded: Launch, target_name: str) -> Resources:
    """Compile one launch; raises what Triton raises."""
    kernel, arguments = recorded.kernel, recorded.arguments
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, (torch.Tensor, Pointer)):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif not parameter.do_not_specialize and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(recorded.options)
    if not target_name.startswith("sm_"):
        options.pop("maxnreg", None)  # NVIDIA's assembler alone takes it
    compiled = triton.compile(source, target=target(target_name), options=options)
    shared = int(compiled.metadata.shared)
    if "cubin" not in compiled.asm:
        return Resources(kernel.__name__, shared)
    return _cuda_resources(kernel.__name__, shared, compiled.asm["cubin"])


def _cuda_resources(name: str, shared: int, cubin: bytes) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return Resources(name, shared, int(found["REG"]), int(found["STACK"]), int(found["LOCAL"]))
