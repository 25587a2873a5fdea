"""Compile every kernel that the Triton backend's tuning space can launch, for GPUs that need not be here, and say what each needs.

    python scripts/aot.py [--targets sm_80 sm_90 ...] [--quick] [--jobs N] [--json FILE]

Fails where a kernel does not compile or wants more shared memory than the target has. What was compiled before from the same sources by
the same Triton is read from a cache. ``--quick``: default configs only.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import platformdirs
import torch
import triton

from adasplash_core.backend import source_hash
from adasplash_core.call import make_call
from adasplash_core.device import DeviceInfo
from adasplash_triton import aot, aot_transform, configs
from adasplash_triton.backend import TritonBackend

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
LENGTHS = (256, 4096, 32768)  # whole rows on chip; one and two blocks of rows a program
CALLS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("bfloat16", {"is_causal": True}, ("64", "128", "256", "32")),
    ("float16", {}, ("64",)),
    ("float32", {"is_causal": True}, ("64", "128", "256")),
    ("bfloat16", {"alpha": 2.0, "window": (512, 0)}, ("64",)),
    ("bfloat16", {"alpha": 1.3, "is_causal": True, "deterministic": True}, ("64",)),
    ("bfloat16", {"alpha": "per head", "alibi": True, "dropout_p": 0.1}, ("64",)),
    ("bfloat16", {"kv_lengths": True, "key_mask": True, "return_stats": True}, ("64",)),
)
"""dtype, arguments, head dims. The first two lines see the whole tuning space, the others the default configs."""
WHOLE_SPACE = 2
TRANSFORMS: tuple[tuple[int, dict[str, Any]], ...] = (
    *((n, {"alpha_class": "1.5"}) for n in (1, 64, 256, 1000, 4096, 16384, 100_000, 1 << 20)),
    *((n, {"alpha_class": "any", "alpha_grad": True}) for n in (64, 4096, 100_000)),
    (512, {"alpha_class": "any", "per_row": True, "alpha_grad": True}),
    (500, {"alpha_class": "2", "dim": 0}),
)
Job = tuple[str, str, str, dict[str, Any], dict[str, int]]  # target, module, kernel, arguments, options


def device_of(target: str) -> DeviceInfo:
    major, minor = divmod(int(target[3:]), 10) if target.startswith("sm_") else (9, 4)
    shared = aot.SHARED_MEMORY[target]
    return DeviceInfo("cuda", target, capability=(major, minor), multiprocessors=MULTIPROCESSORS[target], shared_memory=shared)


def attention_launches(target: str, quick: bool) -> Iterator[aot.Launch]:
    backend, device = TritonBackend(), device_of(target)
    for i, (dtype, arguments, dims) in enumerate(CALLS):
        for dim, length in itertools.product(map(int, dims), LENGTHS):
            call = build(dtype, dim, length, arguments)
            if not configs.fits(call.spec, device):
                continue
            default = {pass_: backend.default_config(call.spec, device, pass_) for pass_ in ("forward", "backward")}
            candidates = {pass_: [config] for pass_, config in default.items()}
            if i < WHOLE_SPACE and not quick:
                for pass_ in ("forward", "backward"):
                    candidates[pass_] += list(backend.tuning_space(call.spec, device, pass_))
            for pass_, listed in candidates.items():
                for config in listed:
                    chosen = default | {pass_: config}
                    forward, backward = (dataclasses.replace(call, config=chosen[p]) for p in ("forward", "backward"))
                    yield from aot.launches_of(forward, backward if pass_ == "backward" or config is default[pass_] else None)


def build(dtype: str, dim: int, length: int, arguments: dict[str, Any]) -> Any:
    """A call on tensors that hold nothing: expanded from one element, so that long ones cost no memory."""
    heads = 2
    query, key, value = (torch.zeros((), dtype=getattr(torch, dtype)).expand(1, heads, length, dim) for _ in range(3))
    query, key, value = (torch.empty_strided(x.shape, (0, length * dim, dim, 1), dtype=x.dtype) for x in (query, key, value))
    given = dict(arguments)
    if given.get("alpha") == "per head":
        given["alpha"] = torch.full((heads,), 1.4, requires_grad=True)
    if given.pop("alibi", False):
        given["alibi_slopes"] = torch.ones(heads)
    if given.pop("kv_lengths", False):
        given["kv_lengths"] = torch.full((1,), length, dtype=torch.int32)
    if given.pop("key_mask", False):
        given["attn_mask"] = torch.ones(1, 1, 1, length, dtype=torch.bool)
    return make_call(query, key, value, needs_grad=True, **given)


def jobs_of(target: str, quick: bool) -> dict[str, Job]:
    """One job per binary, by a key that names all that a binary depends on but the sources and Triton."""
    launches = list(attention_launches(target, quick))
    for n, arguments in TRANSFORMS:
        for dtype in (torch.bfloat16, torch.float32):
            launches += aot_transform.launches_of(n, dtype, **arguments)
    found: dict[str, Job] = {}
    for launch in launches:
        job = (target, launch.kernel.__module__, launch.kernel.__name__, launch.arguments, launch.options)
        found.setdefault(hashlib.sha256(repr((target, *binary_of(launch))).encode()).hexdigest()[:24], job)
    return found


def binary_of(launch: aot.Launch) -> Iterator[Any]:
    yield launch.kernel.__name__
    yield sorted(launch.options.items())
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or isinstance(value, bool):
            yield value
        elif hasattr(value, "data_ptr"):
            yield str(value.dtype), value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            wide = not -(2**31) <= value < 2**31
            yield wide if parameter.do_not_specialize else (value == 1, value % 16 == 0, wide)
        else:
            yield "float"


def compile_job(job: Job) -> dict[str, Any]:
    target, module, name, arguments, options = job
    started = time.perf_counter()
    kernel = getattr(importlib.import_module(module), name)
    try:
        found = dataclasses.asdict(aot.compile_launch(aot.Launch(kernel, arguments, options), target))
    except Exception as error:  # the summary names every kernel that does not compile
        found = {"name": name, "error": f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"}
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    return found | {"target": target, "options": options, "constants": constants, "seconds": time.perf_counter() - started}


def compile_all(jobs: dict[str, Job], workers: int, cache: Path) -> list[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    missing = {key: job for key, job in jobs.items() if key not in known}
    print(f"{len(jobs)} binaries, {len(jobs) - len(missing)} known from {cache}", flush=True)
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(compile_job, job): key for key, job in missing.items()}
        for done, future in enumerate(as_completed(futures), 1):
            known[futures[future]] = future.result()
            if done % 25 == 0 or done == len(futures):
                print(f"  {done} of {len(futures)} compiled", flush=True)
                cache.parent.mkdir(parents=True, exist_ok=True)
                right = {key: found for key, found in known.items() if "error" not in found}
                cache.write_text(json.dumps(right), encoding="utf-8")
    return [known[key] for key in jobs]


def summary(results: list[dict[str, Any]]) -> list[str]:
    """One line per kernel and target; returns what is wrong."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    problems = []
    for result in results:
        if "error" in result:
            problems.append(f"{result['target']} {result['name']} {result['constants']}: {result['error']}")
            continue
        groups[result["target"], result["name"]].append(result)
        if result["shared"] > (limit := aot.SHARED_MEMORY[result["target"]]):
            wanted = f"{result['shared']} bytes of shared memory, {limit} are there"
            problems.append(f"{result['target']} {result['name']} {result['options']} {result['constants']}: {wanted}")
    print(
        f"{'target':<8}{'kernel':<34}{'binaries':>9}{'registers':>12}{'spilled':>9}{'most stack':>11}{'shared':>9}{'limit':>9}"
    )
    for (target, name), found in sorted(groups.items()):
        registers = f"{min(r['registers'] for r in found)}-{max(r['registers'] for r in found)}"
        spilled, stack = sum(r["stack"] > 16 for r in found), max(r["stack"] for r in found)
        if stack < 0:
            registers, stack = "-", 0
        shared = max(r["shared"] for r in found)
        numbers = f"{len(found):>9}{registers:>12}{spilled:>9}{stack:>11}{shared:>9}{aot.SHARED_MEMORY[target]:>9}"
        print(f"{target:<8}{name:<34}{numbers}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--quick", action="store_true", help="default configs only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="kernels whose name contains this")
    parser.add_argument("--cache", type=Path, default=Path(platformdirs.user_cache_dir("adasplash")) / "aot")
    parser.add_argument("--json", type=Path, help="where to write what every binary needs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs: dict[str, Job] = {}
    for target in arguments.targets:
        jobs |= jobs_of(target, arguments.quick)
    if arguments.only:
        jobs = {key: job for key, job in jobs.items() if arguments.only in job[2]}
    cache = arguments.cache / f"{source_hash('adasplash_triton')}-triton{triton.__version__}.json"
    results = compile_all(jobs, arguments.jobs, cache)
    problems = summary(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(results)} binaries for {', '.join(arguments.targets)}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
