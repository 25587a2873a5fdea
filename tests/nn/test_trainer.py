"""AlphaCallback in a transformers Trainer: alpha follows the global step, also of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adasplash_core import configs
from adasplash_core.errors import AdasplashWarning, ArgumentError
from adasplash_core.integrations.hf_alpha import alpha_of
from adasplash_core.integrations.trainer import AlphaCallback
from adasplash_core.integrations.transformers import register
from adasplash_core.nn import EntmaxAttention


class Model(nn.Module):
    """The smallest thing that a Trainer trains."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = EntmaxAttention(8, 2, **options)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.attention(x) - labels).square().mean()}


class Watch(TrainerCallback):  # type: ignore[misc]
    """What alpha the model computed each step with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Model | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.seen.append(float(model.attention.alpha.current().mean()))

    on_pre_optimizer_step = on_substep_end


def train(
    model: nn.Module, folder: Path, callback: AlphaCallback, resume: bool = False, **options: Any
) -> tuple[Any, list[float]]:
    data = [{"x": torch.randn(4, 8), "labels": torch.randn(4, 8)} for _ in range(32)]
    settings = {"max_steps": 8, "logging_steps": 1, "save_strategy": "no"} | options
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, **settings
    )
    watch = Watch()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback, watch])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.seen


def test_anneals_over_the_first_part_of_training(tmp_path: Path) -> None:
    trainer, seen = train(Model(), tmp_path, AlphaCallback(fraction=0.5))
    assert seen == pytest.approx([1.0, 1.125, 1.25, 1.375, 1.5, 1.5, 1.5, 1.5])
    assert [log["entmax_alpha"] for log in trainer.state.log_history if "loss" in log][:2] == [1.0, 1.125]


def test_counts_optimizer_steps_not_batches(tmp_path: Path) -> None:
    _, seen = train(Model(), tmp_path, AlphaCallback(steps=2), gradient_accumulation_steps=2, max_steps=4)
    assert seen == pytest.approx([1.0, 1.0, 1.25, 1.25, 1.5, 1.5, 1.5, 1.5])


def test_a_resumed_run_goes_on_where_it_stood(tmp_path: Path) -> None:
    train(Model(), tmp_path, AlphaCallback(steps=8), save_strategy="steps", save_steps=5, max_steps=5)
    _, seen = train(Model(), tmp_path, AlphaCallback(steps=8), resume=True, save_strategy="steps", save_steps=5)
    assert seen == pytest.approx([1 + 0.5 * step / 8 for step in (5, 6, 7)])


def test_learnable_alphas_are_logged_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_warned", set())
    model = Model(learnable_alpha=True)
    trainer, _ = train(model, tmp_path, AlphaCallback(), max_steps=1)
    log = trainer.state.log_history[0]
    assert 1 < log["entmax_alpha_min"] <= log["entmax_alpha_max"] < 2
    assert "entmax_alpha" not in log
    with torch.no_grad():
        model.attention.alpha.theta[1] = 6.0
    with pytest.warns(AdasplashWarning, match="within 0.01 of its bounds.*1.99"):
        train(model, tmp_path, AlphaCallback(), max_steps=2)


def test_a_transformers_model_needs_no_more_than_its_attention(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=register())
    tokens = [{"input_ids": torch.arange(6), "labels": torch.arange(6)} for _ in range(8)]
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    seen: list[float] = []

    class Read(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            seen.append(float(alpha_of(model.model.layers[1].self_attn)))

    callbacks = [AlphaCallback(steps=2, start=1.2), Read()]
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    Trainer(model=model, args=arguments, train_dataset=tokens, callbacks=callbacks).train()
    assert seen == pytest.approx([1.2, 1.35, 1.5, 1.5])
    assert model.config.entmax_alpha == 1.5  # what a checkpoint is to be used with


def test_a_model_without_alpha_is_refused(tmp_path: Path) -> None:
    class Plain(Model):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(8, 8)  # type: ignore[assignment]

    with pytest.raises(ArgumentError, match='attn_implementation="entmax"'):
        train(Plain(), tmp_path, AlphaCallback())


def test_a_fraction_is_one() -> None:
    with pytest.raises(ArgumentError, match="fraction"):
        AlphaCallback(fraction=25)
