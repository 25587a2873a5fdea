"""Row intervals equal the written rules, applied key by key in plain Python."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_core.call import make_call
from adasplash_core.masking import row_intervals, visible_keys


def visible(i: int, j: int, b: int, q_len: int, kv_len: int, a: dict[str, Any]) -> bool:
    """The rules of the docs, for query i and key j of sequence b."""
    start = int(a["kv_starts"][b]) if a.get("kv_starts") is not None else 0
    end = int(a["kv_lengths"][b]) if a.get("kv_lengths") is not None else kv_len
    offset = a.get("query_offset") or 0
    if a.get("causal_alignment") == "bottom_right":
        offset = end - q_len
    left, right = a.get("window") or (-1, -1)
    d = i + int(offset)
    return (
        start <= j < end
        and (not a.get("is_causal") or j <= d)
        and (left < 0 or j >= d - left)
        and (right < 0 or j <= d + right)
    )


@st.composite
def arguments(draw: st.DrawFn) -> tuple[int, int, int, dict[str, Any]]:
    batch, q_len, kv_len = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 7))
    lengths = st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch).map(torch.tensor)
    a: dict[str, Any] = {
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(st.integers(-1, 5), st.integers(-1, 5))),
        "kv_lengths": draw(st.none() | lengths),
        "kv_starts": draw(st.none() | lengths),
        "causal_alignment": draw(st.sampled_from(["top_left", "bottom_right"])),
    }
    if a["causal_alignment"] == "top_left":
        a["query_offset"] = draw(st.none() | st.integers(-3, 8) | st.integers(-3, 8).map(torch.tensor))
    return batch, q_len, kv_len, a


@given(arguments())
@settings(max_examples=150, deadline=None)
def test_intervals_are_the_rules_applied_key_by_key(drawn: tuple[int, int, int, dict[str, Any]]) -> None:
    batch, q_len, kv_len, a = drawn
    call = make_call(torch.zeros(batch, 1, q_len, 4), torch.zeros(batch, 1, kv_len, 4), torch.zeros(batch, 1, kv_len, 4), **a)
    lo, hi, _ = (bound.expand(batch, q_len) for bound in row_intervals(call))
    counts = visible_keys(call).expand(batch, 1, q_len)
    for b in range(batch):
        for i in range(q_len):
            expected = [visible(i, j, b, q_len, kv_len, a) for j in range(kv_len)]
            assert [int(lo[b, i]) <= j < int(hi[b, i]) for j in range(kv_len)] == expected
            assert int(counts[b, 0, i]) == sum(expected)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["top_left", "bottom_right"]),
    st.none() | st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
)
@settings(max_examples=100, deadline=None)
def test_packed_intervals_are_each_sequence_by_itself(lengths: Any, causal: bool, alignment: str, window: Any) -> None:
    cu_q = torch.tensor([0] + [q for q, _ in lengths]).cumsum(0)
    cu_k = torch.tensor([0] + [k for _, k in lengths]).cumsum(0)
    total_q, total_k = int(cu_q[-1]) + 1, int(cu_k[-1])  # one query belongs to no sequence and sees nothing
    call = make_call(
        torch.zeros(1, 1, total_q, 4), torch.zeros(1, 1, total_k, 4), torch.zeros(1, 1, total_k, 4), is_causal=causal,
        causal_alignment=alignment, window=window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=4, max_seqlen_k=5,
    )  # fmt: skip
    lo, hi, diagonal = row_intervals(call)
    for s, (q_len, kv_len) in enumerate(lengths):
        for i in range(q_len):
            row = int(cu_q[s]) + i
            rules = {"is_causal": causal, "causal_alignment": alignment, "window": window}
            seen = [int(lo[0, row]) <= int(cu_k[s]) + j < int(hi[0, row]) for j in range(kv_len)]
            assert seen == [visible(i, j, 0, q_len, kv_len, rules) for j in range(kv_len)]
            assert int(hi[0, row] - lo[0, row]) <= kv_len
            assert int(diagonal[0, row] - cu_k[s]) == i + (kv_len - q_len if alignment == "bottom_right" else 0)
    assert int(hi[0, -1]) <= int(lo[0, -1])


def test_visible_keys_counts_key_masks_with_holes_and_dense_masks() -> None:
    x = torch.zeros(2, 3, 5, 4)
    holes = torch.rand(2, 1, 1, 5) < 0.5
    assert torch.equal(visible_keys(make_call(x, x, x, attn_mask=holes)).expand(2, 3, 5), holes.sum(-1).expand(2, 3, 5))
    dense = torch.rand(2, 3, 5, 5) < 0.5
    assert torch.equal(visible_keys(make_call(x, x, x, attn_mask=dense)), dense.sum(-1))
    additive = torch.where(dense, 0.5, -torch.inf)
    assert torch.equal(visible_keys(make_call(x, x, x, attn_mask=additive)), dense.sum(-1))
    row_mask = torch.tensor([True, False, True, True, False])[:, None]
    windowed = visible_keys(make_call(x, x, x, attn_mask=row_mask, window=(1, 1)))
    assert windowed.expand(2, 1, 5)[0, 0].tolist() == [2, 0, 3, 3, 0]
