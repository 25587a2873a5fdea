"""Masks as structure say what transformers' dense masks say, and nothing on a device is read for them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as hf

from adasplash_core.integrations.hf_masks import StructuredMask, entmax_mask
from tests.integrations.models import DENSE, FAMILIES, LLAMA, MODERNBERT, Family


def dense(mask: Any, batch: int, q_length: int, kv_length: int) -> torch.Tensor:
    """Boolean (B, 1, Lq, Lk) of a mask as structure."""
    assert isinstance(mask, StructuredMask)
    diagonal = torch.arange(q_length)[:, None] + mask.query_offset
    key = torch.arange(kv_length)
    seen = torch.ones(batch, 1, q_length, kv_length, dtype=torch.bool)
    if mask.left >= 0:
        seen = seen & (key >= diagonal - mask.left)
    if mask.right >= 0:
        seen = seen & (key <= diagonal + mask.right)
    if mask.keys is not None:
        seen = seen & mask.keys[:, None, None]
    if mask.cu_seqlens is not None:
        token = torch.arange(batch * q_length)
        sequence = torch.searchsorted(mask.cu_seqlens.long(), token, right=True).view(batch, q_length)
        seen = seen & (sequence[:, None, :, None] == sequence[:, None, None, :])
    return seen


def expected(**arguments: Any) -> torch.Tensor:
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return hf.sdpa_mask(**arguments).expand(arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Lengths and offsets as caches give them: growing, sliding, static and partly filled."""
    batch, q_length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    past = draw(st.integers(0, 9))
    kind = draw(st.sampled_from(["growing", "sliding", "static"]))
    kv_offset = draw(st.integers(0, past)) if kind == "sliding" else 0
    spare = draw(st.integers(0, 5)) if kind == "static" else 0
    kv_length = past + q_length - kv_offset + spare
    padded = draw(st.booleans())
    attention_mask = None
    if padded:
        known = past + q_length
        attention_mask = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * known, max_size=batch * known)))
        attention_mask = attention_mask.view(batch, known)
    return {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(past) if kind == "static" else past,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "config": SimpleNamespace(),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "use_vmap": False,
    }


@settings(max_examples=150, deadline=None)
@given(arguments=sizes(), window=st.one_of(st.none(), st.integers(1, 6)), skip=st.booleans())
def test_causal_and_sliding_masks(arguments: dict[str, Any], window: int | None, skip: bool) -> None:
    arguments |= {"mask_function": hf.causal_mask_function, "allow_is_causal_skip": skip}
    if window is not None:
        arguments |= {"mask_function": hf.sliding_window_causal_mask_function(window), "local_size": window}
    mask = entmax_mask(**arguments)
    sizes_ = (arguments["batch_size"], arguments["q_length"], arguments["kv_length"])
    assert torch.equal(dense(mask, *sizes_), expected(**arguments))


