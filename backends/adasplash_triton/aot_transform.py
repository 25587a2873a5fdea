"""The entmax transform's launches for a GPU that need not be here, as :mod:`adasplash_triton.aot` lists attention's."""

from __future__ import annotations

import torch

from adasplash_triton import transform_launch
from adasplash_triton.aot import Launch
from adasplash_triton.program import ALIGNMENT
from adasplash_triton.runner import Pointer


def launches_of(
    n: int, dtype: torch.dtype, alpha_class: str, *, dim: int = -1, per_row: bool = False, alpha_grad: bool = False
) -> list[Launch]:
    """What a transform over ``n`` entries, and its backward, would launch. No kernel runs; the tensors hold nothing."""
    shape = (48, n) if dim == -1 else (n, 48)
    x = torch.empty(shape, dtype=dtype).movedim(dim, -1)
    alpha = torch.empty(48) if per_row else torch.empty(())
    forward = transform_launch.forward_program({"X": x, "P": x, "A": alpha}, alpha_class)
    backward = transform_launch.backward_program({"P": x, "G": x, "A": alpha, "DX": x}, alpha_class, alpha_grad)
    assert forward is not None
    assert backward is not None
    return [
        Launch(step.kernel, step.resolved(lambda address: Pointer(ALIGNMENT + address.offset, address.dtype)), step.options)
        for step in (*forward.steps, *backward.steps)
    ]
