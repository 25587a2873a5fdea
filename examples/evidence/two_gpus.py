"""DDP and FSDP2 with entmax attention on two devices: are loss, gradients and three optimizer steps those of one process?

    python examples/evidence/two_gpus.py                       # two GPUs, NCCL; also times larger models
    python examples/evidence/two_gpus.py --device cpu          # two processes, gloo

Each process computes the answer alone as well, on the whole batch in float32, and compares. Grouped heads, rotary positions,
learnable alpha, ASEntmax's scaling and a scheduled alpha are all in the model. Ends with exit code 1 if a difference exceeds the bound.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import Decoder, Size, entmax_attention
from report import machine, table
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions as Options
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from adasplash_core.nn import Alpha, AlphaSchedule

PROCESSES, BATCH, STEPS = 2, 4, 3
BOUND = 2e-5  # relative, in float32: sums over two halves of a batch are rounded in another order
SMALL = Size(vocabulary=61, embed=32, layers=2, heads=4, context=24)
LARGE = Size(vocabulary=32768, embed=768, layers=12, heads=12, context=4096)


def build(size: Size, device: torch.device, *, learnable: bool) -> Decoder:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_kv_heads": size.heads // 2, "rotary_base": 1e4, "length_scaling": True}
    model = Decoder(size, entmax_attention(**options, learnable_alpha=learnable, alpha=1.4))
    return model.to(device)


def tokens(size: Size, device: torch.device, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(size.vocabulary, (BATCH, size.context + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1].to(device), ids[:, 1:].to(device)


def shard(model: Decoder, policy: MixedPrecisionPolicy | None = None) -> Decoder:
    """FSDP2, block by block."""
    options: dict[str, Any] = {} if policy is None else {"mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def whole(x: torch.Tensor) -> torch.Tensor:
    gathered: torch.Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return gathered.detach().clone()


Trace = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def train(model: nn.Module, inner: nn.Module, size: Size, device: torch.device, rank: int | None, scheduled: bool) -> Trace:
    """Losses, the first step's gradients and the last parameters. ``rank`` says which half of the batch; None is all of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = AlphaSchedule(inner, STEPS - 1) if scheduled else None
    losses, gradients = [], {}
    for step in range(STEPS):
        ids, targets = tokens(size, device, step)
        if rank is not None:
            ids, targets = ids.chunk(PROCESSES)[rank], targets.chunk(PROCESSES)[rank]
        loss = model(ids, targets)
        loss.backward()
        if rank is not None:
            loss = loss.detach()
            dist.all_reduce(loss)
            loss = loss / PROCESSES
        losses.append(float(loss.detach()))
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in inner.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return losses, gradients, {n: whole(p) for n, p in inner.named_parameters()}


def difference(found: Trace, expected: Trace) -> dict[str, float]:
    """Largest relative differences (Frobenius norm of each tensor; gradients that are all but zero count by the largest)."""

    def tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        scale = max(float(x.norm()) for x in b.values())
        return max(float((a[n] - b[n]).norm()) / max(float(b[n].norm()), 1e-3 * scale) for n in b)

    loss = max(abs(x - y) / abs(y) for x, y in zip(found[0], expected[0], strict=True))
    return {"loss": loss, "gradients": tensors(found[1], expected[1]), "parameters": tensors(found[2], expected[2])}


def compare(device: torch.device, rank: int) -> list[dict[str, Any]]:
    """DDP and FSDP2 beside one process, for a learnable and for a scheduled alpha."""
    rows = []
    for alpha in ("learnable", "scheduled"):
        base = build(SMALL, device, learnable=alpha == "learnable")
        scheduled = alpha == "scheduled"
        expected = train(alone := copy.deepcopy(base), alone, SMALL, device, None, scheduled)
        ways: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
            "DDP": lambda base=base: ddp(copy.deepcopy(base), device),
            "FSDP2": lambda base=base: (m := shard(copy.deepcopy(base)), m),
            "FSDP2, checkpointed": lambda base=base: (m := shard(checkpointed(copy.deepcopy(base))), m),
        }
        for name, make in ways.items():
            model, inner = make()
            found = train(model, inner, SMALL, device, rank, scheduled)
            rows.append({"way": name, "alpha": alpha, **difference(found, expected), "losses": found[0]})
        rows.append({"way": "FSDP2 state dict", "alpha": alpha, **round_trip(device, alpha == "learnable")})
    return rows


