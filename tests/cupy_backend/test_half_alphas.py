"""Any alpha in half precision, a head each: near 1 a series takes the logarithm's place, and where heads differ alpha 1.5 and 2 have no
formulas of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from adasplash_cupy import configs
from tests.cupy_backend import emulator

BACKEND = emulator.EmulatedCupyBackend()
ALPHAS = (1.0, 1 + 1e-6, 1.001, 1.0039, 1.0041, 1.05, 1.25, 1.5, 1.75, 1.999, 2.0)
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative errors, of which rounding the weights and the output makes most."""

PATHS: dict[str, dict[str, Any]] = {
    "lists on chip": {"keys": 64, "least_list": 1 << 20},
    "long lists": {
        "keys": 16,
        "select_keys": 64,
        "least_list": 32,
        "list_percent": 100,
        "dense_percent": 100,
        "dense_stages": 2,
    },
    "all keys": {"keys": 16, "select_keys": 64, "list_percent": 0, "least_list": 0},
}


def call_of(dtype: torch.dtype, kv_len: int, **rest: Any) -> AttentionCall:
    heads = len(ALPHAS)
    query, key, value = (torch.randn(1, heads, n, 16).to(dtype) for n in (40, kv_len, kv_len))
    alpha = torch.tensor(ALPHAS, dtype=torch.float64)
    return make_call(query * 3, key, value, alpha=alpha, is_causal=True, query_offset=kv_len - 40, return_stats=True, **rest)


def check(call: AttentionCall, **config: Any) -> None:
    base = BACKEND.default_config(call.spec, device_info("cpu"), "forward")
    with poisoned_memory():
        found = BACKEND.forward(dataclasses.replace(call, config=dataclasses.replace(base, **config)))
    want = oracle.attention(call)
    assert found.tau is not None
    assert want.tau is not None
    for head, alpha in enumerate(ALPHAS):
        assert oracle.relative_error(found.out[:, head], want.out[:, head]) < BOUNDS[call.query.dtype], alpha
        near = 2e-5 * want.tau[:, head].abs().clamp(min=1)
        assert ((found.tau[:, head] - want.tau[:, head]).abs() < near).all(), alpha


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kv_len", [60, 200])
def test_short_sequences(kv_len: int, dtype: torch.dtype) -> None:
    call = call_of(dtype, kv_len)
    assert configs.short_tile(call.spec, kv_len) > 0
    check(call)


@pytest.mark.usefixtures("_lists")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("path", PATHS)
def test_over_lists_and_all_keys(path: str, dtype: torch.dtype) -> None:
    check(call_of(dtype, 300), **PATHS[path])
