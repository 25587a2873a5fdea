"""A GPT-2-class language model from scratch, with softmax and with entmax: validation loss, time, memory, sparsity by layer.

    python examples/evidence/language_modelling.py --context 4096                         # a 124M model on one GPU
    python examples/evidence/language_modelling.py --context 1024 --variants softmax entmax dense adasplash
    python examples/evidence/language_modelling.py --size 10m --context 256 --device cpu --budget 30m

All variants of a run start from the same weights (asentmax has two more matrices a layer, so its draws differ) and see the same batches
in the same order. First each is timed for a few steps, then all train for the number of steps that the budget leaves room for; with
--steps nothing is timed first. A variant that cannot run is named with its reason. The adasplash package autotunes for minutes at each
new length: give it a run of its own, with the --steps of the others.
The texts are those of texts.py; --prepare FILE.npz only tokenizes them, and --tokens FILE.npz needs no texts any more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import texts
import torch
from models import Decoder, Size, adasplash_022, dense_entmax, entmax_attention, other_attention, softmax
from report import machine, save, spread, table, without_times
from torch import nn
from training import (
    CALIBRATION_STEPS,
    Budget,
    Run,
    Sequences,
    autocast,
    calibrate,
    comparable,
    cut,
    each,
    evaluated_at,
    optimize,
    seconds_of,
)

from adasplash_core.nn import AlphaSchedule

VARIANTS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "softmax": ("scaled_dot_product_attention", other_attention(softmax)),
    "entmax": ("ours, alpha = 1.5", entmax_attention()),
    "annealed": ("ours, alpha from 1 to 1.5 over a quarter of the steps", entmax_attention()),
    "learned": ("ours, one learnable alpha a head", entmax_attention(learnable_alpha=True)),
    "asentmax": ("ours, alpha = 1.5, queries scaled by length", entmax_attention(length_scaling=True)),
    "dense": ("the entmax package, from the whole score matrix", other_attention(dense_entmax)),
    "adasplash": ("the adasplash package", other_attention(adasplash_022)),
}
SIZES = {  # embed, layers, heads, vocabulary
    "124m": (768, 12, 12, 48_000),
    "10m": (256, 10, 8, 8_000),
    "tiny": (32, 2, 2, 300),
}
ANNEALED_SHARE, EVALUATIONS = 0.25, 5


class Experiment:
    """Trains one variant at a time on the same tokens."""

    def __init__(self, options: argparse.Namespace, tokens: texts.Tokens, device: torch.device) -> None:
        embed, layers, heads, _ = SIZES[options.size]
        self.size = Size(tokens.vocabulary, embed, layers, heads, options.context)
        self.options, self.tokens, self.device = options, tokens, device
        sizes = (options.context, options.batch_tokens, options.micro_tokens, device)
        self.train, self.validation = Sequences.of(tokens.train, *sizes), Sequences.of(tokens.validation, *sizes)

    def run(self, variant: str, seed: int, steps: int, deadline: float, *, evaluate: bool = True) -> Run:
        torch.manual_seed(seed)
        model = Decoder(self.size, VARIANTS[variant][1]).to(self.device)
        rise = int(ANNEALED_SHARE * steps) if evaluate else steps  # timed while alpha rises: above 1 it costs most
        schedule = AlphaSchedule(model, max(rise, 1)) if variant == "annealed" else None
        forward: Callable[..., torch.Tensor] = torch.compile(model) if self.options.compile else model
        run, batches = Run(variant, seed), np.random.default_rng(seed)
        due = evaluated_at(steps, EVALUATIONS)

        def batch() -> list[Callable[[], torch.Tensor]]:
            pieces = self.train.draw(batches)
            return [lambda piece=piece: forward(*piece) * (len(piece[0]) / self.train.sequences) for piece in pieces]

        def after_step(step: int) -> None:
            if schedule is not None:
                schedule.step()
            if evaluate and (run.cut or step in due):
                run.curve.append(self.evaluate(model, step))

        optimize(run, model, steps, batch, rate=self.options.lr, after_step=after_step, device=self.device, deadline=deadline)
        return run

    def step_ms(self, variant: str) -> float:
        return self.run(variant, 0, CALIBRATION_STEPS, math.inf, evaluate=False).step_ms

    @torch.no_grad()
    def evaluate(self, model: Decoder, step: int) -> dict[str, Any]:
        """Loss over the first ``--validation-tokens``, and by layer the share of visible weights that are not zero."""
        losses, densities = [], []
        model.eval()
        for number, (ids, targets) in enumerate(self.validation.front(self.options.validation_tokens)):
            layers: list[torch.Tensor] = []
            with autocast(self.device):
                losses.append((len(ids), float(model(ids, targets, layers if number == 0 else None))))
            densities += [layer.tolist() for layer in layers]
        model.train()
        return {
            "step": step,
            "tokens": step * self.train.sequences * self.size.context,
            "validation_loss": sum(n * x for n, x in losses) / sum(n for n, _ in losses),
            "density_by_layer_and_head": densities,
        }


def rows_of(runs: list[Run], experiment: Experiment) -> list[dict[str, Any]]:
    rows, step_tokens = [], experiment.train.sequences * experiment.size.context
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        densities = [[statistics.fmean(layer) for layer in run.curve[-1]["density_by_layer_and_head"]] for run in mine]
        layers = [statistics.fmean(layer) for layer in zip(*densities, strict=True)]
        losses = [run.curve[-1]["validation_loss"] for run in mine]
        rows.append(
            {
                "variant": variant,
                "seeds": len(mine),
                "steps": mine[0].steps,
                "validation loss": spread(losses),
                "bits a byte": spread([loss / math.log(2) / experiment.tokens.bytes_a_token for loss in losses]),
                "ms a step": spread([run.step_ms for run in mine], "{:.0f}"),
                "tokens / s": f"{statistics.fmean(1000 * step_tokens / run.step_ms for run in mine):.0f}",
                "peak GB": None if mine[0].peak_gb is None else f"{max(run.peak_gb or 0 for run in mine):.2f}",
                "not zero, by layer": " ".join(f"{100 * layer:.1f}%" for layer in layers) or "100%",
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["softmax", "entmax", "annealed"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=seconds_of, default="7m", help="of the whole run: 90s, 7m, 1h (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of what the budget leaves room for; the budget still ends the run")
    parser.add_argument("--shared", action="store_true", help="other programs use the device meanwhile: the table has no times")
    parser.add_argument("--batch-tokens", type=int, default=65_536, help="an optimizer step (default: %(default)s)")
    parser.add_argument("--micro-tokens", type=int, default=32_768, help="at once in memory (default: %(default)s)")
    parser.add_argument("--validation-tokens", type=int, default=262_144)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sources", nargs="+", choices=texts.SOURCES, default=list(texts.SOURCES))
    parser.add_argument("--folder", type=Path, help="where the texts are if their packages are not installed")
    parser.add_argument("--documents", type=int, help="at most so many a source")
    parser.add_argument("--prepare", type=Path, metavar="FILE.npz", help="tokenize only")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="what --prepare wrote")
    parser.add_argument("--json", type=Path, help="where to write the numbers (default: benchmarks/results)")
    options = parser.parse_args()
    budget = Budget(options.budget)
    if options.tokens:
        tokens = texts.Tokens.load(options.tokens)
    else:
        tokens = texts.tokenize(tuple(options.sources), SIZES[options.size][3], options.folder, options.documents)
    print(
        f"{len(tokens.train):,} training and {len(tokens.validation):,} validation tokens of {', '.join(tokens.sources)}",
        flush=True,
    )
    if options.prepare:
        tokens.save(options.prepare)
        return 0
    if min(len(tokens.train), len(tokens.validation)) < options.context + 2:
        sys.exit(
            f"The texts are shorter than one sequence of {options.context} tokens: name more --sources, or a shorter --context."
        )
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    experiment = Experiment(options, tokens, device)
    skipped: dict[str, str] = {}
    variants = (
        dict.fromkeys(options.variants, 0.0) if options.steps else calibrate(experiment.step_ms, options.variants, skipped)
    )
    if not variants:
        sys.exit("No variant can run.")
    steps = options.steps or budget.steps(variants.values(), options.seeds, EVALUATIONS)
    shape, millions = f"{experiment.train.sequences} x {options.context} tokens", experiment.size.parameters / 1e6
    print(f"{steps} steps of {shape}, {millions:.1f}M parameters", flush=True)
    runs: list[Run] = []

    def report() -> tuple[Path, list[dict[str, Any]]]:
        rows = rows_of(comparable(runs), experiment)
        rows = without_times(rows) if options.shared else rows
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        content = {
            "machine": machine(device),
            "settings": settings
            | {"parameters": experiment.size.parameters, "sequences": experiment.train.sequences, "steps": steps},
            "texts": {"sources": tokens.sources, "train": len(tokens.train), "validation": len(tokens.validation)},
            "variants": {name: VARIANTS[name][0] for name in options.variants},
            "table": rows,
            "runs": [vars(run) for run in runs],
            "not run": skipped | cut(runs),
            "seconds": time.monotonic() - budget.started,
        }
        return save(f"language_modelling_{options.size}_{options.context}", content, options.json), rows

    for run in each(
        budget, options.seeds, variants, lambda name, seed: experiment.run(name, seed, steps, budget.deadline), skipped
    ):
        runs.append(run)
        loss = run.curve[-1]["validation_loss"]
        print(f"{run.variant}, seed {run.seed}: {loss:.3f} after {run.steps} steps{' (cut)' * run.cut}", flush=True)
        report()  # what ends this program later takes nothing back
    if not runs:
        sys.exit("The budget ended before the first variant began.")
    path, rows = report()
    print(table(rows, tuple(rows[0])))
    for variant, reason in (skipped | cut(runs)).items():
        print(f"not run: {variant}: {reason}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
