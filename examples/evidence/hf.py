"""Models of transformers for the evidence scripts: from packages or folders, with softmax or entmax, and how sparse they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers.utils import logging

from adasplash_core.api import attention
from adasplash_core.capture.sources import find_model
from adasplash_core.integrations import hf_attention
from adasplash_core.integrations.transformers import register, set_alpha
from adasplash_core.nn import AlphaSchedule

ANNEALED_SHARE = 0.5


def load(name: str, auto_class: Any, **options: Any) -> Any:
    """A model or tokenizer from a folder, a GGUF file, or an installed package that carries one; never from the network."""
    source = find_model(name)
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    logging.disable_progress_bar()
    return auto_class.from_pretrained(source.folder, local_files_only=True, **options)


def use(model: Any, variant: str, steps: int) -> AlphaSchedule | None:
    """Give a model the attention of a variant: ``softmax``, ``entmax ALPHA`` at once, or ``annealed ALPHA`` over half the steps."""
    kind, _, alpha = variant.partition(" ")
    if kind == "softmax":
        model.set_attn_implementation("sdpa")
        return None
    model.set_attn_implementation(register())
    set_alpha(model, float(alpha))
    if kind == "annealed":
        return AlphaSchedule(model, max(int(ANNEALED_SHARE * steps), 1), end=float(alpha))
    if kind != "entmax":
        raise ValueError(f"{variant!r} is no variant: softmax, entmax ALPHA, annealed ALPHA")
    return None


@contextmanager
def watch_density() -> Iterator[list[torch.Tensor]]:
    """Collects, a layer an entry, what share of each head's visible weights is not zero (H,), from the calls made inside."""
    found: list[torch.Tensor] = []

    def watched(*inputs: Any, **arguments: Any) -> torch.Tensor:
        out, stats = attention(*inputs, **arguments, return_stats=True)
        found.append(stats.density.mean(0))
        return out  # type: ignore[no-any-return]

    with mock.patch.object(hf_attention, "attention", watched):
        yield found


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
