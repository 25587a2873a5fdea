"""alpha on its way to a kernel: a number or a tensor becomes a tensor on the device, and a word for what the host knows of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.spec import AlphaClass

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CLASSES: Mapping[float, AlphaClass] = {1.0: "1", 1.5: "1.5", 2.0: "2"}


def from_number(alpha: float, device: torch.device) -> tuple[torch.Tensor, AlphaClass]:
    """A number as a 0-d float64 tensor: float32 would lose half the digits of alpha - 1 near 1.

    Raises
    ------
    ArgumentTypeError: not a number. ArgumentError: not in [1, 2]; NaN is not.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, torch.SymFloat, torch.SymInt)):
        raise ArgumentTypeError("alpha must be a number or a floating point tensor.", seen=repr(alpha))
    if not 1 <= alpha <= 2:
        raise ArgumentError(
            "alpha must be at least 1 (softmax) and at most 2 (sparsemax).",
            seen=f"alpha={alpha}",
            hint="1.5 is the usual choice",
        )
    if torch.compiler.is_compiling():
        # Comparing it with 1.5, or torch.tensor(alpha), would compile once a value.
        return torch.zeros((), dtype=torch.float64, device=device) + alpha, "any"
    return _constant(float(alpha), device), _CLASSES.get(float(alpha), "other")


def check_dtype_and_device(alpha: torch.Tensor, device: torch.device) -> None:
    """Raise unless a tensor alpha is floating point and where the data is; its shape is the caller's to check."""
    if alpha.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError("alpha must be a number or a floating point tensor.", seen=str(alpha.dtype))
    if alpha.device != device:
        raise ArgumentError(
            "alpha must be on the data's device.", seen=f"{alpha.device} and {device}", hint=f"alpha.to({str(device)!r})"
        )


_constants: dict[tuple[float, torch.device], torch.Tensor] = {}


def _constant(alpha: float, device: torch.device) -> torch.Tensor:
    """The tensor of a number, kept to save a launch a call."""
    if (known := _constants.get((alpha, device))) is not None:
        return known
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        constant = torch.full((), alpha, dtype=torch.float64, device=device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(constant) is torch.Tensor and not capturing and len(_constants) < 256:  # a graph's or a fake tensor must not escape
        _constants[(alpha, device)] = constant
    return constant
