"""Hypothesis strategies: calls with any mix of masks, alphas and memory layouts that may be given together."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.testing.inputs import LAYOUTS


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def calls(draw: st.DrawFn) -> AttentionCall:
    """Small calls with any mix of masks that may be given together."""
    batch, q_len, kv_len = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads, seed = kv_heads * group, draw(st.integers(0, 99))
    arguments: dict[str, object] = {"enable_gqa": True, "alpha": draw(st.sampled_from([1.0, 1.2, 1.5, 1.75, 2.0]))}
    if draw(st.booleans()):
        arguments["alpha"] = torch.tensor([1.1, 1.5, 1.0, 2.0][:heads], dtype=torch.float64)
    integer = st.integers(0, kv_len)
    if draw(st.booleans()):
        arguments["kv_lengths"] = torch.tensor([draw(integer) for _ in range(batch)])
    if draw(st.booleans()):
        arguments["kv_starts"] = torch.tensor([draw(integer) for _ in range(batch)])
    if draw(st.booleans()):
        arguments["window"] = (draw(st.integers(-1, 4)), draw(st.integers(-1, 4)))
    place = draw(st.sampled_from(["none", "bottom_right", "number", "tensor"]))
    if place == "bottom_right":
        arguments["causal_alignment"] = "bottom_right"
    elif place == "number":
        arguments["query_offset"] = draw(st.integers(-3, 7))
    elif place == "tensor":
        arguments["query_offset"] = torch.tensor([draw(st.integers(-3, 7)) for _ in range(batch)])
    if draw(st.booleans()):
        arguments["alibi_slopes"] = torch.tensor([0.5, 0.1, 0.0, 1.0][:heads])
    if draw(st.booleans()):
        arguments["dropout_p"] = 0.4
    mask = draw(st.sampled_from(["none", "causal", "key", "bool", "additive"]))
    if mask == "causal":
        arguments["is_causal"] = True
    elif mask == "key":
        arguments["attn_mask"] = random(draw(st.sampled_from([1, batch])), 1, 1, kv_len, seed=seed) > 0
    elif mask != "none":
        shape = (
            draw(st.sampled_from([1, batch])),
            draw(st.sampled_from([1, heads])),
            draw(st.sampled_from([1, q_len])),
            kv_len,
        )
        values = random(*shape, seed=seed)
        additive = torch.where(values > 1, -torch.inf, values)
        arguments["attn_mask"] = values.expand(-1, heads, q_len, -1) > 0 if mask == "bool" else additive
    query = random(batch, heads, q_len, 4, seed=seed)
    key, value = random(batch, kv_heads, kv_len, 4, seed=seed + 1), random(batch, kv_heads, kv_len, 3, seed=seed + 2)
    if layout := draw(st.sampled_from([None, *LAYOUTS])):
        query, key, value = (LAYOUTS[layout](x) for x in (query, key, value))
    return make_call(query, key, value, scale=draw(st.sampled_from([0.5, 3.0, -1.0])), **arguments)
