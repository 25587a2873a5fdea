"""``generate``: greedy tokens are those of computing everything anew for each token, with every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.integrations.models import GEMMA3, GPT2, LLAMA, MISTRAL, Family

FAMILIES = (GPT2, LLAMA, MISTRAL, GEMMA3)
NEW = 8


def prompt(family: Family, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    words = family.inputs(batch=3, length=10)["input_ids"]
    mask = torch.ones_like(words)
    if padded:
        mask[0, :4] = 0
        mask[1, :1] = 0
    return words, mask


def generated(model: Any, words: torch.Tensor, mask: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=words, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **arguments,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def recomputed(model: Any, words: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding by whole forwards, without a cache."""
    logits = []
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(input_ids=words, attention_mask=mask, position_ids=positions, use_cache=False)
        logits.append(out.logits[:, -1])
        words = torch.cat([words, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return words, torch.stack(logits, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_greedy_tokens(family: Family, cache: str, padded: bool) -> None:
    ours, dense = family.pair()
    words, mask = prompt(family, padded)
    tokens, logits = generated(ours, words, mask, cache_implementation=cache)
    tokens_anew, logits_anew = recomputed(ours, words, mask)
    assert torch.equal(tokens, tokens_anew)
    torch.testing.assert_close(logits.double(), logits_anew, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens, recomputed(dense, words, mask)[0])


def test_greedy_tokens_without_a_cache() -> None:
    model = LLAMA.make("entmax")
    words, mask = prompt(LLAMA, padded=True)
    assert torch.equal(generated(model, words, mask, use_cache=False)[0], recomputed(model, words, mask)[0])


def test_beams() -> None:
    ours, dense = LLAMA.pair()
    words, mask = prompt(LLAMA, padded=True)
    beams = [
        m.generate(input_ids=words, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None)
        for m in (ours, dense)
    ]
    assert torch.equal(*beams)


def test_a_prompt_in_chunks() -> None:
    """A filled cache and several queries: they stand at the end of the keys."""
    model = LLAMA.make("entmax")
    words, mask = prompt(LLAMA, padded=True)
    whole = model(input_ids=words, attention_mask=mask, use_cache=False).logits
    first = model(input_ids=words[:, :6], attention_mask=mask[:, :6], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"
    second = model(input_ids=words[:, 6:], attention_mask=mask, **{name: first[name]})
    torch.testing.assert_close(second.logits, whole[:, 6:], rtol=1e-6, atol=1e-6)


def test_right_padding_with_a_cache() -> None:
    """Padding between the prompt and the new tokens is a hole among the keys."""
    ours, dense = LLAMA.pair()
    words, mask = prompt(LLAMA, padded=False)
    mask[0, -3:] = 0
    assert torch.equal(generated(ours, words, mask)[0], generated(dense, words, mask)[0])


def test_compiled_decoding_with_a_static_cache() -> None:
    """One graph for all steps: the filled part of the cache is a tensor, which compiles nothing anew."""
    ours = LLAMA.make("entmax")
    words, mask = prompt(LLAMA, padded=True)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    settings = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    settings._compile_all_devices = True
    tokens, _ = generated(ours, words, mask, cache_implementation="static", compile_config=settings)
    assert len(graphs) == 1
    assert torch.equal(tokens, recomputed(ours, words, mask)[0])
