"""What is captured is what the model computed with: softmax attention over it gives the model's own attention output."""

from __future__ import annotations

import pytest
import torch

from adasplash_core.capture import capture_layers, select_layers
from adasplash_core.errors import ArgumentError

from .conftest import FAMILIES, VOCABULARY

LENGTH = 20


def some_tokens(batch: int) -> torch.Tensor:
    return torch.randint(4, len(VOCABULARY), (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def model_outputs(model: torch.nn.Module, family: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
    """What each layer's attention gives to its output projection, (B, L, H * E), with transformers' eager attention."""
    outputs: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in range(model.config.num_hidden_layers):
        projection = model.get_submodule(FAMILIES[family][1].format(layer))
        hooks.append(
            projection.register_forward_pre_hook(lambda _, args, layer=layer: outputs.update({layer: args[0].detach()}))
        )
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family in ("gpt2", "bert") and attention_mask is not None and not attention_mask[:, 0].all():
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs


def softmax_attention(layer) -> torch.Tensor:
    """Dense softmax attention of a captured layer, in the meaning that attention()'s arguments have: (B, L, H * E)."""
    query, key, value = layer.query.double(), layer.key.double(), layer.value.double()
    batch, heads, q_len, _ = query.shape
    group, kv_len = heads // key.shape[1], key.shape[2]
    scores = query @ key.repeat_interleave(group, 1).mT * layer.scale
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    visible = torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool)
    if layer.is_causal:
        visible &= j <= i
    if layer.window is not None:
        left, right = layer.window
        if left >= 0:
            visible &= i - j <= left
        if right >= 0:
            visible &= j - i <= right
    if layer.kv_starts is not None:
        visible &= j >= layer.kv_starts[:, None, None, None]
    if layer.kv_lengths is not None:
        visible &= j < layer.kv_lengths[:, None, None, None]
    if layer.attn_mask is not None:
        visible &= layer.attn_mask
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)


def padded(side: str) -> torch.Tensor:
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, :5] = 0
    mask[2, :11] = 0
    return mask if side == "left" else mask.flip(1)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_attention_over_what_is_captured_is_the_models_own(build, family, padding):
    model = build(family)
    input_ids = some_tokens(3)
    mask = None if padding == "none" else padded(padding)
    expected = model_outputs(model, family, input_ids, mask)
    layers = capture_layers(model, input_ids, mask, layers=[0, 1, 2])
    assert [layer.index for layer in layers] == [0, 1, 2]
    real = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    for layer in layers:
        torch.testing.assert_close(softmax_attention(layer)[real], expected[layer.index][real].double(), rtol=1e-3, atol=1e-3)


def facts(layer):
    lengths = None if layer.kv_lengths is None else layer.kv_lengths.tolist()
    starts = None if layer.kv_starts is None else layer.kv_starts.tolist()
    return layer.is_causal, layer.window, starts, lengths, layer.attn_mask


@pytest.mark.parametrize(
    ("family", "index", "causal", "window"),
    [
        ("llama", 1, True, None),
        ("gpt2", 1, True, None),
        ("bert", 1, False, None),
        ("mistral", 1, True, (5, 0)),  # transformers counts the diagonal in a window of 6
        ("modernbert", 0, False, None),
        ("modernbert", 1, False, (4, 4)),
    ],
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_masks_are_stored_as_rules(build, family, index, causal, window, padding):
    input_ids = torch.full((3, LENGTH), 5)
    mask = None if padding == "none" else padded(padding)
    (layer,) = capture_layers(build(family), input_ids, mask, layers=[index])
    starts = [0, 5, 11] if padding == "left" else None
    lengths = [20, 15, 9] if padding == "right" else None
    assert facts(layer) == (causal, window, starts, lengths, None)


def test_grouped_heads_and_memory_order_are_kept(build):
    (layer,) = capture_layers(build("llama"), torch.full((2, LENGTH), 5), layers=[1])
    assert layer.query.shape == (2, 4, LENGTH, 8)
    assert layer.key.shape == layer.value.shape == (2, 2, LENGTH, 8)
    assert layer.kwargs()["enable_gqa"]
    assert layer.query.transpose(1, 2).is_contiguous(), "a transformer hands over transposed (B, L, H, E)"
    assert layer.scale == pytest.approx(8**-0.5)
    assert layer.module == "layers.1.self_attn"


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [([0, 1], 1), ([0, 2], 2), ([2, 3, 0, 1], 2), ([0, 1, 2], 3), ([3], 1)],
    ids=["one group", "one of each", "groups swapped", "groups broken: repeated", "one head"],
)
def test_a_choice_of_heads_computes_what_those_heads_compute(build, heads, kv_heads):
    model, input_ids = (
        build("llama"),
        some_tokens(1),
    )
    (whole,) = capture_layers(model, input_ids, layers=[1])
    (part,) = capture_layers(model, input_ids, layers=[1], heads=heads)
    assert part.key.shape[1] == kv_heads
    assert [part.head_name(head) for head in range(len(heads))] == heads
    expected = softmax_attention(whole).unflatten(-1, (4, 8))[:, :, heads].flatten(2)
    torch.testing.assert_close(softmax_attention(part), expected)


