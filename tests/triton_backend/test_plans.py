"""A launch finds its compiled kernel by a plan number: two launches with one number must agree in all that a binary depends on."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_triton import launch
from adasplash_triton.backend import TritonBackend

BACKEND = TritonBackend()
H100 = DeviceInfo("cuda", "H100", capability=(9, 0), multiprocessors=132, shared_memory=227 * 1024)


def binary_of(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    """Everything that Triton compiles into a kernel."""
    found: dict[str, Any] = dict(options)
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            found[parameter.name] = value
        elif parameter.name.isupper():
            found[parameter.name] = value.dtype, value.data_ptr() % 16 == 0
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found[parameter.name] = value == 1, value % 16 == 0
    return found


def draw_tensor(choose: random.Random, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    skipped = choose.choice([0, 0, 1, 8])
    flat = torch.zeros(batch * heads * length * dim + 8, dtype=dtype)[skipped : skipped + batch * heads * length * dim]
    return (
        flat.view(batch, heads, length, dim) if choose.random() < 0.5 else flat.view(batch, length, heads, dim).transpose(1, 2)
    )


def draw_arguments(choose: random.Random, batch: int, heads: int, kv_len: int) -> dict[str, Any]:
    mask: dict[str, Any] = choose.choice(
        [
            {},
            {"is_causal": True},
            {"kv_lengths": torch.full((batch,), kv_len)},
            {"attn_mask": torch.ones(batch, 1, 1, kv_len, dtype=torch.bool)},
        ]
    )
    alpha = choose.choice(
        [1.5, 1.5, 2.0, 1.2, torch.tensor(1.4), torch.tensor(1.4, requires_grad=True), torch.full((heads,), 1.3)]
    )
    drawn = {"alpha": alpha, "deterministic": choose.random() < 0.2, "return_stats": choose.random() < 0.3, **mask}
    if choose.random() < 0.2:
        drawn["window"] = (10, 3)
    if choose.random() < 0.2:
        drawn["alibi_slopes"] = torch.ones(heads, dtype=choose.choice([torch.float32, torch.bfloat16]))
    if choose.random() < 0.2:
        drawn["dropout_p"] = 0.1
    return drawn


def test_one_plan_one_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, Any], dict[str, Any]] = {}

    def record(kernel: Any, grid: object, arguments: dict[str, Any], plan: Any, **options: int) -> None:
        found = binary_of(kernel, arguments, options)
        assert seen.setdefault((kernel.__name__, plan), found) == found

    monkeypatch.setattr(launch, "run", record)
    choose = random.Random(0)
    for _ in range(150):
        dim, batch, dtype = (
            choose.choice([16, 24, 64, 128]),
            choose.choice([1, 2]),
            choose.choice([torch.float32, torch.bfloat16]),
        )
        q_len, kv_len = choose.choice([1, 7, 100, 500, 1500]), choose.choice([1, 33, 129, 500, 513, 1500])
        heads, kv_heads = choose.choice([(1, 1), (2, 1), (4, 4)])
        query = draw_tensor(choose, batch, heads, q_len, dim, dtype)
        key, value = (draw_tensor(choose, batch, kv_heads, kv_len, size, dtype) for size in (dim, choose.choice([dim, 64])))
        arguments = draw_arguments(choose, batch, heads, kv_len)
        call = make_call(query, key, value, enable_gqa=True, needs_grad=choose.random() < 0.8, **arguments)
        spec = call.spec.without_lengths()
        forward, backward = (
            dataclasses.replace(call, config=BACKEND.default_config(spec, H100, pass_)) for pass_ in ("forward", "backward")
        )
        result = launch.forward(forward)
        if call.spec.needs_grad:
            launch.backward(backward, torch.zeros_like(result.out), result.saved)
    assert len(seen) > 300
