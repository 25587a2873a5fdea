"""Where a training step's time goes, with softmax and with entmax: attention, matrix products, the rest, a device that waits.

    python examples/evidence/step_profile.py --context 4096                      # the 124M model of language_modelling.py, on a GPU
    python examples/evidence/step_profile.py --model FOLDER --context 8192       # a causal model of transformers

With each attention the model trains from the same weights on the same batches. Near the start, and again after --steps steps (rows get
sparse while it learns), a few steps are timed and a few are profiled with torch.profiler. "entmax 1.5" has a number for its alpha, and
kernels made for it; "annealed 1.25" has an alpha on the device, as an AlphaSchedule keeps it half way to 1.5. Kernels are told apart by
their names; a third word ("entmax 1.5 cupy") asks for a backend. On a CPU operators take the place of kernels: a trial of the script.
The texts are those of language_modelling.py (with --model those of continued_training.py): --tokens FILE.npz is what it prepared.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import hf
import numpy as np
import texts
import torch
from language_modelling import SIZES
from models import Decoder, Size, entmax_attention, other_attention, softmax
from report import machine, save, table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training import Sequences, adamw, autocast, free, now, rate_at, seconds_of
from transformers import AutoModelForCausalLM

from adasplash_core.nn import AlphaSchedule

WARM, TRAINING = 2, 7  # steps before anything is timed; the learning rate is that of the beginning of so many times --steps
GROUPS = {  # the first that is found in a kernel's name
    "attention backward": r"backward_(rows|keys|lists)|flash_bwd|bprop|fmha_cutlassB|dot_do_o|convert_dq|attention\w*_backward",
    "attention forward": r"key_max|forward_(bound|mark|select|lists|dense|short)|flash_fwd|fprop|fmha_cutlassF|attention",
    "optimizer": r"multi_tensor_apply|[Aa]dam|_foreach_|linalg_vector_norm",
    "loss": r"[Ss]oft[Mm]ax|nll_loss",
    "matrix products": r"gemm|gemv|nvjet|cublas|cutlass|xmma|splitK|aten::(addmm|mm|bmm)",
    "layer norms": r"[Ll]ayer_?[Nn]orm|GammaBeta|native_layer_norm",
    "copies, casts, fills": r"[Cc]opy|Memcpy|Memset|FillFunctor|aten::(zero_|fill_|clone)",
    "the rest": "",
}
OURS = re.compile(r"key_max|forward_(?:bound|mark|select|lists|dense|short)|backward_(?:rows|keys|lists)")


@dataclass(frozen=True)
class Event:
    """A kernel on the device, or an operator on a CPU: when it ran and what it took itself, in microseconds."""

    name: str
    start: float
    end: float
    own: float


def group_of(name: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def short(name: str) -> str:
    """Our kernels by their names, others without arguments and templates."""
    if found := OURS.search(name):
        return found[0]
    return re.sub(r"^void |<.*|\(.*", "", name).split("::")[-1][-60:] or name[:60]


def busy(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        total += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return total


def summary(events: list[Event], steps: int) -> dict[str, Any]:
    """Milliseconds a step: of each group, of what ran beside something else (negative), of a device that waits, and of each kernel."""
    groups, kernels = dict.fromkeys(GROUPS, 0.0), dict[str, dict[str, Any]]()
    for event in events:
        groups[group := group_of(event.name)] += event.own
        kernel = kernels.setdefault(short(event.name), {"group": group, "ms": 0.0, "calls": 0})
        kernel["ms"] += event.own
        kernel["calls"] += 1
    span = max(event.end for event in events) - min(event.start for event in events)
    ran = busy(events)
    for kernel in kernels.values():
        kernel["ms"], kernel["calls"] = round(kernel["ms"] / 1e3 / steps, 4), kernel["calls"] / steps
    return {
        "groups": {group: us / 1e3 / steps for group, us in groups.items()},
        "at once": (ran - sum(groups.values())) / 1e3 / steps,
        "waiting": (span - ran) / 1e3 / steps,
        "profiled": span / 1e3 / steps,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1]["ms"])),
    }


def profiled(step: Callable[[], object], steps: int, device: torch.device) -> list[Event]:
    """What ran on the device in so many steps."""
    cpu, on_gpu = ProfilerActivity.CPU, device.type == "cuda"
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CUDA, cpu]) if on_gpu else ([cpu],):
        now(device)
        with profile(activities=activities) as found:
            for _ in range(steps):
                step()
            now(device)
        if events := [_event(event, on_gpu) for event in found.events() if _counts(event, on_gpu)]:
            return events
    raise SystemExit("torch's profiler saw nothing on the device. Hint: another profiler, like nsys, keeps it from seeing.")


def _counts(event: Any, on_gpu: bool) -> bool:
    """Whether it is a kernel, or a CPU's operator: no range that somebody named."""
    if not on_gpu:
        return bool(event.device_type == DeviceType.CPU)
    named = getattr(event, "is_user_annotation", False) or re.match(r"Optimizer\.|ProfilerStep|\[", event.name)
    return event.device_type == DeviceType.CUDA and not named


