"""Six families of transformers' models compute with our attention what they compute with a dense entmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integrations.models import CAUSAL, FAMILIES, LLAMA, MODERNBERT, TEXT, Family


def named(*families: Family) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda f: f.name)


def assert_equal_training(ours: Any, dense: Any, inputs: dict[str, Any], seed: int | None = None) -> None:
    """Logits where there are labels, the loss, and the gradient of every parameter."""
    results = []
    for model in (ours, dense):
        if seed is not None:
            torch.manual_seed(seed)
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        results.append((out.logits.detach(), out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (logits, loss, gradients), (logits_dense, loss_dense, gradients_dense) = results
    seen = inputs["labels"] != -100
    torch.testing.assert_close(logits[seen], logits_dense[seen], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, loss_dense, rtol=1e-7, atol=1e-7)
    for name, gradient in gradients.items():
        assert (gradient is None) == (gradients_dense[name] is None), name
        if gradient is not None:
            scale = float(gradients_dense[name].abs().max())
            torch.testing.assert_close(gradient, gradients_dense[name], rtol=0, atol=1e-6 * scale + 1e-9, msg=name)


@named(*FAMILIES)
def test_logits_loss_and_gradients(family: Family) -> None:
    ours, dense = family.pair()
    assert_equal_training(ours, dense, family.inputs())


@named(*FAMILIES)
def test_attention_is_sparse_and_is_not_softmax(family: Family) -> None:
    ours, dense = family.pair()
    inputs = family.inputs()
    weights = dense(**inputs, output_attentions=True).attentions
    assert weights
    for layer in weights:
        zeros = (layer == 0).double().mean()
        assert 0.2 < zeros < 1
    softmax = family.make("sdpa")
    assert not torch.allclose(ours(**inputs).logits, softmax(**inputs).logits, atol=1e-2)


@pytest.mark.parametrize("padding", ["left", "right", "both", "holes"])
@named(*TEXT)
def test_padding(family: Family, padding: str) -> None:
    ours, dense = family.pair()
    inputs = family.inputs(batch=3)
    mask = torch.ones_like(inputs["input_ids"])
    if padding in ("left", "both"):
        mask[0, :9] = 0
    if padding in ("right", "both"):
        mask[1, -6:] = 0
    if padding == "holes":
        mask[0, [4, 5, 11]] = 0
    inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    assert_equal_training(ours, dense, {**inputs, "attention_mask": mask})
    alone = {"input_ids": inputs["input_ids"][2:], "attention_mask": mask[2:]}
    torch.testing.assert_close(ours(**inputs, attention_mask=mask).logits[2:], ours(**alone).logits, rtol=1e-6, atol=1e-6)


@named(*TEXT)
def test_padding_does_not_reach_the_tokens(family: Family) -> None:
    model, inputs = family.make("entmax"), family.inputs(batch=1, length=16)
    padded = torch.nn.functional.pad(inputs["input_ids"], (0, 7), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (0, 7))
    torch.testing.assert_close(
        model(input_ids=padded, attention_mask=mask).logits[:, :16], model(inputs["input_ids"]).logits, rtol=1e-6, atol=1e-6
    )


@named(*FAMILIES)
def test_attention_dropout(family: Family) -> None:
    name = {"gpt2": "attn_pdrop", "llama": "attention_dropout", "modernbert": "attention_dropout"}
    ours, dense = family.pair(**{name.get(family.name, "attention_probs_dropout_prob"): 0.3})
    inputs = family.inputs()
    assert_equal_training(ours.train(), dense.train(), inputs, seed=3)
    first, second = (ours(**inputs).loss for _ in range(2))
    assert first != second
    assert ours.eval()(**inputs).loss == ours(**inputs).loss


@named(*FAMILIES)
def test_activation_checkpointing(family: Family) -> None:
    name = {"gpt2": "attn_pdrop", "llama": "attention_dropout", "modernbert": "attention_dropout"}
    changes = {name.get(family.name, "attention_probs_dropout_prob"): 0.2}
    plain, checkpointed = (family.make("entmax", **changes).train() for _ in range(2))
    enable = "activation_checkpointing_enable"  # its newer name
    getattr(checkpointed, enable if hasattr(checkpointed, enable) else "gradient_checkpointing_enable")()
    assert_equal_training(checkpointed, plain, family.inputs(), seed=4)


@named(*FAMILIES)
def test_autocast(family: Family) -> None:
    ours, dense = (model.float().train() for model in family.pair(**{"attention_dropout": 0.0} if family is MODERNBERT else {}))
    ours.eval(), dense.eval()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in family.inputs().items()}
    with torch.autocast("cpu", torch.bfloat16):
        out, reference = ours(**inputs), dense(**inputs)
    out.loss.backward()
    reference.loss.backward()
    torch.testing.assert_close(out.loss, reference.loss, rtol=2e-2, atol=2e-2)
    for (name, p), q in zip(ours.named_parameters(), dense.parameters(), strict=True):
        if p.grad is not None and q.grad.norm() > 1e-3:
            similarity = torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
            assert similarity > 0.98, name


@named(*(f for f in FAMILIES if f.make("eager")._can_set_attn_implementation()))
def test_the_attention_of_a_model_can_be_changed(family: Family) -> None:
    """transformers up to 5.4 refuses it for ModernBERT, with a warning of its own."""
    _, dense = family.pair()
    inputs = family.inputs()
    before = dense(**inputs).logits
    dense.set_attn_implementation("entmax")
    torch.testing.assert_close(dense(**inputs).logits, before, rtol=1e-6, atol=1e-6)
    dense.set_attn_implementation("sdpa")
    assert not torch.allclose(dense(**inputs).logits, before, atol=1e-2)


def test_grouped_queries_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from adasplash_core.integrations import hf_attention

    seen = []
    attention = hf_attention.attention

    def spy(query: torch.Tensor, key: torch.Tensor, *others: Any, **arguments: Any) -> Any:
        seen.append((query.shape[1], key.shape[1], arguments["enable_gqa"]))
        return attention(query, key, *others, **arguments)

    monkeypatch.setattr(hf_attention, "attention", spy)
    LLAMA.make("entmax")(**LLAMA.inputs())
    assert seen == [(4, 2, True)] * 2


@named(*FAMILIES)
def test_alpha_1_is_softmax(family: Family) -> None:
    """And so another reference than our own entmax: transformers' SDPA, with padding and windows."""
    model, softmax = family.make("entmax", entmax_alpha=1.0), family.make("sdpa")
    inputs = family.inputs()
    if family.text:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, -6:] = 0
    ours = model(**inputs).logits
    seen = inputs.get("attention_mask", torch.ones(len(ours))) == 1
    torch.testing.assert_close(ours[seen], softmax(**inputs).logits[seen], rtol=1e-6, atol=1e-6)


