"""Entmax attention beside softmax attention on a GPU: times, memory and ratios, every competitor timed in the same run.

    python benchmarks/attention.py [--captured work.safetensors] [--encoder mini.safetensors] [--only NAME ...] [--json out.json]
    python benchmarks/attention.py --lengths [256 1024 ...] --json out.json      time against length, for the plot
    python benchmarks/attention.py --peer --only NAME ... --json out.json        the adasplash package, with softmax and ours beside it
    python benchmarks/attention.py --also cupy ...                               other backends of ours as columns of their own

Ours is the public ``attention(..., backend="auto")`` with autograd, so dispatch, allocation and list building are inside the timing.
``--captured`` takes a causal model's file from ``adasplash capture``: its first layer, and two heads of each other layer, make a row
each. ``--encoder`` takes an encoder's. adasplash autotunes for minutes at each new length and head dim, so its rows are runs of their
own, which also compare errors against float64. Results of several runs are merged into one file. ``--dry-run`` tries all that on a
CPU, tiny, with stand-ins for what only a GPU has: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adasplash_core import attention, explain
from adasplash_core.call import make_call
from adasplash_core.errors import BackendUnsupportedError, UnknownBackendError
from adasplash_core.testing import oracle
from adasplash_core.workload import Workload

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Call = Callable[..., torch.Tensor]
WARM_UP_MS, MEASURE_MS = 20, 100
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
DENSE_UP_TO = 4096  # the whole score matrix, several times, in float32
SPREADS = (4.0, 16.0)  # of the sweep's queries


@dataclass
class Machine:
    """Where the benchmark runs; ``shrink`` divides lengths in a dry run."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    shrink: int = 1


HERE = Machine()


@dataclass
class Case:
    """One row of the table."""

    name: str
    build: Callable[[], Tensors]
    causal: bool = True
    alpha: float = 1.5
    target: str = ""  # what it must reach against cuDNN's softmax, forward and backward together
    peer_target: str = ""  # and against adasplash
    graph: bool = False  # also timed as a CUDA graph


@dataclass
class Timing:
    """Median milliseconds of forward, backward, and both as one step, and bytes beyond inputs and output.

    A step (``together``) is what training does: the host prepares the backward while the forward runs, and makes the graph for it anew.
    """

    forward: float
    backward: float
    together: float
    peak_forward: int = 0
    kept: int = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __str__(self) -> str:
        return f"{self.forward:.3f}+{self.backward:.3f}={self.total:.3f} ({self.together:.3f})"


# -- inputs ---------------------------------------------------------------------------------------------------------------------


