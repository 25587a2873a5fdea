"""Where the time of entmax attention goes: milliseconds a kernel, forward and backward, for the workloads of benchmarks/attention.py.

    python benchmarks/kernels.py [--captured work.safetensors] [--backends triton cupy] [--only NAME ...] [--json out.json]

From torch's profiler: the mean of a few calls with a warm L2 cache, so a little less than the medians of whole calls. What is not one
of the backend's kernels (zeroing, torch's own) is summed up as "other".
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import attention as benchmark
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from adasplash_core import attention

CALLS = 5
KERNELS = (
    "key_max",
    "forward_bound",
    "forward_mark",
    "forward_select",
    "forward_lists",
    "forward_dense",
    "forward_short",
    "backward_lists",
    "backward_rows",
    "backward_keys",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captured", help="file of a causal model, from `adasplash capture`")
    parser.add_argument("--encoder", help="file of an encoder, from `adasplash capture`")
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--only", nargs="*", help="workloads whose name contains one of these")
    parser.add_argument(
        "--limit", type=float, default=300.0, help="seconds after which no further one is started (%(default)s)"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("Kernels are profiled on a GPU: torch sees none.")
    started, rows = time.monotonic(), []
    for case in benchmark.cases(arguments.captured, arguments.encoder):
        if arguments.only and not any(word in case.name for word in arguments.only):
            continue
        for backend in arguments.backends:
            rows.append({"name": case.name, "backend": backend, "ms": kernel_times(case, backend)})
            print(text_of(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        if time.monotonic() - started > arguments.limit:
            break
    if arguments.json:
        report = {"machine": benchmark.machine(), "calls": CALLS, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def kernel_times(case: benchmark.Case, backend: str) -> dict[str, float]:
    """Milliseconds a call by kernel, in the order of KERNELS."""
    leaves = [x.requires_grad_() for x in case.build()]
    grad_out = torch.randn_like(leaves[0])

    def both() -> None:
        out = attention(*leaves, is_causal=case.causal, alpha=case.alpha, backend=backend)
        torch.autograd.grad(out, leaves, grad_out)

    both()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            both()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            total[kernel_of(event.name)] += event.time_range.elapsed_us() / CALLS / 1e3
    return {name: round(total[name], 4) for name in (*KERNELS, "other") if name in total}


def kernel_of(name: str) -> str:
    """Triton's names end in _kernel; those of CUDA C++ are templates, perhaps mangled."""
    match = re.search("|".join(KERNELS), name)
    return match[0] if match else "other"


def text_of(row: dict[str, Any]) -> str:
    cells = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
    return f"{row['name']:<42} {row['backend']:<7} {sum(row['ms'].values()):7.3f}  {cells}"


if __name__ == "__main__":
    main()
