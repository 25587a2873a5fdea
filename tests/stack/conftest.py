"""The decoder of the evidence scripts, small and with every option: what the stack is tried on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

EVIDENCE = Path(__file__).resolve().parents[2] / "examples" / "evidence"
VOCABULARY, CONTEXT = 31, 20


@pytest.fixture(scope="session")
def models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence_models", EVIDENCE / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence_models"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def decoder(models: ModuleType) -> Callable[..., nn.Module]:
    """Makes a decoder; keyword arguments are EntmaxAttention's."""

    def make(*, layers: int = 2, checkpointed: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        torch._dynamo.reset()
        size = models.Size(VOCABULARY, embed=16, layers=layers, heads=4, context=CONTEXT)
        everything: dict[str, Any] = {
            "num_kv_heads": 2, "rotary_base": 100.0, "length_scaling": True, "learnable_alpha": True, "alpha": 1.4
        }  # fmt: skip
        model: nn.Module = models.Decoder(size, models.entmax_attention(**(everything | options)), checkpointed=checkpointed)
        return model

    return make


def ids(length: int = CONTEXT, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model: nn.Module, tokens: torch.Tensor, run: Callable[..., torch.Tensor] | None = None) -> Any:
    """Of next-token prediction, through ``run`` or the model itself."""
    torch.manual_seed(1)
    loss = (model if run is None else run)(tokens[:, :-1], tokens[:, 1:])
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
