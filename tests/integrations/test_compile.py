"""Whole models under torch.compile and torch.export: one graph, whatever the length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adasplash_core.integrations.transformers import set_alpha
from adasplash_core.nn import AlphaSchedule
from tests.integrations import models
from tests.integrations.models import Family

LLAMA, BERT = (dataclasses.replace(f, arguments={**f.arguments, "num_hidden_layers": 1}) for f in (models.LLAMA, models.BERT))


class Graphs(list[Any]):
    """A backend that runs graphs as they are, and keeps them."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def inputs_of(family: Family, length: int, given: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": family.inputs(length=length)["input_ids"]}
    if given == "padding":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :3] = 0
    if given == "packing":
        inputs["position_ids"] = torch.arange(length)[None].expand(2, -1) % 7
    if family.causal:
        inputs["use_cache"] = False
    return inputs


@pytest.mark.parametrize(
    ("family", "given"),
    [(LLAMA, "padding"), (LLAMA, "packing"), (LLAMA, "nothing"), (BERT, "padding"), (models.MODERNBERT, "nothing")],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_one_graph_for_all_lengths(family: Family, given: str) -> None:
    ours, dense = family.pair()
    graphs = Graphs()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=graphs)
    for length in (16, 21, 30):
        inputs = inputs_of(family, length, given)
        seen = inputs.get("attention_mask", torch.ones(2, length)) == 1
        wanted = dense(**inputs).logits[seen]
        torch.testing.assert_close(compiled(**inputs).logits[seen], wanted, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


def test_gradients_of_a_compiled_model() -> None:
    compiled_model, eager = (LLAMA.make("entmax", attention_dropout=0.2).train() for _ in range(2))
    compiled = torch.compile(compiled_model, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = inputs_of(LLAMA, 20, "padding")
    results = []
    for forward, model in ((compiled, compiled_model), (eager, eager)):
        torch.manual_seed(0)
        forward(**inputs).logits.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-5, atol=1e-9, msg=name)


def test_a_schedule_compiles_nothing_anew() -> None:
    model = LLAMA.make("entmax")
    set_alpha(model)
    schedule = AlphaSchedule(model, steps=4)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    inputs = inputs_of(LLAMA, 12, "padding")
    outputs = []
    for _ in range(5):
        outputs.append(compiled(**inputs).logits)
        assert torch.allclose(outputs[-1], model(**inputs).logits)
        schedule.step()
    assert len(graphs) == 1
    assert not torch.allclose(outputs[0], outputs[-1])


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **cache).logits


@pytest.mark.parametrize(
    ("family", "given"),
    [(LLAMA, "nothing"), (LLAMA, "padding"), (BERT, "padding")],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_export(family: Family, given: str) -> None:
    ours, dense = family.pair()
    example = inputs_of(family, 16, given)
    example.pop("use_cache", None)
    length = torch.export.Dim("length", min=2, max=60)
    with torch.no_grad():
        exported = torch.export.export(Logits(ours), (), example, dynamic_shapes={k: {1: length} for k in example})
        for n in (5, 40):
            inputs = inputs_of(family, n, given)
            inputs.pop("use_cache", None)
            seen = inputs.get("attention_mask", torch.ones(2, n)) == 1
            wanted = Logits(dense)(**inputs)[seen]
            torch.testing.assert_close(exported.module()(**inputs)[seen], wanted, rtol=1e-6, atol=1e-6)
