"""The forward for short sequences: one kernel, its scores on chip, two warps a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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


def draw(q_len: int, kv_len: int, *, batch: int = 1, heads: int = 1, dim: int = 16, spread: float = 2.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (q_len, kv_len, kv_len)
    query, key, value = (torch.randn(batch, heads, n, dim, generator=generator).half() for n in lengths)
    return [query * spread, key, value]


CALLS: dict[str, Callable[[], AttentionCall]] = {
    "128 keys": lambda: make_call(*draw(40, 128), return_stats=True),
    "129 keys": lambda: make_call(*draw(40, 129), return_stats=True, alpha=2.0),
    "512 keys, causal": lambda: make_call(*draw(70, 512), is_causal=True, query_offset=440, return_stats=True),
    "one query": lambda: make_call(*draw(1, 300), return_stats=True),
    "a window that begins anywhere": lambda: make_call(*draw(90, 400), window=(37, 11), query_offset=101, return_stats=True),
    "padding, holes and an empty sequence": lambda: make_call(
        *draw(33, 260, batch=3),
        kv_lengths=torch.tensor([250, 0, 131]),
        attn_mask=torch.rand(3, 1, 1, 260, generator=torch.Generator().manual_seed(2)) < 0.7,
        return_stats=True,
    ),
    "dropout": lambda: make_call(*draw(40, 200, heads=2), dropout_p=0.3, return_stats=True),
    "another alpha": lambda: make_call(*draw(40, 200, heads=2), alpha=1.2, is_causal=True, return_stats=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_against_the_oracle(name: str) -> None:
    call = CALLS[name]()
    assert configs.short_tile(call.spec, call.key.shape[2]) > 0
    config = BACKEND.default_config(call.spec, device_info("cpu"), "forward")
    with poisoned_memory():
        found = BACKEND.forward(dataclasses.replace(call, config=config))
    want = oracle.attention(call)
    assert float((found.out.double() - want.out).norm() / want.out.norm()) < 1e-3
    assert found.tau is not None
    assert found.support is not None
    assert (found.tau - want.tau).abs().max() < 1e-5
    assert torch.equal(found.support, want.support.to(torch.int32))


@pytest.mark.parametrize("order", [1, 2])
def test_no_result_depends_on_the_order_of_threads(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(*draw(40, 400), is_causal=True, query_offset=350)
    call = dataclasses.replace(call, config=BACKEND.default_config(call.spec, device_info("cpu"), "forward"))
    first = BACKEND.forward(call).out
    monkeypatch.setattr(emulator, "order", order)
    assert torch.equal(first, BACKEND.forward(call).out)


@pytest.mark.parametrize(
    ("changes", "kv_len", "tile"),
    [
        ({}, 128, 64),
        ({}, 129, 128),
        ({}, 512, 256),
        ({}, 513, 0),
        ({"alpha_class": "any"}, 257, 0),
        ({"dtype": "float32"}, 256, 128),
        ({"head_dim": 128, "head_dim_v": 128}, 100, 0),
    ],
)
def test_which_calls_are_short(changes: dict[str, Any], kv_len: int, tile: int) -> None:
    call = make_call(*draw(1, 16, dim=64))
    assert configs.short_tile(dataclasses.replace(call.spec, **changes), kv_len) == tile
