"""The modules on the Triton backend: training, compiled and annealed, caches, torch's encoder; the host never waits; two GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from adasplash_core.nn import AlphaSchedule, EntmaxAttention, StaticCache, replace_multihead_attention
from tests.stack.conftest import EVIDENCE, loss_and_gradients
from tests.triton_backend.gpu.machine import COMPILER, DEVICE, ON_GPU

EMBED, HEADS = 64, 4
EVERYTHING: dict[str, Any] = {
    "num_kv_heads": 2,
    "rotary_base": 100.0,
    "length_scaling": True,
    "learnable_alpha": True,
    "alpha": 1.4,
}


class Model(nn.Module):
    """Two causal layers, and a loss."""

    def __init__(self, backend: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(31, EMBED)
        self.layers = nn.ModuleList(EntmaxAttention(EMBED, HEADS, is_causal=True, backend=backend, **options) for _ in range(2))
        self.to(DEVICE)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(3 * x)
        logits = x @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def ids(length: int = 33) -> torch.Tensor:
    return torch.randint(31, (2, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, anything that makes the host wait for the GPU is an error."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


def assert_gradients(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    for gradient, reference in zip(found[1], expected[1], strict=True):
        scale = float(reference.abs().max())
        torch.testing.assert_close(gradient, reference, rtol=0, atol=5e-3 * scale + 1e-6)


@pytest.mark.parametrize("options", [{}, EVERYTHING, {"window": (8, 0)}], ids=["plain", "everything", "window"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_is_the_references(options: dict[str, Any], compiled: bool) -> None:
    torch._dynamo.reset()
    model, reference = Model("triton", **options), Model("torch", **options)
    run = torch.compile(model, fullgraph=True, backend=COMPILER) if compiled else model
    assert_gradients(loss_and_gradients(model, ids(), run), loss_and_gradients(reference, ids()))


def test_annealing_compiles_once_and_never_waits() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(COMPILER)
    model, reference = Model("triton"), Model("torch")
    schedules = [AlphaSchedule(m, 3) for m in (model, reference)]
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tokens = ids()
    loss_and_gradients(model, tokens, compiled)  # kernels are compiled and loaded
    for _ in range(4):
        with no_waiting():
            found = loss_and_gradients(model, tokens, compiled)
        assert_gradients(found, loss_and_gradients(reference, tokens))
        with no_waiting():
            schedules[0].step()
        schedules[1].step()
    assert counter.frame_count == 1


def test_one_compiled_step_serves_a_static_cache() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = EntmaxAttention(EMBED, HEADS, is_causal=True, backend="triton", num_kv_heads=2, rotary_base=100.0).to(DEVICE).eval()
    x = torch.randn(2, 12, EMBED, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cache = StaticCache(2, 2, 16, EMBED // HEADS, device=DEVICE)
    counter = CompileCounterWithBackend(COMPILER)
    step = torch.compile(lambda token: layer(token, cache=cache), fullgraph=True, backend=counter)
    with torch.no_grad():
        out = [layer(x[:, :8], cache=cache), *(step(x[:, i : i + 1]) for i in range(8, 12))]
        torch.testing.assert_close(torch.cat(out, 1), layer(x), rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_torchs_encoder_with_padding_takes_the_kernels(training: bool) -> None:
    """Its layers turn the boolean padding mask into floats; a named backend would refuse a dense bias."""
    outputs = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 64, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DEVICE).train(training)
        replace_multihead_attention(encoder, backend=backend)
        x = torch.randn(2, 24, EMBED, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        hidden = torch.zeros(2, 24, dtype=torch.bool, device=DEVICE)
        hidden[0, 17:] = True
        with torch.set_grad_enabled(training):
            outputs.append(encoder(x, src_key_padding_mask=hidden))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


if torch.cuda.device_count() >= 2:

    def test_two_gpus_with_nccl(tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        command = [sys.executable, str(EVIDENCE / "two_gpus.py"), "--no-times", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 8
