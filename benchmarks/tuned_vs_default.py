"""Whether tuning holds: what a call gets after `adasplash tune` against what it got before, timed in this new process on fresh inputs.

    python benchmarks/tuned_vs_default.py [--device cuda:0] [--shapes SHAPE ...] [--rounds 15] [--out FOLDER]

Each config is the one that the look-up gives a call of the shape, which may have been measured at another length of the bucket. Where
tuning found another backend the fastest, the default is that of the backend which an untuned machine takes. Inputs are drawn anew
(other seeds than tuning uses) in three classes of sparsity, and both sides take turns on all of them. A ratio above 1 means that
tuning made it faster. Prints a Markdown table, writes it and the numbers as JSON, named by the card, and fails if a shape is not
tuned, if all passes of one together are slower than 0.98 of the default, or if one pass is that stayed on its backend.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from adasplash_core import plugins
from adasplash_core.backend import AttentionBackend
from adasplash_core.configs import ConfigLadder, FoundConfig, Rung, ladder
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.dispatch import choose
from adasplash_core.spec import PASSES, AttentionSpec, Pass
from adasplash_core.testing import inputs
from adasplash_tuner.key import toolchain
from adasplash_tuner.measure.bench import Bench, Case, timer_for
from adasplash_tuner.measure.statistics import Samples, compare
from adasplash_tuner.shapes.shape import Shape
from adasplash_tuner.storage.store import package_version

SLOWEST = 0.98
SEED = 1000
SHAPES = {
    "cuda": (
        "B=16,H=12,L=512,D=64,bf16",
        "B=8,H=16,L=1024,D=64,bf16",
        "B=1,H=16,L=4096,D=64,bf16",
        "B=1,H=16,L=4096,D=64,bf16,causal",
        "B=1,H=16,L=8192,D=64,bf16,causal",
        "B=1,H=16,L=32768,D=64,bf16,causal",
        "B=1,H=16,L=8192,D=64,fp16,causal",
        "B=1,H=32,Hkv=8,L=2048,D=128,bf16,causal",
        "B=1,H=32,Hkv=8,L=3000,D=128,bf16,causal",
        "B=4,H=32,Hkv=8,L=2048,D=128,bf16,causal",
        "B=1,H=32,Hkv=8,L=7000,D=128,bf16,causal",
        "B=1,H=32,Hkv=8,L=8192,D=128,bf16,causal",
        "B=1,H=32,Hkv=8,L=16384,D=128,bf16,causal",
        "B=1,H=9,Hkv=3,L=4096,D=64,fp32,causal",
    ),
    "cpu": (
        "B=1,H=12,L=512,D=64,fp32",
        "B=8,H=12,L=512,D=64,fp32",
        "B=1,H=9,Hkv=3,L=1024,D=64,fp32,causal",
        "B=1,H=9,Hkv=3,L=4096,D=64,fp32,causal",
    ),
}
"""Those of the full profile, and lengths between (3000, 7000), which share a tuned config with the nearest power of two."""


@dataclass
class Row:
    """One pass of one shape. Times are geometric means over the inputs of medians, in ms; ratios are default / tuned."""

    shape: str
    backend: str
    pass_: str
    source: str
    default_ms: float
    tuned_ms: float
    ratio: float
    interval: tuple[float, float]
    by_input: dict[str, float]
    same_config: bool
    default_backend: str = ""  # where another takes the call untuned
    tuned_config: dict[str, Any] = field(default_factory=dict)
    default_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """The whole run."""

    device: dict[str, Any]
    versions: dict[str, str]
    measured: str
    rounds: int
    seed: int
    rows: list[Row]
    totals: dict[str, float] = field(default_factory=dict)  # ratios by shape, all passes together
    geometric_mean: float = 1.0  # of the totals
    lowest: float = 1.0  # of the totals, and of the passes that stay on their backend
    not_tuned: list[str] = field(default_factory=list)

    def summarise(self) -> None:
        for shape in dict.fromkeys(row.shape for row in self.rows):
            rows = [row for row in self.rows if row.shape == shape]
            self.totals[shape] = sum(r.default_ms for r in rows) / sum(r.tuned_ms for r in rows)
        if self.rows:
            self.geometric_mean = statistics.geometric_mean(self.totals.values())
            self.lowest = min([*self.totals.values(), *(row.ratio for row in self.rows if not row.default_backend)])

    @property
    def ok(self) -> bool:
        return self.lowest >= SLOWEST and not self.not_tuned and bool(self.rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", help="as `adasplash tune --shapes` takes them")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=SEED, help="tuning itself uses 0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    options = parser.parse_args()
    device = device_info(options.device)
    texts: Sequence[str] = options.shapes or SHAPES["cpu" if device.type == "cpu" else "cuda"]
    result = Result(device.as_dict(), _versions(device), f"{datetime.now(UTC):%Y-%m-%d}", options.rounds, options.seed, rows=[])
    for text in texts:
        shape = Shape.parse(text)
        for row in measure(shape, options.passes, options.device, options.rounds, options.seed):
            if isinstance(row, str):
                result.not_tuned.append(row)
                print(f"not tuned: {row}", file=sys.stderr)
            else:
                result.rows.append(row)
                print(f"{row.shape} {row.pass_}: {row.ratio:.3f}", file=sys.stderr)
        table = write(result, options)  # after each shape: what ends a run early loses no more than one
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table)
    return 0 if result.ok else 1


def write(result: Result, options: argparse.Namespace) -> str:
    """Both files, named by the card; returns the table."""
    result.summarise()
    table = markdown(result, [f"--shapes {' '.join(map(repr, options.shapes))}"] if options.shapes else [])
    name = "tuned_vs_default_" + re.sub(r"\W+", "_", result.device["name"].lower()).strip("_")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text(table, encoding="utf-8")
    return table


def measure(shape: Shape, passes: Sequence[Pass], device_name: str, rounds: int, seed: int) -> Iterator[Row | str]:
    """A row for each pass, or what is not tuned."""
    device, target = device_info(device_name), torch.device(device_name)
    spec = shape.spec(device.type, needs_grad="backward" in passes)
    backend, untuned = (
        choose(spec, device, registry=plugins.registry(), configs=c).backend for c in (ladder(), ConfigLadder())
    )
    found = {pass_: ladder().find(backend, spec, device, pass_) for pass_ in passes}
    cases = list(fresh_cases(spec, target, seed))
    for pass_, answer in found.items():
        if answer.rung is Rung.HEURISTIC:
            yield f"{shape} {backend.name} {pass_} ({answer.detail.splitlines()[0]})"
            continue
        yield _row(shape, (untuned, backend), device, pass_, cases, answer, rounds)


def fresh_cases(spec: AttentionSpec, target: torch.device, seed: int) -> Iterator[Case]:
    """Each class of sparsity with numbers of its own."""
    for number, sparsity in enumerate(inputs.QUERY_SCALE):
        yield Case(sparsity, inputs.make_call(spec, sparsity, target, seed=seed + number))


def _row(
    shape: Shape,
    backends: tuple[AttentionBackend, AttentionBackend],
    device: DeviceInfo,
    pass_: Pass,
    cases: list[Case],
    answer: FoundConfig,
    rounds: int,
) -> Row:
    untuned, backend = backends
    timer, tuned = timer_for(cases[0].call.query.device), answer.config
    bench = Bench(backend, device, pass_, cases, timer)
    other = bench if untuned is backend else Bench(untuned, device, pass_, cases, timer)
    default = other.default
    times = {"default": Samples(), "tuned": Samples()}
    sides = {"default": (other, default), "tuned": (bench, tuned)}
    for side, config in sides.values():
        side.check(config)
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            side, config = sides[name]
            times[name].add(side.time(config))
    found = compare(times["tuned"], times["default"])
    low, high = found.interval
    return Row(
        shape=str(shape),
        backend=backend.name,
        pass_=pass_,
        source=answer.rung.words,
        default_ms=times["default"].median_ms,
        tuned_ms=times["tuned"].median_ms,
        ratio=1 / found.ratio,
        interval=(1 / high, 1 / low),
        by_input={label: 1 / ratio for label, (ratio, _) in zip(bench.labels, found.by_input, strict=True)},
        same_config=untuned is backend and tuned == default,
        default_backend="" if untuned is backend else untuned.name,
        tuned_config=tuned.to_dict(),
        default_config=default.to_dict(),
    )


def _versions(device: DeviceInfo) -> dict[str, str]:
    found = {"adasplash-core": package_version(), "python": platform.python_version(), "torch": torch.__version__}
    for backend in plugins.registry().backends.values():
        if not backend.unavailable_reasons() and backend.toolchain():
            found[f"backend {backend.name}"] = toolchain(backend, device)
    return found


def markdown(result: Result, arguments: Sequence[str]) -> str:
    device = result.device
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if not name.startswith("backend"))
    driver = f" (driver {device['driver']})" if device["driver"] else ""
    lines = [
        f"# Tuned against default: {device['name']}",
        "",
        f"{device['name']}{driver}, {versions}, {result.measured}. Each config is",
        "the one that a call of the shape gets; the ratio is the default's time over the tuned one's: above 1, tuning made it faster.",
        "The default is that of the backend which an untuned machine takes, named where tuning took another.",
        f"Medians of {result.rounds} rounds in turns, in a new process, on inputs that tuning did not see (dense, moderate and sparse;",
        "times are geometric means over the three), with a cold L2 cache on a GPU.",
        "",
        f"    {' '.join(['python benchmarks/tuned_vs_default.py', *arguments])}",
        "",
        "| shape | pass | default ms | tuned ms | ratio | noise | dense | moderate | sparse |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        classes = " | ".join(f"{row.by_input[name]:.2f}" for name in inputs.QUERY_SCALE)
        low, high = row.interval
        config = (
            " (the default's config)" if row.same_config else f" (untuned: {row.default_backend})" * bool(row.default_backend)
        )
        lines.append(
            f"| {row.shape} | {row.backend} {row.pass_}{config} | {row.default_ms:.3g} | {row.tuned_ms:.3g} | **{row.ratio:.2f}** "
            f"| {low:.2f} to {high:.2f} | {classes} |"
        )
    if result.rows:
        totals, lowest = result.totals, min(row.ratio for row in result.rows)
        lines += [
            "",
            f"{len(totals)} shapes, all passes of each together: geometric mean {result.geometric_mean:.3f}, lowest "
            f"{min(totals.values()):.3f} ({'; '.join(f'{shape} {ratio:.2f}' for shape, ratio in totals.items())}). "
            f"Of the {len(result.rows)} passes the lowest {lowest:.3f}.",
        ]
    lines += [f"\nNot tuned: {text}" for text in result.not_tuned]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