def test_a_decoder_as_an_encoder() -> None:
    """``config.is_causal = False`` lets every token see every other."""
    ours, dense = LLAMA.pair(is_causal=False)
    inputs = LLAMA.inputs()
    assert_equal_training(ours, dense, inputs)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = 3
    assert not torch.equal(ours(changed).logits[:, 0], ours(inputs["input_ids"]).logits[:, 0])


class TestPacking:
    lengths = (7, 1, 10, 6)

    def packed(self, family: Family, rows: int = 1) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        words = family.inputs(batch=rows, length=sum(self.lengths))["input_ids"]
        positions = torch.cat([torch.arange(n) for n in self.lengths])[None].expand(rows, -1)
        return {"input_ids": words, "position_ids": positions}, list(words.split(self.lengths, dim=1))

    def assert_each_as_alone(self, model: Any, inputs: dict[str, Any], sequences: list[torch.Tensor]) -> None:
        together = model(**inputs).logits.split(self.lengths, dim=1)
        for logits, words in zip(together, sequences, strict=True):
            torch.testing.assert_close(logits, model(words).logits, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("rows", [1, 2])
    @named(*CAUSAL)
    def test_position_ids(self, family: Family, rows: int) -> None:
        ours, dense = family.pair()
        inputs, sequences = self.packed(family, rows)
        inputs["use_cache"] = False
        self.assert_each_as_alone(ours, inputs, sequences)
        assert_equal_training(ours, dense, {**inputs, "labels": inputs["input_ids"].clone()})

    def test_position_ids_beside_a_new_cache(self) -> None:
        inputs, sequences = self.packed(LLAMA, 2)
        self.assert_each_as_alone(LLAMA.make("entmax"), inputs, sequences)

    @named(*TEXT)
    def test_cu_seq_lens(self, family: Family) -> None:
        model = family.make("entmax")
        inputs, sequences = self.packed(family)
        if family.name == "roberta":  # its positions begin after the padding's
            inputs["position_ids"] = inputs["position_ids"] + 1
        edges = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)
        longest = max(self.lengths)
        lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
        cache = {"use_cache": False} if family.causal else {}
        self.assert_each_as_alone(model, {**inputs, **lengths, **cache}, sequences)

    def test_cu_seq_lens_are_enough_without_the_longest_length(self) -> None:
        inputs, sequences = self.packed(MODERNBERT)
        edges = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)
        lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
        self.assert_each_as_alone(MODERNBERT.make("entmax"), {**inputs, **lengths}, sequences)


def test_local_layers_see_their_window_only() -> None:
    """ModernBERT's second and third layers: a token beyond every window and the global first layer's reach changes nothing."""
    model = MODERNBERT.make("entmax")
    attended = model.model.layers[1].attn
    hidden = torch.randn(1, 24, 32, dtype=torch.float64)
    positions = model.model.rotary_emb(hidden, torch.arange(24)[None], "sliding_attention")
    from transformers.masking_utils import create_bidirectional_sliding_window_mask

    mask = create_bidirectional_sliding_window_mask(model.config, hidden, None)
    before = attended(hidden, position_embeddings=positions, attention_mask=mask)[0]
    changed = hidden.clone()
    changed[:, 20] += 1
    after = attended(changed, position_embeddings=positions, attention_mask=mask)[0]
    window = model.config.sliding_window
    assert torch.equal(before[:, : 20 - window], after[:, : 20 - window])
    assert not torch.equal(before[:, 20 - window :], after[:, 20 - window :])