def ddp(model: Decoder, device: torch.device) -> tuple[nn.Module, nn.Module]:
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None), model


def checkpointed(model: Decoder) -> Decoder:
    model.checkpointed = True
    return model


def round_trip(device: torch.device, learnable: bool) -> dict[str, float]:
    """A trained sharded model's whole state dict into a plain model, and into another sharded one."""
    source = shard(build(SMALL, device, learnable=learnable))
    train(source, source, SMALL, device, dist.get_rank(), scheduled=not learnable)
    state = get_model_state_dict(source, options=Options(full_state_dict=True))
    plain, again = build(SMALL, device, learnable=learnable), shard(build(SMALL, device, learnable=learnable))
    plain.load_state_dict(state)
    set_model_state_dict(again, state, options=Options(full_state_dict=True))
    ids, targets = tokens(SMALL, device, 9)
    expected, differences = tensors_of(source), []
    with torch.no_grad():
        losses = [float(model(ids, targets)) for model in (source, plain, again)]
    for model in (plain, again):
        found = tensors_of(model)
        differences += [float((found[name] - expected[name]).abs().max()) for name in expected]
    return {"loss": max(abs(x - losses[0]) for x in losses) / losses[0], "parameters": max(differences)}


def tensors_of(model: Decoder) -> dict[str, torch.Tensor]:
    """Parameters and alphas."""
    alphas = {name: m.current() for name, m in model.named_modules() if isinstance(m, Alpha)}
    return alphas | {name: whole(p) for name, p in model.named_parameters()}


def measure(device: torch.device, rank: int) -> list[dict[str, Any]]:
    """Seconds a step of a 124M model at 4096 tokens, one sequence-half a device, bfloat16."""
    rows = []
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in ("one GPU", "DDP", "FSDP2"):
        base = build(LARGE, device, learnable=False)
        model: nn.Module = base if name == "one GPU" else ddp(base, device)[0] if name == "DDP" else shard(base, precision)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids, targets = (x.chunk(PROCESSES)[rank] for x in tokens(LARGE, device))
        seconds = []
        torch.cuda.reset_peak_memory_stats()
        for _ in range(12):
            dist.barrier()
            torch.cuda.synchronize()
            started = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16, enabled=name != "FSDP2"):
                loss = model(ids, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rows.append(
            {
                "way": name,
                "sequences a device": len(ids),
                "ms a step": 1000 * statistics.median(seconds[4:]),
                "peak GB": torch.cuda.max_memory_allocated() / 1e9,
                "loss": float(loss.detach()),
            }
        )
        del base, model, optimizer
        torch.cuda.empty_cache()
    return rows


def work(rank: int, kind: str, port: int, out: str, timed: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=PROCESSES)
    try:
        rows = compare(device, rank)
        times = measure(device, rank) if timed else []
        if rank == 0:
            Path(out).write_text(
                json.dumps({"machine": machine(device), "bound": BOUND, "rows": rows, "times": times}), encoding="utf-8"
            )
    finally:
        dist.destroy_process_group()
    # A thread of gloo's that still lets go of a Python object would abort the process while the interpreter is taken down.
    sys.stdout.flush()
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-times", action="store_true", help="compare only; always so on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < PROCESSES:
        sys.exit(
            f"This needs {PROCESSES} GPUs, and torch sees {torch.cuda.device_count()}. --device cpu runs two processes with gloo."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "rows.json")
        arguments = (options.device, port, out, options.device == "cuda" and not options.no_times)
        torch.multiprocessing.spawn(work, arguments, nprocs=PROCESSES)
        found = json.loads(Path(out).read_text(encoding="utf-8"))
    print(table(found["rows"], ("way", "alpha", "loss", "gradients", "parameters"), "{:.1e}"))
    if found["times"]:
        print(table(found["times"], tuple(found["times"][0])))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    worst = max(row[name] for row in found["rows"] for name in ("loss", "gradients", "parameters") if name in row)
    print(f"largest relative difference: {worst:.1e} (bound {BOUND:.0e})")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
