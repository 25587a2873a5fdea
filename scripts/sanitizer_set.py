"""A few small calls that take every path of a GPU backend: what compute-sanitizer watches. Run by scripts/gpu_test.py.

Usage: sanitizer_set.py [triton|cupy]  (on a GPU; with TRITON_INTERPRET=1 Triton's calls, interpreted, try this script's logic)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from adasplash_core import attention, entmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = sys.argv[1] if len(sys.argv) > 1 else "triton"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def attend(q_len: int, kv_len: int, dim: int = 64, spread: float = 4.0, dtype: torch.dtype = DTYPE, **arguments: Any) -> None:
    heads, kv_heads = 2, 1
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, dim))
    query, key, value = (torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes)
    out = attention(query * spread, key, value, enable_gqa=True, backend=BACKEND, **arguments)
    assert isinstance(out, torch.Tensor)
    out.float().square().sum().backward()
    for x in (query, key, value):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())


def transform(rows: int, n: int, alpha: Any, dim: int = -1) -> None:
    x = (2 * torch.randn(rows, n, generator=torch.Generator().manual_seed(0))).to(DEVICE).requires_grad_()
    entmax(x, alpha, dim, backend=BACKEND).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def calls() -> dict[str, Callable[[], None]]:
    long = 700 if DEVICE == "cuda" else 140
    alphas = torch.tensor([1.2, 1.5], device=DEVICE, requires_grad=True)
    lengths = torch.tensor([long, 37], device=DEVICE)
    return {
        "short": lambda: attend(65, 97, is_causal=True),
        "lists, causal": lambda: attend(long, long, is_causal=True),
        "lists, two blocks of rows a program": lambda: attend(long, long, spread=16.0),
        "rows that are not sparse": lambda: attend(long, long, spread=0.05, is_causal=True),
        "no structure": lambda: attend(long, long, spread=1.0),
        "wide heads": lambda: attend(130, long, dim=128, is_causal=True),
        "odd heads in float32": lambda: attend(130, long, dim=72, dtype=torch.float32, is_causal=True),
        "alpha of each head, with gradient": lambda: attend(130, long, alpha=alphas),
        "sparsemax with a window": lambda: attend(long, long, alpha=2.0, window=(100, 0)),
        "softmax": lambda: attend(130, long, alpha=1.0, is_causal=True),
        "lengths, dropout, ALiBi": lambda: attend(
            130, long, kv_lengths=lengths, dropout_p=0.2, alibi_slopes=torch.tensor([0.1, 0.5], device=DEVICE)
        ),
        "deterministic": lambda: attend(long, long, is_causal=True, deterministic=True),
        "key mask": lambda: attend(130, long, attn_mask=(torch.arange(long, device=DEVICE) % 3 > 0).expand(2, 1, 1, long)),
        "transform, short rows": lambda: transform(40, 33, 1.5),
        "transform, one row a program": lambda: transform(3, 3001, 2.0),
        "transform, other dimension": lambda: transform(100, 35, 1.5, 0),
        "transform, any alpha": lambda: transform(5, 600, torch.tensor(1.3, device=DEVICE, requires_grad=True)),
        "transform, chunks": lambda: transform(2, 40001 if DEVICE == "cuda" else 17001, 1.5),
        "transform, dense chunks": lambda: transform(2, 5001, 1.1),
    }


def main() -> int:
    for name, call in calls().items():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"done: {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
