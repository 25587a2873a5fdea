"""alpha of a transformers model: a number, one a layer, one a head that is learned; saved and loaded with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.integrations.transformers import set_alpha, with_learnable_alpha
from adasplash_core.nn import Alpha, AlphaSchedule
from tests.integrations.models import FAMILIES, LLAMA, VIT, Family, same_alphas


def named(*families: Family) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda f: f.name)


def logits(model: Any, family: Family) -> torch.Tensor:
    return model(**{k: v for k, v in family.inputs().items() if k != "labels"}).logits


@named(*FAMILIES)
def test_a_number_in_the_config(family: Family) -> None:
    ours, dense = family.pair(entmax_alpha=1.25)
    torch.testing.assert_close(logits(ours, family), logits(dense, family), rtol=1e-6, atol=1e-6)
    ours.config.entmax_alpha = 2.0
    assert not torch.allclose(logits(ours, family), logits(dense, family), atol=1e-2)


@named(*(f for f in FAMILIES if f is not VIT))
def test_a_list_in_the_config(family: Family) -> None:
    alphas = [1.2, 1.9, 1.5][: family.make("eager").config.num_hidden_layers]
    ours, dense = family.pair(entmax_alpha=alphas)
    torch.testing.assert_close(logits(ours, family), logits(dense, family), rtol=1e-6, atol=1e-6)


@named(*FAMILIES)
def test_one_a_layer(family: Family) -> None:
    ours, dense = family.pair()
    alphas = [1.2, 1.9, 1.5][: ours.config.num_hidden_layers]
    made = set_alpha(ours, alphas)
    same_alphas(ours, dense)
    assert [a() for a in made] == alphas == ours.config.entmax_alpha
    torch.testing.assert_close(logits(ours, family), logits(dense, family), rtol=1e-6, atol=1e-6)
    assert not any("entmax" in name for name in ours.state_dict())


@named(*FAMILIES)
def test_learnable_alphas_get_gradients(family: Family) -> None:
    ours, dense = family.pair()
    alphas = set_alpha(ours, 1.4, learnable=True)
    assert ours.config.entmax_alpha == "learnable"
    assert sum("theta" in name for name, _ in ours.named_parameters()) == len(alphas)
    with torch.no_grad():
        for layer, alpha in enumerate(alphas):
            alpha.theta += torch.linspace(-0.5, 0.5 + layer, len(alpha.theta))
    same_alphas(ours, dense)
    results = []
    for model in (ours, dense):
        model.double()
        out = model(**family.inputs())
        out.loss.backward()
        results.append((out.loss, [m.theta.grad for m in model.modules() if isinstance(m, Alpha)]))
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(*(gradients for _, gradients in results), strict=True):
        assert reference.abs().min() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-6)


def test_learnable_alphas_are_trained_and_saved(tmp_path: Path) -> None:
    model = LLAMA.make("entmax").float()
    set_alpha(model, learnable=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**LLAMA.inputs()).loss.backward()
    optimizer.step()
    thetas = {n: p for n, p in model.state_dict().items() if n.endswith("entmax_alpha.theta")}
    assert len(thetas) == 2
    assert all(theta.abs().max() > 0 for theta in thetas.values())
    other = LLAMA.make("entmax").float()
    set_alpha(other, learnable=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, LLAMA), logits(model, LLAMA))

    model.save_pretrained(tmp_path)
    model_class = with_learnable_alpha(transformers.LlamaForCausalLM)
    loaded = model_class.from_pretrained(tmp_path, attn_implementation="entmax")
    assert torch.equal(logits(loaded, LLAMA), logits(model, LLAMA))
    assert type(loaded).__name__ == "LlamaForCausalLM"

    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")
    with pytest.raises(ArgumentError, match="learnable alpha, and this model has none.*with_learnable_alpha"):
        logits(plain, LLAMA)


def test_alphas_that_a_checkpoint_lacks_start_where_they_should(tmp_path: Path) -> None:
    LLAMA.make("sdpa").save_pretrained(tmp_path)
    model_class = with_learnable_alpha(transformers.LlamaForCausalLM, alpha=1.25)
    loaded, info = model_class.from_pretrained(tmp_path, attn_implementation="entmax", output_loading_info=True)
    assert {name for name in info["missing_keys"] if "entmax" in name}
    alphas = [m for m in loaded.modules() if isinstance(m, Alpha)]
    assert len(alphas) == 2
    for alpha in alphas:
        torch.testing.assert_close(alpha(), torch.full((4,), 1.25).to(alpha().dtype))


def test_numbers_are_saved_in_the_config(tmp_path: Path) -> None:
    model = LLAMA.make("entmax")
    set_alpha(model, [1.25, 1.75])
    model.config.entmax_backend = "torch"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")
    assert loaded.config.entmax_alpha == [1.25, 1.75]
    assert loaded.config.entmax_backend == "torch"
    assert torch.equal(logits(loaded, LLAMA), logits(model, LLAMA))


def test_a_schedule_moves_it() -> None:
    model = LLAMA.make("entmax")
    set_alpha(model)
    schedule = AlphaSchedule(model, steps=2)
    softmax = LLAMA.make("sdpa")
    torch.testing.assert_close(logits(model, LLAMA), logits(softmax, LLAMA), rtol=1e-5, atol=1e-5)
    schedule.step()
    schedule.step()
    torch.testing.assert_close(logits(model, LLAMA), logits(LLAMA.make("entmax"), LLAMA), rtol=1e-5, atol=1e-5)


def test_a_callback_saves_where_it_leads(tmp_path: Path) -> None:
    from adasplash_core.integrations.trainer import AlphaCallback

    model = LLAMA.make("entmax").float()
    set_alpha(model, [1.25, 1.75])
    words = [{"input_ids": x, "labels": x} for x in LLAMA.inputs(batch=4, length=8)["input_ids"]]
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **settings)
    callback = AlphaCallback(steps=1, end=1.375)
    transformers.Trainer(model, arguments, train_dataset=words, callbacks=[callback]).train()
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="entmax")
    assert loaded.config.entmax_alpha == 1.375
    torch.testing.assert_close(logits(loaded, LLAMA), logits(model, LLAMA))


def test_it_can_be_set_anew() -> None:
    model = LLAMA.make("entmax")
    set_alpha(model, learnable=True)
    set_alpha(model, 1.75)
    assert not any("theta" in name for name, _ in model.named_parameters())
    assert model.config.entmax_alpha == 1.75
    assert torch.equal(logits(model, LLAMA), logits(LLAMA.make("entmax", entmax_alpha=1.75), LLAMA))


class TestBadInput:
    @pytest.mark.parametrize("alphas", [[1.5], [1.5, 1.5, 1.5], []])
    def test_lists_of_the_wrong_length(self, alphas: list[float]) -> None:
        with pytest.raises(ArgumentError, match=rf"one alpha a layer. Got {len(alphas)} for 2 layers"):
            logits(LLAMA.make("entmax", entmax_alpha=alphas), LLAMA)
        model = LLAMA.make("entmax")
        with pytest.raises(ArgumentError, match=rf"one a layer. Got {len(alphas)} for 2 layers"):
            set_alpha(model, alphas)

    @pytest.mark.parametrize("alpha", ["softmax", {"alpha": 1.5}, True])
    def test_other_types(self, alpha: object) -> None:
        with pytest.raises(ArgumentTypeError, match="must be a number, a list of one a layer"):
            logits(LLAMA.make("entmax", entmax_alpha=alpha), LLAMA)

    @pytest.mark.parametrize("alpha", [0.9, 2.1, float("nan")])
    def test_out_of_range(self, alpha: float) -> None:
        with pytest.raises(ArgumentError, match="at least 1"):
            logits(LLAMA.make("entmax", entmax_alpha=alpha), LLAMA)
        with pytest.raises(ArgumentError, match="at least 1"):
            set_alpha(LLAMA.make("entmax"), alpha)

    def test_nothing_is_changed_by_a_call_that_fails(self) -> None:
        model = LLAMA.make("entmax", entmax_alpha=1.25)
        with pytest.raises(ArgumentError):
            set_alpha(model, [1.5, 3.0])
        assert model.config.entmax_alpha == 1.25
        assert not any(isinstance(m, Alpha) for m in model.modules())

    def test_a_list_for_modules_that_do_not_know_their_layer(self) -> None:
        model = VIT.make("entmax", entmax_alpha=[1.5, 1.25])
        with pytest.raises(ArgumentError, match="does not know which layer.*set_alpha\\(model, model.config.entmax_alpha\\)"):
            logits(model, VIT)
        set_alpha(model, model.config.entmax_alpha)
        assert logits(model, VIT).shape == (2, 5)

    def test_learnable_by_name_alone(self) -> None:
        with pytest.raises(ArgumentError, match="set_alpha\\(model, learnable=True\\)"):
            logits(LLAMA.make("entmax", entmax_alpha="learnable"), LLAMA)

    def test_a_model_without_attention_of_transformers(self) -> None:
        with pytest.raises(ArgumentError, match="attention modules that ask transformers' interface"):
            set_alpha(torch.nn.Linear(2, 2))

    def test_a_model_with_another_attention(self) -> None:
        """It would stay with softmax."""
        with pytest.raises(ArgumentError, match="must be \"entmax\" before it gets an alpha. Got attn_implementation='sdpa'"):
            set_alpha(LLAMA.make("sdpa"))
