"""Where these tests run, and at what size: on a GPU, or, to try their logic without one, interpreted on the CPU and small."""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if ON_GPU else [torch.float32]  # interpreted products know no bfloat16
COMPILER = "inductor" if ON_GPU else "aot_eager"


def size(on_gpu: int, interpreted: int) -> int:
    return on_gpu if ON_GPU else interpreted


def draw(
    *shape: int, spread: float = 1.0, dtype: torch.dtype | None = None, seed: int = 0, device: str = DEVICE
) -> list[torch.Tensor]:
    """Query (times ``spread``), key and value, the same on every machine."""
    dtype = dtype or (torch.bfloat16 if ON_GPU else torch.float32)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return [query * spread, key, value]


def leaves(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    assert torch.isfinite(found).all()
    return float((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))
