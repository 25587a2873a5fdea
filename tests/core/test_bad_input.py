"""Every wrong call gets an exception that names the rule and the values, and says what to do."""

from __future__ import annotations

import math
import re

import pytest
import torch

import adasplash_core
from adasplash_core import errors

H, HKV, LQ, LK, E = 4, 2, 6, 7, 8


def qkv(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "query": torch.randn(2, H, LQ, E),
        "key": torch.randn(2, H, LK, E),
        "value": torch.randn(2, H, LK, E),
    }
    return {**base, **changes}


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def packed(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "query": torch.randn(1, H, 6, E),
        "key": torch.randn(1, H, 7, E),
        "value": torch.randn(1, H, 7, E),
        "cu_seqlens_q": ints(0, 2, 6),
        "cu_seqlens_k": ints(0, 3, 7),
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    return {**base, **changes}


VALUE, TYPE = (errors.ArgumentError, ValueError), (errors.ArgumentTypeError, TypeError)

BAD = {
    "not a tensor": (qkv(query=[1.0]), TYPE, "query must be a tensor.*list"),
    "rank 1": (dict.fromkeys(("query", "key", "value"), torch.randn(3)), VALUE, r"same number of dimensions.*\(3,\)"),
    "unequal ranks": (qkv(key=torch.randn(H, LK, E)), VALUE, r"same number of dimensions.*\(4, 7, 8\)"),
    "batch": (qkv(key=torch.randn(3, H, LK, E), value=torch.randn(3, H, LK, E)), VALUE, r"same batch sizes.*\(3, 4, 7, 8\)"),
    "head dim": (qkv(key=torch.randn(2, H, LK, E + 1)), VALUE, "same head dim.*9"),
    "head dim 0": (dict.fromkeys(("query", "key", "value"), torch.randn(2, H, LK, 0)), VALUE, "head dim.*at least 1"),
    "key and value lengths": (qkv(value=torch.randn(2, H, LK + 1, E)), VALUE, "key and value must have the same length.*8"),
    "key and value heads": (qkv(value=torch.randn(2, 1, LK, E)), VALUE, "key and value must have the same number of heads"),
    "heads without enable_gqa": (
        qkv(key=torch.randn(2, HKV, LK, E), value=torch.randn(2, HKV, LK, E)),
        VALUE,
        "key has 2 heads and query 4.*pass enable_gqa=True",
    ),
    "heads that do not divide": (
        qkv(key=torch.randn(2, 3, LK, E), value=torch.randn(2, 3, LK, E), enable_gqa=True),
        VALUE,
        "multiple of the key's.*4 query heads and 3 key heads",
    ),
    "mixed dtypes": (qkv(value=torch.randn(2, H, LK, E).double()), TYPE, "one dtype.*float32.*float64.*autocast"),
    "integers": (qkv(query=torch.zeros(2, H, LQ, E, dtype=torch.int64)), TYPE, "query must be float16.*int64"),
    "complex": (qkv(key=torch.zeros(2, H, LK, E, dtype=torch.complex64)), TYPE, "key must be float16.*complex64"),
    "mixed devices": (qkv(key=torch.randn(2, H, LK, E, device="meta")), VALUE, "one device.*cpu, meta, cpu"),
    "alpha below 1": (qkv(alpha=0.5), VALUE, "alpha must be at least 1.*alpha=0.5.*1.5 is the usual"),
    "alpha above 2": (qkv(alpha=2.5), VALUE, "at most 2.*alpha=2.5"),
    "alpha NaN": (qkv(alpha=math.nan), VALUE, "alpha=nan"),
    "alpha a string": (qkv(alpha="1.5"), TYPE, "alpha must be a number.*'1.5'"),
    "alpha of wrong shape": (qkv(alpha=torch.full((H + 1,), 1.5)), VALUE, r"shape \(\) or \(heads,\) = \(4,\).*\(5,\)"),
    "alpha of integers": (qkv(alpha=torch.tensor(1)), TYPE, "alpha must be a number or a floating point tensor.*int64"),
    "dropout 1": (qkv(dropout_p=1.0), VALUE, "dropout_p must be at least 0 and less than 1.*1.0"),
    "dropout negative": (qkv(dropout_p=-0.1), VALUE, "dropout_p.*-0.1"),
    "scale NaN": (qkv(scale=math.nan), VALUE, "scale must be a finite number.*nan"),
    "scale a tensor": (qkv(scale=torch.tensor(0.1)), TYPE, "scale must be a number.*multiply the query"),
    "attn_mask with is_causal": (
        qkv(attn_mask=torch.ones(LQ, LK, dtype=torch.bool), is_causal=True),
        VALUE,
        "attn_mask and is_causal exclude each other.*kv_lengths",
    ),
    "attn_mask of wrong shape": (qkv(attn_mask=torch.ones(LQ, LK + 1, dtype=torch.bool)), VALUE, r"broadcastable to.*\(6, 8\)"),
    "attn_mask of integers": (qkv(attn_mask=torch.ones(LQ, LK, dtype=torch.int32)), TYPE, "attn_mask must be a boolean.*int32"),
    "attn_mask with packed": (packed(attn_mask=torch.ones(6, 7, dtype=torch.bool)), VALUE, "Packed input.*attn_mask"),
    "kv_lengths with packed": (packed(kv_lengths=ints(7)), VALUE, "Packed input.*kv_lengths"),
    "kv_lengths of wrong shape": (qkv(kv_lengths=ints(1, 2, 3)), VALUE, r"kv_lengths must have shape \(2,\).*\(3,\)"),
    "kv_lengths of floats": (qkv(kv_lengths=torch.ones(2)), TYPE, "kv_lengths must be an int32 or int64.*float32"),
    "kv_starts a list": (qkv(kv_starts=[0, 1]), TYPE, "kv_starts must be an int32 or int64.*list"),
    "cu_seqlens without max_seqlen": (packed(max_seqlen_q=None), VALUE, "together.*no max_seqlen_q.*longest"),
    "cu_seqlens of one side": (packed(cu_seqlens_k=None), VALUE, "together.*no cu_seqlens_k"),
    "cu_seqlens of unequal lengths": (packed(cu_seqlens_k=ints(0, 7)), VALUE, r"same length.*\(3,\) and \(2,\)"),
    "cu_seqlens of floats": (packed(cu_seqlens_q=torch.ones(3)), TYPE, "cu_seqlens_q must be an int32 or int64.*float32"),
    "cu_seqlens of rank 2": (
        packed(cu_seqlens_q=ints(0, 2, 6)[None]),
        VALUE,
        r"cu_seqlens_q must have shape \(sequences \+ 1,\)",
    ),
    "max_seqlen a tensor": (packed(max_seqlen_k=torch.tensor(4)), TYPE, "max_seqlen_k must be an integer"),
    "packed with a batch": (
        {**packed(), **{n: torch.randn(2, H, 6, E) for n in ("query", "key", "value")}},
        VALUE,
        r"Packed input must be \(1, heads, total, head_dim\).*batch size 2",
    ),
    "alignment": (qkv(causal_alignment="middle"), VALUE, '"top_left" or "bottom_right".*middle'),
    "offset with bottom_right": (qkv(query_offset=1, causal_alignment="bottom_right"), VALUE, "both say where"),
    "offset a float": (qkv(query_offset=1.0), TYPE, "query_offset must be an integer.*1.0"),
    "window one number": (qkv(window=3), TYPE, "window must be \\(left, right\\).*3"),
    "window below -1": (qkv(window=(-2, 0)), VALUE, "at least -1.*-2"),
    "alibi of wrong shape": (qkv(alibi_slopes=torch.ones(H + 1)), VALUE, r"alibi_slopes must have shape.*\(5,\)"),
    "alibi with gradient": (
        qkv(alibi_slopes=torch.ones(H, requires_grad=True)),
        VALUE,
        "alibi_slopes gets no gradient.*detach",
    ),
    "unknown backend": (qkv(backend="torhc"), (errors.UnknownBackendError, ValueError), "No backend is named 'torhc'.*'torch'"),
    "config that is no pass": (
        qkv(config={"chunk": 1}),
        (errors.ConfigError, ValueError),
        "'chunk'.*no pass.*forward, backward",
    ),
    "config with unknown fields": (
        qkv(config={"forward": {"no_such_field": 1}}, backend="torch"),
        (errors.ConfigError, ValueError),
        "has no field 'no_such_field'.*Its fields are",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=[name.replace(" ", "-") for name in BAD])
def test_a_wrong_call_raises_the_rule_the_values_and_a_hint(case: str) -> None:
    arguments, classes, message = BAD[case]
    with pytest.raises(classes[0]) as caught:
        adasplash_core.attention(**arguments)  # type: ignore[arg-type]
    assert isinstance(caught.value, classes[1])
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_an_explicit_backend_that_cannot_says_why_and_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from adasplash_core import plugins

    reference = plugins.registry().backend("torch")
    monkeypatch.setattr(type(reference), "features", reference.features - {"window"})
    with pytest.raises(errors.BackendUnsupportedError, match="sliding windows not supported") as caught:
        adasplash_core.attention(**qkv(window=(2, 2), backend="torch"))  # type: ignore[arg-type]
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (qkv(alpha=torch.tensor(2.5)), "alpha must be.*2.5"),
        (qkv(kv_lengths=ints(3, LK + 1)), "kv_lengths must be from 0 to the key length 7.*8"),
        (qkv(kv_starts=ints(-1, 0)), "kv_starts.*-1"),
        (packed(cu_seqlens_q=ints(0, 2, 5)), "cu_seqlens_q must rise from 0 to the total length 6.*5"),
        (packed(cu_seqlens_k=ints(0, 6, 7)), "max_seqlen_k = 4.*6"),
    ],
    ids=["alpha", "kv_lengths", "kv_starts", "cu_seqlens total", "cu_seqlens step"],
)
def test_values_on_the_device_are_checked_in_debug_mode_and_clamped_otherwise(
    arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adasplash_core.attention(**arguments).isfinite().all()  # type: ignore[arg-type, union-attr]
    monkeypatch.setenv("ADASPLASH_DEBUG", "1")
    with pytest.raises(errors.DebugCheckError, match=message):
        adasplash_core.attention(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "classes", "message"),
    [
        ({"x": [1.0]}, TYPE, "x must be a float16.*list"),
        ({"x": torch.ones(3, dtype=torch.int64)}, TYPE, "x must be.*int64"),
        ({"x": torch.ones(3), "dim": 1}, VALUE, "dim must be a dimension of x, which has 1.*dim=1"),
        ({"x": torch.tensor(1.0)}, VALUE, "dim must be a dimension"),
        ({"x": torch.ones(3), "alpha": 3}, VALUE, "alpha=3"),
        ({"x": torch.ones(2, 3), "alpha": torch.full((2, 3), 1.5)}, VALUE, r"broadcastable to \(2, 1\).*\(2, 3\)"),
        ({"x": torch.ones(3), "backend": "nope"}, (errors.UnknownBackendError, ValueError), "nope"),
    ],
)
def test_a_wrong_transform_raises(arguments: dict[str, object], classes: tuple[type, type], message: str) -> None:
    with pytest.raises(classes[0], match=message) as caught:
        adasplash_core.entmax(**arguments)  # type: ignore[arg-type]
    assert isinstance(caught.value, classes[1])
