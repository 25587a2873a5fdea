"""Entmax attention beside softmax attention on a GPU: times, memory and ratios, every competitor timed in the same run.

    python benchmarks/attention.py [--captured work.safetensors] [--encoder mini.safetensors] [--only NAME ...] [--json out.json]

Ours is the public ``attention(..., backend="auto")`` with autograd, so dispatch, allocation and list building are inside the timing.
``--captured`` takes a causal model's file from ``adasplash capture``: its first layer, and two heads of each other layer, make a row
each.
``--encoder`` takes an encoder's. ``adasplash``, where it is installed, is timed on the causal rows that it can do (--with-adasplash: it
autotunes for minutes at each new length).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adasplash_core import attention, explain
from adasplash_core.workload import Workload

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
WARM_UP_MS, MEASURE_MS = 20, 100


@dataclass
class Case:
    """One row of the table."""

    name: str
    build: Callable[[], Tensors]
    causal: bool = True
    alpha: float = 1.5
    target: str = ""  # what it must reach against cuDNN's softmax, forward and backward together
    graph: bool = False  # also timed as a CUDA graph


@dataclass
class Timing:
    """Median milliseconds, forward and backward, and bytes beyond inputs and output."""

    forward: float
    backward: float
    peak_forward: int = 0
    kept: int = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def random_tensors(batch: int, heads: int, length: int, head_dim: int, spread: float) -> Tensors:
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return query * spread, key, value


def cases(captured: str | None, encoder: str | None) -> Iterator[Case]:
    if captured:
        yield Case("captured, all layers but the first", partial(captured_tensors, captured, first=False), target="3.0")
        yield Case("captured, first layer", partial(captured_tensors, captured, first=True), target="1.0")
    draw = partial(partial, random_tensors)
    yield Case("randn q*4, 16 x 32768 x 64", draw(1, 16, 32768, 64, 4.0), target="3.3")
    yield Case("randn q*16, 16 x 32768 x 64", draw(1, 16, 32768, 64, 16.0), target="4.6")
    yield Case("randn q*1, 16 x 32768 x 64", draw(1, 16, 32768, 64, 1.0), target="1.0")
    yield Case("randn q*4, 8 x 16384 x 128", draw(1, 8, 16384, 128, 4.0), target="2.3")
    yield Case("randn q*16, 8 x 16384 x 128", draw(1, 8, 16384, 128, 16.0), target="2.9")
    yield Case("randn q*4, 2 x 8 x 8192 x 64, not causal", draw(2, 8, 8192, 64, 4.0), causal=False, target="2.0")
    if encoder:
        yield Case("captured encoder, 32 x 512", partial(encoder_tensors, encoder), causal=False, target="1/1.5", graph=True)
    yield Case("randn q*4, 32 x 16 x 512 x 64", draw(32, 16, 512, 64, 4.0), target="1/1.5", graph=True)
    yield Case("randn q*0.05, 16 x 4096 x 64", draw(1, 16, 4096, 64, 0.05), target="1/3")
    yield Case("alpha 1.05, randn, 16 x 4096 x 64", draw(1, 16, 4096, 64, 1.0), alpha=1.05, target="1/3")


def captured_tensors(path: str, first: bool) -> Tensors:
    """Heads of a captured model side by side: the first layer's, or two of each other layer."""
    parts: list[Tensors] = []
    for layer in Workload.load(path):
        if (layer.index == 0) != first:
            continue
        heads, group = layer.query.shape[1], layer.query.shape[1] // layer.key.shape[1]
        chosen = list(range(heads)) if first else [heads // 4, 3 * heads // 4] if heads > 2 else list(range(heads))
        key_heads = [head // group for head in chosen]
        parts.append((layer.query[:, chosen], layer.key[:, key_heads], layer.value[:, key_heads]))
    query, key, value = (torch.cat([part[i] for part in parts], 1).to("cuda", torch.bfloat16).contiguous() for i in range(3))
    return query, key, value


def encoder_tensors(path: str) -> Tensors:
    """A captured encoder layer, its sequences repeated to a batch of 32."""
    layer = next(iter(Workload.load(path)))
    copies = 32 // layer.query.shape[0]
    query, key, value = (x.to("cuda", torch.bfloat16).repeat(copies, 1, 1, 1) for x in (layer.query, layer.key, layer.value))
    return query, key, value


def milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median"))


def measure(call: Callable[..., torch.Tensor], tensors: Tensors) -> Timing:
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad_out = torch.randn_like(tensors[0])
    out = call(*leaves)
    torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    forward = milliseconds(lambda: call(*leaves))
    backward = milliseconds(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
    del out
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        plain = call(*leaves)
    peak = torch.cuda.max_memory_allocated() - before - plain.numel() * plain.element_size()
    del plain
    before = torch.cuda.memory_allocated()
    out = call(*leaves)
    kept = torch.cuda.memory_allocated() - before
    return Timing(forward, backward, peak, kept)


def measure_graph(call: Callable[..., torch.Tensor], tensors: Tensors) -> float:
    """Milliseconds of forward and backward together, replayed as one CUDA graph."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad_out = torch.randn_like(tensors[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(call(*leaves), leaves, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(call(*leaves), leaves, grad_out)
    return milliseconds(graph.replay)


def softmax(backend: SDPBackend, causal: bool) -> Callable[..., torch.Tensor]:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return call


def run_case(case: Case, with_adasplash: bool) -> dict[str, Any]:
    tensors = case.build()
    ours = partial(attention, is_causal=case.causal, alpha=case.alpha, backend="auto")
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "ours": ours,
        "cudnn": softmax(SDPBackend.CUDNN_ATTENTION, case.causal),
        "flash2": softmax(SDPBackend.FLASH_ATTENTION, case.causal),
    }
    if with_adasplash and case.causal and case.alpha == 1.5:
        from adasplash import adasplash as peer

        calls["adasplash"] = lambda query, key, value: peer(query, key, value, is_causal=True)
    row: dict[str, Any] = {
        "name": case.name,
        "target": case.target,
        "shape": list(tensors[0].shape),
        "causal": case.causal,
        "alpha": case.alpha,
    }
    row["output_bytes"] = tensors[0].numel() * tensors[0].element_size()
    row["input_bytes"] = sum(x.numel() * x.element_size() for x in tensors) + tensors[0].numel() * tensors[0].element_size()
    row["backend"] = explain(*tensors, is_causal=case.causal, alpha=case.alpha).as_dict()["backend"]
    row["times"] = {name: asdict(measure(call, tensors)) for name, call in calls.items()}
    if case.graph:
        row["graphs"] = {name: measure_graph(calls[name], tensors) for name in ("ours", "cudnn")}
    return row


def text_of(row: dict[str, Any]) -> str:
    times = {name: Timing(**values) for name, values in row["times"].items()}
    ours, cudnn = times["ours"], times["cudnn"]
    cells = [f"{name} {t.forward:.3f}+{t.backward:.3f}={t.total:.3f}" for name, t in times.items()]
    ratio, forward = cudnn.total / ours.total, cudnn.forward / ours.forward
    line = f"{row['name']:<42} [{row['backend']}] {' | '.join(cells)} | {ratio:.2f}x (target {row['target']}), forward {forward:.2f}x"
    # Flash keeps q, k, v, its output and log-sum-exp; ours q, k, v and what it saves, but not its output.
    inputs, output = row["input_bytes"] - row["output_bytes"], row["output_bytes"]
    kept = (inputs + ours.kept - output) / (inputs + times["flash2"].kept)
    line += f" | peak {ours.peak_forward / row['input_bytes']:.2f} of q+k+v+o, kept {kept:.2f} of flash"
    if graphs := row.get("graphs"):
        line += f" | graph {graphs['ours']:.3f} vs {graphs['cudnn']:.3f}: {graphs['cudnn'] / graphs['ours']:.2f}x"
    return line


def machine() -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captured", help="file of a causal model, from `adasplash capture`")
    parser.add_argument("--encoder", help="file of an encoder, from `adasplash capture`")
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--with-adasplash", action="store_true", help="time the adasplash package as well")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU: torch sees none.")
    rows = []
    for case in cases(arguments.captured, arguments.encoder):
        if arguments.only and not any(word in case.name for word in arguments.only):
            continue
        rows.append(run_case(case, arguments.with_adasplash))
        print(text_of(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
