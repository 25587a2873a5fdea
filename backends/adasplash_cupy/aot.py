"""Ahead-of-time compilation of instances for GPUs that need not be here, by NVRTC alone: neither CuPy nor a driver is asked.

``python -m adasplash_cupy.aot`` compiles what calls with default configs launch, for every architecture, and fails on a warning or a
spilled register. ``--all`` takes every alpha, pair of head dims and set of features instead of one of each kind.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from adasplash_core.device import DeviceInfo
from adasplash_core.spec import AttentionSpec
from adasplash_cupy import configs, nvrtc
from adasplash_cupy.instances import HEAD_DIMS, Instance
from adasplash_cupy.nvrtc import CompileError

ARCHITECTURES = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90a": 227, "sm_100": 227}
"""Largest shared memory of one block, in KiB."""


@dataclass(frozen=True)
class Resources:
    """What a compiled instance needs; sizes in bytes."""

    registers: int
    spills: int
    warnings: str  # NVRTC's, and where products of warpgroups are serialized


def compile_instance(instance: Instance, architecture: str) -> Resources:
    """Compile one instance.

    Raises
    ------
    CompileError: with NVRTC's log.
    """
    log = nvrtc.compile_instance(instance, architecture, "-Xptxas", "-v").log
    used = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    warnings = "\n".join(line for line in log.splitlines() if re.search("warning|Performance Loss", line, re.I))
    return Resources(max(map(int, used), default=-1), sum(map(int, spills)), warnings)


def device(architecture: str) -> DeviceInfo:
    """A device of an architecture, as far as configs look at it."""
    number = re.sub(r"\D", "", architecture)
    capability = (int(number[:-1]), int(number[-1]))
    return DeviceInfo("cuda", architecture, capability=capability, shared_memory=ARCHITECTURES[architecture] * 1024)


def instances(architecture: str, everything: bool = False) -> Iterator[Instance]:
    """What calls with default configs launch on an architecture, each once."""
    info, seen = device(architecture), set()
    dims = [(e, ev) for e, ev in itertools.product(HEAD_DIMS, HEAD_DIMS) if everything or e == ev or (e, ev) == (64, 128)]
    dtypes = ("float16", "float32") if info.capability and info.capability < (8, 0) else ("float16", "bfloat16", "float32")
    features = [{"needs_grad": True}, {"needs_grad": True, "alibi": True, "dropout": True, "alpha_requires_grad": True}]
    if everything:
        features += [{}, {"needs_grad": True, "alibi": True}, {"needs_grad": True, "dropout": True}]
    classes = ("1.5", "2", "other") if everything else ("1.5", "other")
    for dtype, (e, ev), wanted, alpha in itertools.product(dtypes, dims, features, classes):
        spec = AttentionSpec("cuda", dtype, 8, 8, e, ev, alpha_class=alpha, **wanted)  # type: ignore[arg-type]
        if not configs.fits(spec, info):
            continue
        forward = configs.default_forward(spec, info)
        tiles = {configs.short_tile(spec, kv_len) for kv_len in (128, 256, 512)} - {0}
        found = [
            *(configs.short_instance(spec, forward, tile) for tile in sorted(tiles)),
            *configs.forward_instances(spec, forward).values(),
            *configs.backward_instances(spec, configs.default_backward(spec, info)).values(),
            Instance("transform", dtype),
        ]
        for instance in found:
            if instance not in seen:
                seen.add(instance)
                yield instance


def _judge(job: tuple[Instance, str]) -> tuple[Instance, str, str]:
    instance, architecture = job
    try:
        used = compile_instance(instance, architecture)
    except CompileError as error:
        return instance, architecture, str(error)
    return instance, architecture, used.warnings or (f"{used.spills} bytes of registers are spilled" if used.spills else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m adasplash_cupy.aot", description="Compile every kernel for every architecture."
    )
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES), help=", ".join(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every alpha, pair of head dims and set of features")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if unknown := set(options.architectures) - set(ARCHITECTURES):
        parser.error(f"architectures are {', '.join(ARCHITECTURES)}; got {', '.join(sorted(unknown))}")
    jobs = [(i, architecture) for architecture in options.architectures for i in instances(architecture, options.all)]
    wanted, done, bad = Counter(architecture for _, architecture in jobs), Counter[str](), Counter[str]()
    with ProcessPoolExecutor(options.workers) as pool:
        for instance, architecture, problem in pool.map(_judge, jobs, chunksize=4):
            done[architecture] += 1
            if problem:
                bad[architecture] += 1
                print(f"{architecture} {instance.expression}: {problem}", flush=True)
            if done[architecture] == wanted[architecture]:
                print(f"{architecture}: {done[architecture]} instances compiled, {bad[architecture]} with problems", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
