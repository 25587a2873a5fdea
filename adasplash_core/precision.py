"""Whether float32 products may be rounded to TF32: PyTorch's setting, which a call's spec holds as it was when the call was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from adasplash_core.spec import AttentionSpec

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result``, which would import all of dynamo (and Triton) with this module."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def knows_tf32(device_type: str) -> bool:
    """Whether PyTorch's setting speaks of this kind of device: NVIDIA's GPUs."""
    return device_type == "cuda" and torch.version.hip is None


@constant_while_tracing  # compiled code is made anew when the setting has changed: PyTorch guards it
def tf32_allowed(device_type: str) -> bool:
    """Whether PyTorch lets products of float32 matrices on such a device be rounded to TF32.

    ``allow_tf32`` and ``set_float32_matmul_precision`` write through to the setting read here, the only one of the three that can be
    read whichever of them was set.
    """
    return knows_tf32(device_type) and torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within, products of float32 matrices are taken in TF32, or exactly; the settings are left as they were found."""
    with restored():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        yield


def as_in(spec: AttentionSpec) -> AbstractContextManager[None]:
    """Within, the settings are those under which a call with this spec was made."""
    return tf32(spec.tf32) if spec.dtype == "float32" and knows_tf32(spec.device_type) else nullcontext()


@contextmanager
def restored() -> Iterator[None]:
    """Leaves the settings as they were found, whichever of them are set within."""
    on_cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a class, put there at run time
    cuda, cpu = torch.backends.cuda.matmul.fp32_precision, on_cpu.fp32_precision
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch refuses to answer where the older setting contradicts the newer
        legacy = "high" if cuda == "tf32" else "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)  # writes to the others, too
        torch.backends.cuda.matmul.fp32_precision = cuda
        on_cpu.fp32_precision = cpu
