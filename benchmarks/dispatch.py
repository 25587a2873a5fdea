"""What a call costs before any kernel: attention() against calling a backend that allocates its outputs and computes nothing.

    python benchmarks/dispatch.py [--json]

Prints medians of several rounds in microseconds, on whatever device torch uses by default here (a GPU where there is one); and in
milliseconds what the first look-up of a tuned config costs in fresh processes, which happens once a bucket of lengths.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import adasplash_core
from adasplash_core import layout, plugins
from adasplash_core.backend import AttentionBackend, AttentionCall, ForwardResult, Gradients, KernelConfig, SavedTensor
from adasplash_core.call import make_call
from adasplash_core.configs import ladder
from adasplash_core.device import device_info
from adasplash_core.spec import FEATURES, PASSES, AttentionSpec, Pass

ROUNDS, CALLS = 21, 400
PROCESSES = 7

FIRST_LOOKUP = """
import json, sys, time
import torch
from adasplash_core.configs import ConfigLadder
from adasplash_core.device import device_info
from adasplash_core.plugins import registry
from adasplash_tuner.provider import TunedConfigs
from adasplash_tuner.shapes.shape import Shape

times = {}

def timed(name, function):
    start = time.perf_counter()
    answer = function()
    times[name] = (time.perf_counter() - start) * 1e3
    return answer

torch.set_num_threads(1)
backend, device = registry().backend("torch"), device_info("cpu")
ladder = ConfigLadder([TunedConfigs(sys.argv[1])])
hit, miss = (Shape.parse(f"H=8,L={n},D=64").spec("cpu", True) for n in (4096, 16384))
found = timed("first look-up, a hit", lambda: ladder.find(backend, hit, device, "forward"))
assert found.rung.name == "USER_DATABASE", found
found = timed("next bucket, a hit", lambda: ladder.find(backend, hit, device, "backward"))
assert found.rung.name == "USER_DATABASE", found
found = timed("next bucket, a miss that is explained", lambda: ladder.find(backend, miss, device, "forward"))
assert found.rung.name == "HEURISTIC", found
assert "sqlalchemy" not in sys.modules
timed("for comparison: import sqlalchemy", lambda: __import__("sqlalchemy"))
print(json.dumps(times))
"""


class NullBackend(AttentionBackend):
    """Allocates and returns: what is left of a call is the library's own time."""

    name = "null"
    device_types = None
    dtypes = frozenset({"float32"})
    features = frozenset(FEATURES)

    def config_class(self, pass_: Pass) -> type[KernelConfig]:
        return KernelConfig

    def saved_spec(self, spec: AttentionSpec) -> Sequence[SavedTensor]:
        assert spec.batch is not None
        assert spec.q_len is not None
        return [SavedTensor((spec.batch, spec.heads, spec.q_len), "float32")]

    def forward(self, call: AttentionCall) -> ForwardResult:
        saved = [call.query.new_empty(call.query.shape[:3])] if call.spec.needs_grad else []
        return ForwardResult(layout.empty_like(call.query, call.value.shape[-1]), saved)

    def backward(
        self, call: AttentionCall, grad_out: torch.Tensor, saved: Sequence[torch.Tensor], out: torch.Tensor | None
    ) -> Gradients:
        return Gradients(*(layout.empty_like(x) for x in (call.query, call.key, call.value)))


def medians_us(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds a call, the functions interleaved round by round."""
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            rounds[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: statistics.median(times) for name, times in rounds.items()}


def first_lookup_ms() -> dict[str, float]:
    """Medians over fresh processes, with a database of some hundred configs."""
    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder) / "tuned.db")
        fill(database)
        runs = []
        for _ in range(PROCESSES):
            command = [sys.executable, "-c", FIRST_LOOKUP, database]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def fill(database: str) -> None:
    """Winners of the reference's default configs for this CPU, in many buckets."""
    from adasplash_tuner.key import tuning_key
    from adasplash_tuner.shapes.shape import Shape
    from adasplash_tuner.storage.records import BestConfig
    from adasplash_tuner.storage.store import TuningStore, now

    backend, info = plugins.registry().backend("torch"), device_info("cpu")
    records = []
    for pass_ in PASSES:
        for heads in (1, 4, 8, 64):
            for length in (2**n for n in range(7, 14)):
                for head_dim in (32, 64, 128):
                    shape = Shape.parse(f"H={heads},L={length},D={head_dim}")
                    spec = shape.spec("cpu", True)
                    config = backend.default_config(spec, info, pass_).to_dict()
                    key = tuning_key(backend, spec, info, pass_)
                    records.append(
                        BestConfig(key, config, 1.0, 0.1, 1.0, 1e-6, str(shape), "random, dense", 9, now(), "benchmark")
                    )
    TuningStore(database).merge(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = plugins.registry().backends["null"] = NullBackend()
    q, k, v = (torch.randn(1, 8, 2, 64, device=device) for _ in range(3))
    grad = [x.clone().requires_grad_() for x in (q, k, v)]

    def direct(needs_grad: bool) -> Callable[[], object]:
        call = dataclasses.replace(make_call(q, k, v, is_causal=True, needs_grad=needs_grad), config=KernelConfig())
        return lambda: backend.forward(call)

    spec, info = direct_spec(q, k, v), device_info(device)
    times = medians_us(
        {
            "attention, no grad": lambda: adasplash_core.attention(q, k, v, is_causal=True, backend="null"),
            "the backend directly, no grad": direct(False),
            "attention, grad": lambda: adasplash_core.attention(*grad, is_causal=True, backend="null"),
            "the backend directly, grad": direct(True),
            "config look-up, given the spec": lambda: ladder().find(backend, spec, info, "forward"),
            "SDPA on the same tensors": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
    )
    for kind in ("no grad", "grad"):
        times[f"overhead, {kind}"] = times[f"attention, {kind}"] - times[f"the backend directly, {kind}"]
    lookups = first_lookup_ms()
    record = {
        "device": info.name,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "us": times,
        "first_lookup_ms": lookups,
    }
    if arguments.json:
        print(json.dumps(record, indent=1))
        return
    print(f"{record['device']}, torch {record['torch']}; medians of {ROUNDS} rounds of {CALLS} calls")
    for name, value in times.items():
        print(f"{name:40s} {value:7.2f} us")
    print(f"in {PROCESSES} fresh processes")
    for name, value in lookups.items():
        print(f"{name:40s} {value:7.2f} ms")


def direct_spec(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionSpec:
    return make_call(q, k, v, is_causal=True, needs_grad=False).spec


if __name__ == "__main__":
    main()
