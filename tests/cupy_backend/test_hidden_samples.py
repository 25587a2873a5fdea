"""Rows of which the sample behind the first bound sees no key, since a key mask hides all of it: any bound must still hold.

Scores lie far below -1, so that a bound of "max of nothing" would leave out every key.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from tests.cupy_backend.test_marking import BACKEND, SPLIT, check_lists, configured, mark
from tests.cupy_backend.test_marking import SMALL as MARKING
from tests.cupy_backend.test_passes import SMALL, check, run

TILE = 64
KEYS = 6 * TILE
SAMPLE = 3
HIDDEN = torch.arange(KEYS) // TILE % SAMPLE == 0
"""Every SAMPLE-th tile, which is the sample where all rows see the same range."""

PATHS: dict[str, dict[str, Any]] = {
    "lists on chip": {"least_list": 1 << 20, "keys": 64},
    "long lists": {"least_list": 32, "keys": 16},
    "lists given up": {"dense_percent": 0, "least_list": 16, "keys": 16},
    "no lists": {"list_percent": 0, "least_list": 0},
}

pytestmark = pytest.mark.usefixtures("_lists")


def call_of(
    allowed: torch.Tensor, alpha: float, *, q_len: int = 130, dim: int = 16, dtype: torch.dtype = torch.float32, **rest: Any
) -> AttentionCall:
    """Keys around one direction and queries against it: every z is -5, give or take 1; ``allowed``: (batch, keys)."""
    batch = len(allowed)
    direction = torch.nn.functional.normalize(torch.randn(dim), dim=0)
    key = direction + 0.2 * torch.randn(batch, 1, KEYS, dim) / dim**0.25
    query = -5 * dim**0.5 / (alpha - 1) * (direction + 0.02 * torch.randn(batch, 1, q_len, dim))
    value = torch.randn(batch, 1, KEYS, dim)
    operands = (x.to(dtype) for x in (query, key, value))
    return make_call(*operands, attn_mask=allowed[:, None, None], alpha=alpha, return_stats=True, **rest)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_selected_from_keys_that_were_not_sampled(alpha: float, path: str) -> None:
    check(call_of(~HIDDEN[None], alpha), 3e-5, **{**SMALL, "sample": SAMPLE, **PATHS[path]})


@pytest.mark.parametrize("path", PATHS)
def test_one_allowed_key_has_all_the_weight(path: str) -> None:
    allowed = torch.arange(KEYS)[None] == TILE + 5
    call = call_of(allowed, 1.5)
    found, grads, grad_out = run(call, **{**SMALL, "sample": SAMPLE, **PATHS[path]})
    torch.testing.assert_close(found.out, call.value[:, :, TILE + 5, None].expand_as(found.out), rtol=1e-6, atol=0)
    assert (found.support == 1).all()
    torch.testing.assert_close(grads.value[0, 0, TILE + 5], grad_out.sum((0, 1, 2)))


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_any_key_beside_rows_with_some(path: str) -> None:
    """In one batch with an empty sequence, and in one block of a causal window."""
    allowed = torch.stack([~HIDDEN, torch.zeros(KEYS, dtype=torch.bool), torch.arange(KEYS) >= TILE + 10])
    found = check(call_of(allowed, 1.5, q_len=2 * TILE, window=(KEYS, 0)), 3e-5, **{**SMALL, "sample": SAMPLE, **PATHS[path]})
    assert not found.out[1].any()
    assert not found.out[2, :, : TILE + 10].any()


def test_a_hidden_key_that_is_not_finite_stays_hidden() -> None:
    """It keeps its head from having lists, so that rows are solved over all keys, from the bound."""
    call = call_of(~HIDDEN[None], 1.5)
    want = oracle.attention(call).out
    call.key[0, 0, 3] = torch.nan
    found, _, _ = run(call, **{**SMALL, "sample": SAMPLE})
    assert oracle.relative_error(found.out, want) < 3e-5


@pytest.mark.parametrize("config", [{}, SPLIT, {"mark_follow": 0}], ids=["fused", "subtracted", "T stays"])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_marked_from_keys_that_were_not_sampled(alpha: float, config: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(~HIDDEN[None], alpha, q_len=140, dim=64, dtype=torch.float16)
    found = mark(call, monkeypatch, mark_sample=SAMPLE, **config)
    check_lists(call, found, bool(config.get("mark_follow", 1)))
    tau = oracle.attention(call).tau
    assert tau is not None
    assert (found.before <= tau / (1 if alpha in (1.5, 2.0) else alpha - 1) + found.margin + 1e-3).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alpha", [1.2, 1.5])
def test_output_over_marked_keys(alpha: float, path: str) -> None:
    allowed = torch.stack([~HIDDEN, torch.zeros(KEYS, dtype=torch.bool), torch.arange(KEYS) == 2 * TILE])
    call = call_of(allowed, alpha, q_len=140, dim=64, dtype=torch.float16)
    with poisoned_memory():
        found = BACKEND.forward(configured(call, **{**MARKING, **SPLIT, "mark_sample": SAMPLE, **PATHS[path]}))
    want = oracle.attention(call)
    assert oracle.relative_error(found.out, want.out) < 5e-3
    assert not found.out[1].any()
