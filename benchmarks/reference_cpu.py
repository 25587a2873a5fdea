"""The reference backend on a CPU, beside what one would write without it: time and peak memory, forward and backward.

    python benchmarks/reference_cpu.py                              # random inputs, about five minutes on two cores
    python benchmarks/reference_cpu.py --workload work.safetensors  # the q, k, v of a model

The competitors compute the same function, attention with alpha = 1.5, from the whole score matrix with the ``entmax`` package:
``entmax_bisect`` (bisection, any alpha) and ``entmax15`` (sorting). Softmax attention by PyTorch's fused kernel stands by for scale.

All are timed in one process, in turns, so that a busy machine disturbs all alike; medians are shown. Peak memory is each one's own
process's, beyond what it held once its inputs were made: output, gradients and everything in between.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

OURS, BISECT, SORT, SOFTMAX = "adasplash torch", "entmax_bisect, dense", "entmax15, dense", "softmax (SDPA)"
RESULTS = Path(__file__).parent / "results" / "reference_cpu.json"
DENSE_LIMIT = 1 << 30  # bytes of one score matrix: the dense ones hold several


@dataclass(frozen=True)
class Case:
    """One workload. ``source``: "random", or a captured file and layer."""

    length: int
    heads: int
    head_dim: int
    causal: bool
    source: str = "random"
    layer: int = -1

    @property
    def score_bytes(self) -> int:
        return 4 * self.heads * self.length**2

    @property
    def name(self) -> str:
        what = "random" if self.layer < 0 else f"{Path(self.source).stem} layer {self.layer}"
        return f"{what}, {self.heads} heads of {self.head_dim}, L = {self.length}, {'causal' if self.causal else 'not causal'}"

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of attention, float32, with gradients asked for."""
        if self.layer >= 0:
            from adasplash_core.workload import Workload

            arguments = Workload.load(self.source).layer(self.layer).to(dtype=torch.float32).kwargs()
        else:
            generator = torch.Generator().manual_seed(0)
            shape = (1, self.heads, self.length, self.head_dim)
            arguments = {name: torch.randn(shape, generator=generator) for name in ("query", "key", "value")}
            arguments["is_causal"] = self.causal
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].detach().requires_grad_()
        return arguments


def ours(arguments: dict[str, Any]) -> torch.Tensor:
    from adasplash_core import attention

    return attention(**arguments, alpha=1.5, backend="torch")


def dense(transform: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], torch.Tensor]:
    def attend(arguments: dict[str, Any]) -> torch.Tensor:
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value))
        scores = arguments.get("scale", query.shape[-1] ** -0.5) * (query @ key.mT)
        if arguments["is_causal"]:
            length = query.shape[2]
            scores = scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu_(1), -torch.inf)
        return transform(scores) @ value

    return attend


def bisect(scores: torch.Tensor, iterations: int = 50) -> torch.Tensor:
    """With the package's default of 50 iterations."""
    from entmax import entmax_bisect

    return entmax_bisect(scores, alpha=1.5, dim=-1, n_iter=iterations)


def sort(scores: torch.Tensor) -> torch.Tensor:
    from entmax import entmax15

    return entmax15(scores, dim=-1)


def softmax(arguments: dict[str, Any]) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(**arguments)


COMPETITORS: dict[str, Callable[[dict[str, Any]], torch.Tensor]] = {
    OURS: ours,
    BISECT: dense(bisect),
    SORT: dense(sort),
    SOFTMAX: softmax,
}


def competitors(case: Case) -> list[str]:
    """Who can run this: a dense score matrix must fit in memory several times."""
    return [name for name in COMPETITORS if case.score_bytes <= DENSE_LIMIT or name in (OURS, SOFTMAX)]


def once(name: str, arguments: dict[str, Any]) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    for x in ("query", "key", "value"):
        arguments[x].grad = None
    gc.collect()
    start = time.perf_counter()
    out = COMPETITORS[name](arguments)
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    return middle - start, time.perf_counter() - middle


def times(case: Case, repeats: int, budget: float) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward and backward of each competitor, run in turns; at most ``budget`` seconds on slow ones."""
    arguments = case.inputs()
    warm = Case(min(case.length, 256), case.heads, case.head_dim, case.causal).inputs()
    names = competitors(case)
    for name in names:
        once(name, warm)
    once(OURS, arguments)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            if sum(map(sum, measured[name])) < budget or not measured[name]:
                measured[name].append(once(name, arguments))
    return {
        n: (1e3 * statistics.median(f for f, _ in m), 1e3 * statistics.median(b for _, b in m)) for n, m in measured.items()
    }


def peak_here(case: Case, name: str) -> float:
    """Peak MiB of one forward and backward in this process beyond its inputs. Linux: reads and resets VmHWM."""
    COMPETITORS[BISECT] = dense(partial(bisect, iterations=2))  # they all use the same buffers
    once(name, Case(64, case.heads, case.head_dim, case.causal).inputs())
    arguments = case.inputs()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = memory("VmRSS")
    once(name, arguments)
    return memory("VmHWM") - start


def memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(case: Case, name: str, threads: int) -> float:
    """:func:`peak_here` in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--case", json.dumps(asdict(case)), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def machine(threads: int) -> dict[str, Any]:
    from adasplash_core.device import device_info

    return {
        "cpu": device_info("cpu").name,
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "entmax", "adasplash-core")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run(case: Case, repeats: int, budget: float, threads: int) -> dict[str, Any]:
    measured = times(case, repeats, budget)
    rows = []
    for name, (forward, backward) in measured.items():
        rows.append(
            {
                "name": name,
                "forward_ms": round(forward, 1),
                "backward_ms": round(backward, 1),
                "total_ms": round(forward + backward, 1),
                "peak_mib": round(peak(case, name, threads), 1),
            }
        )
    return {"case": asdict(case) | {"source": Path(case.source).name, "name": case.name}, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """One case as Markdown; the factors are over the first row, ours."""
    rows = result["rows"]
    base = rows[0]
    lines = [
        f"{result['case']['name']}:",
        "",
        "| | forward ms | backward ms | both | peak MiB | time / ours | memory / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{row[key]:.0f}" for key in ("forward_ms", "backward_ms", "total_ms", "peak_mib")]
        factors = [f"{row[key] / base[key]:.1f}x" for key in ("total_ms", "peak_mib")]
        lines.append(f"| {' | '.join([row['name'], *numbers, *factors])} |")
    return "\n".join(lines) + "\n"


def cases(options: argparse.Namespace) -> list[Case]:
    if options.workload is None:
        return [Case(n, options.heads, options.head_dim, causal) for n in options.lengths for causal in (False, True)]
    from adasplash_core.workload import Workload

    found = []
    for layer in Workload.load(options.workload).summaries:
        _, heads, length, head_dim = layer.query_shape
        if layer.padded or layer.masked or layer.window is not None or layer.query_shape[2] != layer.key_shape[2]:
            print(f"layer {layer.index} is left out: the dense competitors here know causal masks only", file=sys.stderr)
            continue
        found.append(Case(length, heads, head_dim, layer.is_causal, options.workload, layer.index))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--workload", help="a file captured with `adasplash capture`, instead of random inputs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds after which a slow one is not repeated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON is written")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_here(Case(**json.loads(options.case)), options.peak_of))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(options.threads), "results": []}
    for case in cases(options):
        result = run(case, options.repeats, options.budget, options.threads)
        report["results"].append(result)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if not options.json:
            print(table(result), flush=True)
    if options.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