def random_tensors(batch: int, heads: int, length: int, head_dim: int, spread: float) -> Tensors:
    torch.manual_seed(0)
    length = max(16, length // HERE.shrink)
    heads, batch = (min(heads, 2), min(batch, 2)) if HERE.shrink > 1 else (heads, batch)
    query, key, value = (torch.randn(batch, heads, length, head_dim, device=HERE.device, dtype=HERE.dtype) for _ in range(3))
    return query * spread, key, value


def cases(captured: str | None, encoder: str | None) -> Iterator[Case]:
    draw = partial(partial, random_tensors)
    if captured:
        build = partial(captured_tensors, captured)
        yield Case("captured, all layers but the first", partial(build, first=False), target="3.0", peer_target="4.0")
        yield Case("captured, first layer", partial(build, first=True), target="1.0", peer_target="2.0")
    yield Case("randn q*4, 16 x 32768 x 64", draw(1, 16, 32768, 64, 4.0), target="3.3", peer_target="5.4")
    yield Case("randn q*16, 16 x 32768 x 64", draw(1, 16, 32768, 64, 16.0), target="4.6", peer_target="6.0")
    yield Case("randn q*1, 16 x 32768 x 64", draw(1, 16, 32768, 64, 1.0), target="1.0", peer_target="2.2")
    yield Case("randn q*4, 8 x 16384 x 128", draw(1, 8, 16384, 128, 4.0), target="2.3", peer_target="4.4")
    yield Case("randn q*16, 8 x 16384 x 128", draw(1, 8, 16384, 128, 16.0), target="2.9", peer_target="4.6")
    yield Case(
        "randn q*4, 2 x 8 x 8192 x 64, not causal", draw(2, 8, 8192, 64, 4.0), causal=False, target="2.0", peer_target="4.0"
    )
    if encoder:
        yield Case(
            "captured encoder, 32 x 512",
            partial(encoder_tensors, encoder),
            causal=False,
            target="1/1.5",
            peer_target="2.0",
            graph=True,
        )
    yield Case("randn q*4, 32 x 16 x 512 x 64", draw(32, 16, 512, 64, 4.0), target="1/1.5", peer_target="1.5", graph=True)
    yield Case("randn q*0.05, 16 x 4096 x 64", draw(1, 16, 4096, 64, 0.05), target="1/3", peer_target="1.5")
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
    query, key, value = (torch.cat([part[i] for part in parts], 1).to(HERE.device, HERE.dtype).contiguous() for i in range(3))
    return query, key, value


def encoder_tensors(path: str) -> Tensors:
    """A captured encoder layer, its sequences repeated to a batch of 32."""
    layer = next(iter(Workload.load(path)))
    copies = 32 // layer.query.shape[0]
    query, key, value = (x.to(HERE.device, HERE.dtype).repeat(copies, 1, 1, 1) for x in (layer.query, layer.key, layer.value))
    return query, key, value


# -- competitors ----------------------------------------------------------------------------------------------------------------


def softmax(backend: SDPBackend, causal: bool) -> Call:
    if HERE.device == "cpu":
        return partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return call


def competitors(causal: bool, alpha: float) -> dict[str, Call]:
    return {
        "ours": partial(attention, is_causal=causal, alpha=alpha, backend="auto"),
        "cudnn": softmax(SDPBackend.CUDNN_ATTENTION, causal),
        "flash2": softmax(SDPBackend.FLASH_ATTENTION, causal),
    }


def others(names: Sequence[str], tensors: Sequence[torch.Tensor], causal: bool, alpha: float) -> dict[str, Call]:
    """Backends of ours by name, beside the one that ``auto`` takes; without those that cannot run here."""
    found: dict[str, Call] = {}
    for name in names:
        call = partial(attention, is_causal=causal, alpha=alpha, backend=name)
        try:
            call(*tensors)
        except (UnknownBackendError, BackendUnsupportedError) as error:
            print(" ".join(str(error).split())[:200], flush=True)
        else:
            found[name] = call
    return found


def adasplash_call(causal: bool, niter: int | None = None) -> Call:
    """The peer as its users call it; its older kernels where the call is not causal."""
    if HERE.device == "cpu":
        return partial(attention, is_causal=causal, backend="torch")
    from adasplash import adasplash

    return lambda query, key, value: adasplash(query, key, value, is_causal=causal, niter=niter)


def dense_entmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal, from the whole score matrix, with the ``entmax`` package's function."""
    from entmax import entmax15

    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    length = scores.shape[-1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return entmax15(scores.masked_fill(hidden, -1e9), dim=-1).to(value.dtype) @ value


# -- measuring ------------------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any]) -> float:
    if HERE.device == "cpu":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    from triton.testing import do_bench

    return float(do_bench(run, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median"))


def measure(call: Call, tensors: Tensors) -> Timing:
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad_out = torch.randn_like(tensors[0])
    out = call(*leaves)
    torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    forward = milliseconds(lambda: call(*leaves))
    backward = milliseconds(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
    del out
    together = milliseconds(lambda: torch.autograd.grad(call(*leaves), leaves, grad_out))
    if HERE.device == "cpu":
        return Timing(forward, backward, together)
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
    return Timing(forward, backward, together, peak, kept)


def measure_graph(call: Call, tensors: Tensors) -> float:
    """Milliseconds of forward and backward together, replayed as one CUDA graph."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    grad_out = torch.randn_like(tensors[0])

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad_out)

    if HERE.device == "cpu":
        return milliseconds(both)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    return milliseconds(graph.replay)


def errors(calls: dict[str, Call], tensors: Tensors, causal: bool) -> dict[str, float]:
    """Relative error (Frobenius norm) of one head's output against float64; of the last rows where there are many."""
    query, key, value = (x[:1, :1].contiguous() for x in tensors)
    rows = torch.arange(max(0, query.shape[2] - 1024), query.shape[2], device=query.device)
    exact = oracle.attention(make_call(query, key, value, is_causal=causal), rows=rows).out
    return {name: oracle.relative_error(call(query, key, value)[:, :, rows], exact) for name, call in calls.items()}


# -- runs -----------------------------------------------------------------------------------------------------------------------


def run_case(case: Case, also: Sequence[str] = ()) -> dict[str, Any]:
    tensors = case.build()
    calls = competitors(case.causal, case.alpha) | others(also, tensors, case.causal, case.alpha)
    output = tensors[0].numel() * tensors[0].element_size()
    row: dict[str, Any] = {
        "name": case.name,
        "target": case.target,
        "shape": list(tensors[0].shape),
        "causal": case.causal,
        "alpha": case.alpha,
        "output_bytes": output,
        "input_bytes": sum(x.numel() * x.element_size() for x in tensors) + output,
        "backend": explain(*tensors, is_causal=case.causal, alpha=case.alpha).as_dict()["backend"],
        "times": {name: asdict(measure(call, tensors)) for name, call in calls.items()},
    }
    if case.graph:
        row["graphs"] = {name: measure_graph(calls[name], tensors) for name in ("ours", "cudnn")}
    return row


def run_peer(case: Case) -> dict[str, Any]:
    """The peer, with ours and softmax beside it, and the errors of ours and of the peer, also with ``niter=10``."""
    tensors = case.build()
    calls = {k: v for k, v in competitors(case.causal, case.alpha).items() if k != "flash2"}
    calls["adasplash"] = adasplash_call(case.causal)
    peer = {"target": case.peer_target, "times": {name: asdict(measure(call, tensors)) for name, call in calls.items()}}
    found = {"ours": calls["ours"], "adasplash": calls["adasplash"], "adasplash niter=10": adasplash_call(case.causal, 10)}
    return {"name": case.name, "peer": peer | {"errors": errors(found, tensors, case.causal)}}


def run_length(length: int, spread: float, peer: bool) -> dict[str, Any]:
    tensors = random_tensors(1, 16, length, 64, spread)
    calls = competitors(True, 1.5)
    if peer:
        calls = {"cudnn": calls["cudnn"], "adasplash": adasplash_call(True)}
    elif length <= DENSE_UP_TO:
        calls["dense entmax15"] = dense_entmax
    times: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            times[name] = asdict(measure(call, tensors))
        except ModuleNotFoundError as error:
            print(f"  {name} left out: {error}", flush=True)
    return {"name": f"length {length}, q*{spread:g}", "length": length, "spread": spread, "times": times}


def text_of(row: dict[str, Any]) -> str:
    times = {name: Timing(**values) for name, values in row["times"].items()}
    cells = " | ".join(f"{name} {t}" for name, t in times.items())
    line = f"{row['name']:<42} {cells}"
    ours, cudnn = times.get("ours"), times["cudnn"]
    if ours is None:
        return line
    line += f" | {cudnn.total / ours.total:.2f}x, forward {cudnn.forward / ours.forward:.2f}x"
    if "target" not in row:
        return line
    # Flash keeps q, k, v, its output and log-sum-exp; ours q, k, v and what it saves, but not its output.
    inputs, output = row["input_bytes"] - row["output_bytes"], row["output_bytes"]
    kept = (inputs + ours.kept - output) / (inputs + times["flash2"].kept)
    line += f" (target {row['target']}) [{row['backend']}]"
    line += f" | peak {ours.peak_forward / row['input_bytes']:.2f} of q+k+v+o, kept {kept:.2f} of flash"
    if graphs := row.get("graphs"):
        line += f" | graph {graphs['ours']:.3f} vs {graphs['cudnn']:.3f}: {graphs['cudnn'] / graphs['ours']:.2f}x"
    return line


def text_of_peer(row: dict[str, Any]) -> str:
    times = {name: Timing(**values) for name, values in row["peer"]["times"].items()}
    cells = " | ".join(f"{name} {t}" for name, t in times.items())
    found = row["peer"]["errors"]
    verdict = (
        "no worse" if found["ours"] <= found["adasplash niter=10"] * 1.01 else "WORSE"
    )  # the order of sums moves the fourth digit
    wrong = ", ".join(f"{name} {value:.2e}" for name, value in found.items())
    ratio = times["adasplash"].total / times["ours"].total
    return f"{row['name']:<42} {cells} | {ratio:.2f}x of adasplash (target {row['peer']['target']}) | errors {wrong}: {verdict}"


def machine() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version(), "date": datetime.now(UTC).date().isoformat()}
    if HERE.device == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return found | {"command": " ".join(["python", *sys.argv])}


def merge(path: Path, key: str, row: dict[str, Any]) -> None:
    """Put a row into a results file beside what other runs put there; a peer's part stays with its row, and names its own machine."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = {known["name"]: known for known in report.get(key, [])}
    if "peer" in row:
        row = {"name": row["name"], "peer": row["peer"] | {"machine": machine()}}
    else:
        report["machine"] = machine()
    known = rows.get(row["name"], {})
    if key == "lengths":
        row = row | {"times": known.get("times", {}) | row["times"]}
    rows[row["name"]] = known | row
    report[key] = list(rows.values())
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captured", help="file of a causal model, from `adasplash capture`")
    parser.add_argument("--encoder", help="file of an encoder, from `adasplash capture`")
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument("--lengths", nargs="*", type=int, help="time against length instead; without numbers: 256 to 65536")
    parser.add_argument("--also", nargs="*", default=(), metavar="BACKEND", help="time these backends too")
    parser.add_argument("--peer", action="store_true", help="time the adasplash package, and compare errors")
    parser.add_argument(
        "--limit", type=float, default=500.0, help="seconds after which no further row is started (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="where to put the numbers, beside those of other runs")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny; the numbers mean nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        HERE.device, HERE.dtype, HERE.shrink = "cpu", torch.float32, 256
    elif not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU: torch sees none. --dry-run tries its logic on a CPU.")
    started = time.monotonic()
    for key, row, text in rows_of(arguments):
        print(text, f"({time.monotonic() - started:.0f} s)", flush=True)
        if arguments.json:
            merge(arguments.json, key, row)
        if HERE.device == "cuda":
            torch.cuda.empty_cache()
        if time.monotonic() - started > arguments.limit:
            print(f"Stopped after {arguments.limit:.0f} s; --only and --lengths choose what to run.")
            break


def rows_of(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(key in the results file, row, its line of text)."""
    if arguments.lengths is not None:
        for length in arguments.lengths or LENGTHS:
            for spread in SPREADS:
                row = run_length(length, spread, arguments.peer)
                yield "lengths", row, text_of(row)
        return
    for case in cases(arguments.captured, arguments.encoder):
        if arguments.only and not any(word in case.name for word in arguments.only):
            continue
        if not arguments.peer:
            row = run_case(case, arguments.also)
            yield "rows", row, text_of(row)
        elif case.alpha == 1.5:
            row = run_peer(case)
            yield "rows", row, text_of_peer(row)


if __name__ == "__main__":
    main()
