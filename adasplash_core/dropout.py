"""The dropout mask, defined once for all backends: a stateless Philox hash of the seed and the entry's place.

keep(b, h, i, j) = philox(key = seed, counter = (j, i, b * H + h, 0)).word0 / 2^32 >= dropout_p

with Philox-4x32 in 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
So the mask does not depend on tiling, the backward recomputes it, and two backends agree bit for bit. The seed is drawn by the
core from torch's generator on the query's device, outside the op, which stays a pure function of its inputs.
"""

from __future__ import annotations

import torch

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed, () int64 on the device, from torch's default generator there."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep(
    seed: torch.Tensor, head: torch.Tensor | int, row: torch.Tensor, column: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """Which entries stay: bool, of the broadcast shape of ``head`` (b * H + h), ``row`` and ``column`` (int64)."""
    return philox_word(seed, column, row, head) >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """Entries whose word is at least this are kept."""
    return min(round(dropout_p * 2**32), _WORD)


def philox_word(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, head: torch.Tensor | int) -> torch.Tensor:
    """Word 0 of Philox-4x32-7 at counter (c0, c1, head, 0), as int64 in [0, 2^32)."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c2 = torch.as_tensor(head, dtype=torch.int64, device=c0.device) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0 & _WORD, c1 & _WORD, c2, torch.zeros_like(c0))
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product. int64 wraps, so the high word comes from 16-bit halves."""
    low = (a * (b & 0xFFFF)) & ((1 << 48) - 1)
    high = a * (b >> 16)
    middle = high + (low >> 16)
    return (middle >> 16) & _WORD, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