def test_a_mask_that_no_rule_explains_is_kept_whole(build):
    model, input_ids = (
        build("bert"),
        some_tokens(2),
    )
    holes = torch.ones(2, LENGTH, dtype=torch.int64)
    holes[0, 7:9] = 0
    expected = model_outputs(model, "bert", input_ids, holes)
    (layer,) = capture_layers(model, input_ids, holes, layers=[2])
    assert layer.attn_mask is not None
    torch.testing.assert_close(softmax_attention(layer), expected[2].double(), rtol=1e-3, atol=1e-3)


def test_storage_dtype(build):
    (layer,) = capture_layers(build("llama"), torch.full((1, LENGTH), 5), layers=[0], dtype=torch.bfloat16)
    assert {t.dtype for t in (layer.query, layer.key, layer.value)} == {torch.bfloat16}


def test_the_model_is_left_as_it_was(build):
    model = build("llama").train()
    model.set_attn_implementation("eager")
    capture_layers(model, torch.full((1, LENGTH), 5), layers=[0])
    assert model.config._attn_implementation == "eager"
    assert model.training


def test_the_model_runs_only_as_far_as_needed(build):
    model = build("llama")
    ran = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    capture_layers(model, torch.full((1, LENGTH), 5), layers=[1])
    assert ran == [0, 1]


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ArgumentError, match=r"encoder-only.*T5Model"):
        capture_layers(T5Model(config), torch.full((1, 4), 5), layers=[0])


def test_scores_beyond_dot_products_are_refused():
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    with pytest.raises(ArgumentError, match="layer 0, which caps its scores"):
        capture_layers(Gemma2Model(config), torch.full((1, 4), 5), layers=[0])


def test_a_head_outside_the_model_is_refused(build):
    with pytest.raises(ArgumentError, match=r"heads \[0, 4\].*heads 0 to 3"):
        capture_layers(build("llama"), torch.full((1, 4), 5), layers=[0], heads=[0, 4])


def test_layers_without_attention_are_reported(build):
    with pytest.raises(ArgumentError, match="whose layers 7 did not"):
        capture_layers(build("llama"), torch.full((1, 4), 5), layers=[1, 7])


@pytest.mark.parametrize(
    ("choice", "layers"), [("all", [0, 1, 2, 3, 4]), ("every:2", [0, 2, 4]), ("every:9", [0]), ("4,0", [0, 4]), (" 1 , 1", [1])]
)
def test_layers_are_chosen_by_rule_or_number(choice, layers):
    assert select_layers(choice, 5) == layers


@pytest.mark.parametrize("choice", ["", "every:0", "every", "1-3", "-1", "1,,2", "one"])
def test_other_choices_of_layers_are_refused(choice):
    with pytest.raises(ArgumentError, match="every:N"):
        select_layers(choice, 5)


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(ArgumentError, match=r"Got layer 5.*layers 0 to 4"):
        select_layers("0,5", 5)