@settings(max_examples=100, deadline=None)
@given(arguments=sizes(), window=st.one_of(st.none(), st.integers(1, 6)))
def test_bidirectional_masks(arguments: dict[str, Any], window: int | None) -> None:
    arguments |= {
        "mask_function": hf.bidirectional_mask_function,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
    }
    if window is not None:
        arguments |= {"mask_function": hf.sliding_window_bidirectional_mask_function(window), "local_size": window}
    mask = entmax_mask(**arguments)
    sizes_ = (arguments["batch_size"], arguments["q_length"], arguments["kv_length"])
    assert torch.equal(dense(mask, *sizes_), expected(**arguments))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 4)),
)
def test_packed_masks(lengths: list[int], rows: int, window: int | None) -> None:
    """Through transformers' own functions, which see the packing in the position ids."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(rows, -1)
    make = hf.create_causal_mask if window is None else hf.create_sliding_window_causal_mask
    embedded = torch.zeros(rows, sum(lengths), 4)
    cache = "cache" if "cache" in inspect.signature(make).parameters else "past_key_values"
    masks = []
    for implementation in ("entmax", DENSE):
        config = LLAMA.make("eager").config
        config._attn_implementation = implementation
        config.sliding_window = window
        masks.append(make(config, embedded, attention_mask=None, position_ids=positions, **{cache: None}))
    assert torch.equal(dense(masks[0], rows, sum(lengths), sum(lengths)), masks[1])


def union(arguments: dict[str, Any]) -> dict[str, Any]:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    return arguments | {"mask_function": hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: blocks[b, q] == blocks[b, k])}


def chunked(arguments: dict[str, Any]) -> dict[str, Any]:
    function = hf.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    return arguments | {"mask_function": function, "local_size": 3, "config": SimpleNamespace(attention_chunk_size=3)}


def own(arguments: dict[str, Any]) -> dict[str, Any]:
    function = hf.and_masks(hf.causal_mask_function, lambda b, h, q, k: (q + k) % 2 == 0)
    return arguments | {"mask_function": function, "use_vmap": True}


def masked_from_outside(arguments: dict[str, Any]) -> dict[str, Any]:
    function = hf.and_masks(hf.causal_mask_function, lambda b, h, q, k: (q + k) % 2 == 0)
    return arguments | {"mask_function": function, "attention_mask": torch.tensor([[True] * 5 + [False]])}


@pytest.mark.parametrize("case", [union, chunked, own, masked_from_outside])
def test_other_masks_are_dense(case: Any) -> None:
    arguments = case({
        "batch_size": 1, "q_length": 6, "kv_length": 6, "q_offset": 0, "kv_offset": 0, "attention_mask": None,
        "config": SimpleNamespace(), "dtype": torch.float32, "device": torch.device("cpu"), "use_vmap": False,
        "allow_is_causal_skip": False,
    })  # fmt: skip
    mask = entmax_mask(**arguments)
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, expected(**arguments))


def test_blocks_that_look_ahead_are_not_mistaken_for_packed_sequences() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    looking_ahead = hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: blocks[b, q] == blocks[b, k])
    function = hf.and_masks(looking_ahead, hf.packed_sequence_mask_function(torch.zeros(1, 6, dtype=torch.long)))
    with pytest.raises(RuntimeError, match="does not know this combination"):
        entmax_mask(batch_size=1, q_length=6, kv_length=6, mask_function=function, allow_is_causal_skip=False)


def test_an_offset_is_the_one_at_the_time() -> None:
    """Static caches move their length in place before the first layer attends."""
    length = torch.tensor(3)
    mask = entmax_mask(batch_size=1, q_length=2, kv_length=8, q_offset=length)
    length.add_(2)
    assert isinstance(mask, StructuredMask)
    assert mask.query_offset == 3


def test_a_mask_made_in_advance_is_kept() -> None:
    mask = StructuredMask(-1, 0, 5)
    assert entmax_mask(batch_size=1, q_length=1, kv_length=8, attention_mask=mask) is mask
    assert mask.ndim == mask.dim() == 4
    assert mask.contiguous() is mask


def test_a_mask_moves_between_devices() -> None:
    """As accelerate moves it between the layers of a model that lives on several."""
    from accelerate.utils import send_to_device

    mask = StructuredMask(4, 0, torch.tensor(3), keys=torch.ones(1, 4, dtype=torch.bool))
    moved = send_to_device({"attention_mask": mask}, "meta")["attention_mask"]
    assert isinstance(moved, StructuredMask)
    assert moved.keys is not None
    assert moved.keys.device.type == moved.query_offset.device.type == "meta"
    assert (moved.left, moved.right, moved.cu_seqlens) == (4, 0, None)


@pytest.mark.parametrize("kind", ["boolean", "additive", "per head"])
def test_the_users_own_four_dimensional_mask(kind: str) -> None:
    ours, reference = LLAMA.pair()
    inputs = LLAMA.inputs(batch=2, length=9)
    generator = torch.Generator().manual_seed(0)
    heads = 4 if kind == "per head" else 1
    mask = torch.rand(2, heads, 9, 9, generator=generator) < 0.6
    mask = mask | torch.eye(9, dtype=torch.bool)
    wanted = reference(**inputs, attention_mask=mask).logits
    given = torch.where(mask, 0.0, -torch.inf).double() if kind == "additive" else mask
    torch.testing.assert_close(ours(**inputs, attention_mask=given).logits, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.text], ids=lambda f: f.name)
@pytest.mark.parametrize("given", ["nothing", "padding", "packing"])
def test_nothing_on_a_device_is_read(family: Family, given: str) -> None:
    """Fake tensors have no values: whatever asked for one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs: dict[str, Any] = {k: v for k, v in family.inputs().items() if k != "labels"}
    if given == "padding":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if given == "packing":
        inputs["position_ids"] = torch.arange(24)[None].expand(2, -1) % 8
    if family.causal:
        inputs["use_cache"] = given != "packing"
    model = family.make("entmax")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with torch.no_grad():
            assert model(**fake).logits.shape[:2] == (2, 24)


def test_memory_of_a_long_mask_is_linear() -> None:
    config = MODERNBERT.make("entmax").config
    embedded = torch.empty(1, 100_000, 0)
    padding = torch.ones(1, 100_000, dtype=torch.bool)
    local = hf.create_bidirectional_sliding_window_mask(config, embedded, padding)
    everywhere = hf.create_bidirectional_mask(config, embedded, padding)
    assert isinstance(local, StructuredMask)
    assert local.keys is not None
    assert local.keys.numel() == everywhere.keys.numel() == 100_000