def _event(event: Any, on_gpu: bool) -> Event:
    span = event.time_range
    return Event(event.name, span.start, span.end, span.elapsed_us() if on_gpu else event.self_cpu_time_total)


class Subject:
    """A model with one attention, and its training."""

    def __init__(self, options: argparse.Namespace, tokens: texts.Tokens, variant: str, device: torch.device) -> None:
        self.options, self.device = options, device
        kind, number, backend = [*variant.split(), "", ""][:3]
        if kind not in ("softmax", "entmax", "annealed") or (kind == "softmax") != (not number) or (backend and options.model):
            raise SystemExit(
                f"{variant!r} is no variant: softmax, entmax ALPHA [BACKEND], annealed ALPHA [BACKEND], no BACKEND with --model"
            )
        torch.manual_seed(0)
        if options.model:
            self.model = hf.load(options.model, AutoModelForCausalLM, dtype=torch.float32).to(device)
            hf.use(self.model, "softmax" if kind == "softmax" else f"entmax {number}", 1)
        else:
            embed, layers, heads, _ = SIZES[options.size]
            ours = {"alpha": float(number or 1), "backend": backend or "auto"}
            attention = other_attention(softmax) if kind == "softmax" else entmax_attention(**ours)
            self.model = Decoder(Size(tokens.vocabulary, embed, layers, heads, options.context), attention).to(device)
        if kind == "annealed":
            AlphaSchedule(self.model, 1, start=float(number), end=float(number))  # never stepped, so never at its end
        self.batches = Sequences.of(tokens.train, options.context, options.batch_tokens, options.micro_tokens, device)
        self.random, self.done = np.random.default_rng(0), 0
        self.optimizer = adamw(self.model.train(), options.lr)

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not self.options.model:
            return self.model(ids, targets)  # type: ignore[no-any-return]
        logits = self.model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step(self) -> None:
        """One optimizer step, as the other scripts take it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * rate_at(self.done, TRAINING * self.options.steps)
        for ids, targets in self.batches.draw(self.random):
            with autocast(self.device):
                value = self.loss(ids, targets) * (len(ids) / self.batches.sequences)
            value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    @torch.no_grad()
    def densities(self) -> list[list[float]]:
        """By layer and head, what share of the weights that the mask allows is not zero; empty for softmax."""
        ids, targets = next(self.batches.front(self.options.context))
        found: list[torch.Tensor] = []
        with autocast(self.device), hf.watch_density() as watched:
            self.loss(ids, targets) if self.options.model else self.model(ids, targets, found)
        return [layer.tolist() for layer in found or watched]

    def look(self) -> dict[str, Any]:
        """Times and a profile of the next steps."""
        after, milliseconds = self.done, []
        for _ in range(self.options.profiled):
            started = now(self.device)
            self.step()
            milliseconds.append(1000 * (now(self.device) - started))
        found = summary(profiled(self.step, self.options.profiled, self.device), self.options.profiled)
        return {"after": after, "ms": median(milliseconds), **found, "density_by_layer_and_head": self.densities()}


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a look: the step's time, its parts, and what the attention's kernels took."""
    rows = []
    for one in results:
        kernels = {
            name: k["ms"] for name, k in one["kernels"].items() if k["group"].startswith("attention") and k["ms"] >= 0.05
        }
        layers = [fmean(layer) for layer in one["density_by_layer_and_head"]]
        rows.append(
            {"attention": one["variant"], "after steps": one["after"], "ms a step": f"{one['ms']:.1f}"}
            | {group: f"{ms:.1f}" for group, ms in one["groups"].items()}
            | {"waiting": f"{one['waiting']:.1f}"}
            | {"attention's kernels": ", ".join(f"{name} {ms:.1f}" for name, ms in kernels.items())}
            | {"not zero, by layer": " ".join(f"{100 * layer:.1f}%" for layer in layers) or "100%"}
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a package, folder or GGUF file with a causal model, instead of --size from scratch")
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--variants", nargs="+", default=["softmax", "entmax 1.5", "annealed 1.25"])
    parser.add_argument("--steps", type=int, default=40, help="of training before the second look (default: %(default)s)")
    parser.add_argument(
        "--profiled", type=int, default=3, help="steps timed, and as many profiled, a look (default: %(default)s)"
    )
    parser.add_argument("--budget", type=seconds_of, default="2m", help="after which no variant begins (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=32_768, help="an optimizer step (default: %(default)s)")
    parser.add_argument("--micro-tokens", type=int, default=32_768, help="at once in memory (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sources", nargs="+", choices=texts.SOURCES, default=list(texts.SOURCES))
    parser.add_argument("--folder", type=Path, help="where the texts are if their packages are not installed")
    parser.add_argument("--documents", type=int, help="at most so many a source")
    parser.add_argument("--tokens", type=Path, metavar="FILE.npz", help="what --prepare of the other scripts wrote")
    parser.add_argument("--json", type=Path, help="where to write the numbers (default: benchmarks/results)")
    options = parser.parse_args()
    started = time.monotonic()
    if options.model and not options.tokens:
        sys.exit(
            "Texts in the tokens of --model are needed: continued_training.py --model ... --prepare FILE.npz, then --tokens."
        )
    if options.tokens:
        tokens = texts.Tokens.load(options.tokens)
    else:
        tokens = texts.tokenize(tuple(options.sources), SIZES[options.size][3], options.folder, options.documents)
    if len(tokens.train) < options.context + 2:
        sys.exit(f"The texts are shorter than one sequence of {options.context} tokens.")
    device, skipped, results = torch.device(options.device), dict[str, str](), list[dict[str, Any]]()
    torch.set_float32_matmul_precision("high")
    profiled(lambda: torch.ones(1, device=device).add_(1), 1, device)  # the profiler's own start

    def report() -> Path:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        content = {
            "machine": machine(device),
            "settings": settings,
            "groups": GROUPS,
            "table": rows_of(results),
            "looks": results,
            "not run": skipped,
            "seconds": time.monotonic() - started,
        }
        name = Path(options.model).stem if options.model else options.size
        return save(f"step_profile_{name}_{options.context}", content, options.json)

    for variant in options.variants:
        if time.monotonic() - started > options.budget:
            skipped[variant] = "the budget ended"
            continue
        try:
            subject = Subject(options, tokens, variant, device)
            while subject.done < WARM:
                subject.step()
            looks = [subject.look()]
            while subject.done < options.steps:
                subject.step()
            looks.append(subject.look())
        except RuntimeError as error:  # too little memory, say: the other variants go on
            skipped[variant] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{variant} cannot run: {skipped[variant]}", flush=True)
        else:
            results += [{"variant": variant} | look for look in looks]
            print("\n".join(f"{variant}, after {look['after']} steps: {look['ms']:.1f} ms" for look in looks), flush=True)
            path = report()  # what ends this program later takes nothing back
        subject = None  # type: ignore[assignment]
        free()
    if not results:
        sys.exit("No variant ran.")
    path = report()
    print(table(rows := rows_of(results), tuple(rows[0])))
    for variant, reason in skipped.items():
        print(f"not run: {variant}: {reason}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
