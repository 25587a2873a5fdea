"""transformers' models on the Triton backend: training, padding, packing and generation as on the CPU, and the host never waits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.integrations import models
from tests.integrations.models import DENSE, Family
from tests.triton_backend.gpu.machine import DEVICE, ON_GPU

_WIDE = {"hidden_size": 64, "intermediate_size": 96}


def wide(family: Family) -> Family:
    """Head dims of 16 or more, which the backend wants."""
    return dataclasses.replace(family, arguments=family.arguments | ({"n_embd": 64} if family is models.GPT2 else _WIDE))


FAMILIES = [wide(f) for f in models.FAMILIES]
GPT2, LLAMA = FAMILIES[:2]
named = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def pair(family: Family) -> tuple[Any, Any]:
    ours, dense = (family.make(name, entmax_backend="triton").float().to(DEVICE) for name in ("entmax", DENSE))
    dense.load_state_dict(ours.state_dict())
    return ours, dense


def inputs_of(family: Family, length: int = 24, padded: bool = False) -> dict[str, torch.Tensor]:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in family.inputs(length=length).items()}
    if padded and family.text:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :5] = 0
        inputs["attention_mask"][1, -4:] = 0
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {k: v.to(DEVICE) for k, v in inputs.items()}


def assert_equal_training(ours: Any, dense: Any, inputs: dict[str, Any]) -> None:
    losses, gradients = [], []
    for model in (ours, dense):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for name, reference in gradients[1].items():
        scale = float(reference.abs().max())
        torch.testing.assert_close(gradients[0][name], reference, rtol=0, atol=5e-3 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@named
def test_loss_and_gradients(family: Family, padded: bool) -> None:
    assert_equal_training(*pair(family), inputs_of(family, padded=padded))


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=lambda f: f.name)
def test_packed_sequences(family: Family) -> None:
    inputs = inputs_of(family)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 10, 6)])[None].expand(2, -1).to(DEVICE)
    assert_equal_training(*pair(family), {**inputs, "position_ids": positions, "use_cache": False})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=lambda f: f.name)
def test_greedy_tokens(family: Family, cache: str) -> None:
    inputs = inputs_of(family, length=10)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    tokens = [
        model.generate(
            input_ids=inputs["input_ids"], attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
            cache_implementation=cache, disable_compile=True,
        )
        for model in pair(family)
    ]  # fmt: skip
    assert torch.equal(*tokens)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
class TestOnTheGpuOnly:
    def test_compiled_generation(self) -> None:
        """transformers compiles decoding with a static cache by itself there, into CUDA graphs."""
        ours, dense = pair(LLAMA)
        words = inputs_of(LLAMA, length=10)["input_ids"]
        arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        compiled = ours.generate(words, cache_implementation="static", **arguments)
        assert torch.equal(compiled, dense.generate(words, **arguments))

    @pytest.mark.parametrize("family", [f for f in FAMILIES if f.text], ids=lambda f: f.name)
    def test_the_host_never_waits(self, family: Family) -> None:
        ours, _ = pair(family)
        inputs = inputs_of(family, padded=True)
        inputs.pop("labels")
        ours(**inputs)  # compiles kernels, loads constants
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(**inputs).logits.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @named
    def test_autocast(self, family: Family) -> None:
        ours, dense = pair(family)
        inputs = inputs_of(family, padded=True)
        with torch.autocast("cuda", torch.bfloat16):
            found, reference = ours(**inputs).loss, dense(**inputs).loss
        found.backward()
        torch.testing.assert_close(found, reference, rtol=3e-2, atol=3e-2)
        assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)

    def test_whole_model_compiled(self) -> None:
        ours, dense = pair(LLAMA)
        compiled = torch.compile(ours, fullgraph=True, dynamic=True)
        for length in (20, 33):
            inputs = inputs_of(LLAMA, length=length, padded=True)
            inputs.pop("labels")
            seen = inputs["attention_mask"] == 1
            found, reference = (m(**inputs, use_cache=False).logits[seen] for m in (compiled, dense))
            torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3)
