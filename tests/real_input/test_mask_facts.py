"""A boolean mask is explained by a rule only if the rule gives back every entry of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_core.capture import mask_facts


def mask_of(q_len, kv_len, *, causal=False, window=(-1, -1), starts=(0,), lengths=None):
    """The mask that attention()'s arguments describe, (B, 1, Lq, Lk), entry by entry."""
    lengths = lengths or [kv_len] * len(starts)
    mask = torch.zeros(len(starts), 1, q_len, kv_len, dtype=torch.bool)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for i in range(q_len):
            for j in range(start, length):
                if causal and j > i:
                    continue
                if (window[0] >= 0 and i - j > window[0]) or (window[1] >= 0 and j - i > window[1]):
                    continue
                mask[b, 0, i, j] = True
    return mask


def as_mask(facts, q_len, kv_len, batch):
    if facts.attn_mask is not None:
        return facts.attn_mask
    starts = [0] * batch if facts.kv_starts is None else facts.kv_starts.tolist()
    lengths = [kv_len] * batch if facts.kv_lengths is None else facts.kv_lengths.tolist()
    return mask_of(q_len, kv_len, causal=facts.is_causal, window=facts.window or (-1, -1), starts=starts, lengths=lengths)


@pytest.mark.parametrize(
    ("mask", "causal", "window", "starts", "lengths"),
    [
        (mask_of(6, 6), False, None, None, None),
        (mask_of(6, 6, causal=True), True, None, None, None),
        (mask_of(6, 6, causal=True, window=(2, 0)), True, (2, 0), None, None),
        (mask_of(6, 6, window=(1, 2)), False, (1, 2), None, None),
        (mask_of(6, 6, starts=(0, 2)), False, None, [0, 2], None),
        (mask_of(6, 6, causal=True, starts=(0, 2)), True, None, [0, 2], None),
        (mask_of(6, 6, causal=True, starts=(0, 0), lengths=[6, 3]), True, None, None, [6, 3]),
        (mask_of(6, 6, window=(1, 1), starts=(1, 0), lengths=[6, 4]), False, (1, 1), [1, 0], [6, 4]),
    ],
)
def test_rules_are_found(mask, causal, window, starts, lengths):
    facts = mask_facts(mask)
    found = [None if t is None else t.tolist() for t in (facts.kv_starts, facts.kv_lengths)]
    assert (facts.is_causal, facts.window, *found, facts.attn_mask) == (causal, window, starts, lengths, None)


@st.composite
def structured(draw):
    size = draw(st.integers(1, 9))
    batch = draw(st.integers(1, 3))
    bounds = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2))) for _ in range(batch)]
    return mask_of(
        size,
        size,
        causal=draw(st.booleans()),
        window=(draw(st.integers(-1, size)), draw(st.integers(-1, size))),
        starts=[start for start, _ in bounds],
        lengths=[length for _, length in bounds],
    )


@settings(deadline=None, max_examples=150)
@given(structured())
def test_facts_give_the_mask_back(mask):
    batch, _, q_len, kv_len = mask.shape
    assert torch.equal(as_mask(mask_facts(mask), q_len, kv_len, batch), mask)


@settings(deadline=None, max_examples=150)
@given(structured(), st.integers(0, 2**16))
def test_one_changed_entry_is_never_lost(mask, where):
    batch, _, q_len, kv_len = mask.shape
    mask = mask.clone()
    mask.view(-1)[where % mask.numel()] ^= True
    assert torch.equal(as_mask(mask_facts(mask), q_len, kv_len, batch), mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[[[True, False, True]]]]),
        torch.zeros(1, 1, 2, 2, dtype=torch.bool),
        torch.zeros(1, 1, 2, 2),
        torch.ones(1, 2, 2, 2, dtype=torch.bool),
        torch.block_diag(*[torch.ones(2, 2)] * 3).bool()[None, None],
    ],
    ids=["hole", "nothing visible", "additive", "by head", "packed"],
)
def test_other_masks_are_kept_whole(mask):
    assert mask_facts(mask).attn_mask is mask
