"""Ahead-of-time compilation of exactly the kernels that a call would launch, for a GPU that need not be here.

A call on CPU tensors has a program like any other; its steps are compiled for the target, and the resources are read from the metadata
(shared memory) and, on NVIDIA, from the ``cuobjdump`` that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from adasplash_core.backend import AttentionCall
from adasplash_triton import launch
from adasplash_triton.configs import Precision
from adasplash_triton.operands import inputs_of
from adasplash_triton.program import ALIGNMENT, Program, Table
from adasplash_triton.runner import FUSED, Address, Pointer

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Largest shared memory of one block, in bytes."""

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch that a program holds: the kernel, its arguments by name (pointers to nowhere, aligned as the call's), and options."""

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


def launches_of(
    forward_call: AttentionCall, backward_call: AttentionCall | None = None, precision: Precision = "ieee"
) -> list[Launch]:
    """The launches of a call's forward and, if given (the same call with a backward config), its backward. Any device, any values."""
    table = inputs_of(forward_call)
    program = launch.forward_program(forward_call, table, precision)
    found = _launches(program, table)
    if backward_call is not None:
        device = torch.device("cpu")
        made = {x.role: x.allocate(device) for x in program.outputs if x.role in ("OUT", "O2", "rows", "lists")}
        table = {**inputs_of(backward_call), "DO": made.pop("OUT"), **made}
        found += _launches(launch.backward_program(backward_call, table, precision), table)
    return found


def _launches(program: Program, table: Table) -> list[Launch]:
    misaligned = {role: x.data_ptr() & 15 for role, x in table.items()}

    def pointer(address: Address) -> Pointer:
        return Pointer(ALIGNMENT + misaligned.get(address.role, 0) + address.offset, address.dtype)

    return [Launch(step.kernel, step.resolved(pointer), step.options) for step in program.steps]


def target(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compiled(recorded: Launch, target_name: str) -> CompiledKernel:
    """Compile one launch; raises what Triton raises."""
    kernel, arguments = recorded.kernel, recorded.arguments
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            if parameter.name == "ALPHA" and value == 2 and not target_name.startswith("sm_"):
                value = 1  # the same maths without NVIDIA's instructions
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Pointer):
            signature[parameter.name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
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
    options: dict[str, Any] = FUSED | recorded.options
    if not target_name.startswith("sm_"):
        options.pop("maxnreg", None)  # NVIDIA's assembler alone takes it
    return triton.compile(source, target=target(target_name), options=options)


def compile_launch(recorded: Launch, target_name: str) -> Resources:
    """Compile one launch and say what it needs; raises what Triton raises."""
    found, name = compiled(recorded, target_name), recorded.kernel.__name__
    shared = int(found.metadata.shared)
    if "cubin" not in found.asm:
        return Resources(name, shared)
    return cuda_resources(name, shared, found.asm["cubin"])


def cuda_resources(name: str, shared: int, cubin: bytes) -> Resources:
    report = cuobjdump(cubin, "--dump-resource-usage")
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return Resources(name, shared, int(found["REG"]), int(found["STACK"]), int(found["LOCAL"]))


def cuobjdump(cubin: bytes, what: str) -> str:
    """What the tool that comes with Triton says of a binary: ``--dump-resource-usage`` or ``-sass``."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
