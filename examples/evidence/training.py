"""What the evidence scripts train with: a budget shared fairly, learning rates, batches from a stream of tokens, time and memory."""

from __future__ import annotations

import argparse
import gc
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

CALIBRATION_STEPS = 6


def seconds_of(text: str) -> float:
    """`90s`, `7m` or `1h` in seconds."""
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration like 90s, 7m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


@dataclass
class Run:
    """One variant trained from one seed."""

    variant: str
    seed: int
    steps: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)  # one entry an evaluation
    step_ms: float = math.nan  # median
    milliseconds: list[float] = field(default_factory=list)  # of every step
    peak_gb: float | None = None
    cut: bool = False  # the budget ended before its steps
    seconds: float = math.nan  # in all, with its model's start and the evaluations


class Budget:
    """Seconds from now on, and how many steps of each variant fit into them."""

    def __init__(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.deadline = self.started + seconds

    @property
    def spent(self) -> bool:
        return time.monotonic() > self.deadline

    def steps(self, step_ms: Iterable[float], seeds: int, at_least: int, share: float = 0.85) -> int:
        """The same number for every variant and seed; what ``share`` leaves is for evaluation."""
        room = share * (self.deadline - time.monotonic()) / seeds
        return max(int(1000 * room / sum(step_ms)), at_least)


def calibrate(step_ms: Callable[[str], float], variants: Sequence[str], skipped: dict[str, str]) -> dict[str, float]:
    """Milliseconds a step of each variant that can run here; of the others ``skipped`` gets the reasons."""
    times = {}
    for variant in variants:
        try:
            times[variant] = step_ms(variant)
            print(f"{variant}: {times[variant]:.0f} ms a step", flush=True)
        except Exception as error:  # whatever another package raises, or too little memory: the reason is told in the results
            skipped[variant] = _reason(error)
            print(f"{variant} cannot run: {skipped[variant]}", flush=True)
        free()
    return times


def each(
    budget: Budget, seeds: int, variants: Iterable[str], train: Callable[[str, int], Run], skipped: dict[str, str]
) -> Iterator[Run]:
    """Train every variant from every seed while the budget lasts; of those that fail or find it spent ``skipped`` gets the reasons.

    A further seed begins only if as much time is left as the variant took before: half a run would say nothing.
    A SIGTERM ends the variant that runs, and the budget: what came before it is still written.
    """
    took: dict[str, float] = {}

    def ended(signal_: int, frame: Any) -> None:
        budget.deadline = -math.inf
        raise TimeoutError("the process was told to end")

    previous = signal.signal(signal.SIGTERM, ended)
    try:
        for seed in range(seeds):
            for variant in variants:
                name = f"{variant}, seed {seed}"
                began = time.monotonic()
                if began + took.get(variant, 0.0) > budget.deadline:
                    skipped[name] = "the budget ended" if budget.spent else "the budget left too little for it"
                    continue
                try:
                    run = train(variant, seed)
                    run.seconds = took[variant] = round(time.monotonic() - began, 3)
                except Exception as error:  # as in calibrate: the other variants go on
                    told = budget.deadline == -math.inf  # what it interrupts may wrap the error that says so
                    skipped[name] = "the process was told to end" if told else _reason(error)
                    print(f"{name} failed: {skipped[name]}", flush=True)
                else:
                    yield run
                free()
    finally:
        signal.signal(signal.SIGTERM, previous)


def comparable(runs: Sequence[Run]) -> list[Run]:
    """Those that a table may put side by side: of each variant the ones that no budget cut, or its longest if all were cut."""
    kept = []
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        kept += [run for run in mine if not run.cut] or [max(mine, key=lambda run: run.steps)]
    return kept


def cut(runs: Sequence[Run]) -> dict[str, str]:
    """What to say of the runs that :func:`comparable` leaves out."""
    kept = comparable(runs)
    return {
        f"{run.variant}, seed {run.seed}": f"the budget ended after {run.steps} steps, not in the table"
        for run in runs
        if not any(run is one for one in kept)
    }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def free() -> None:
    """Give the memory of what went out of scope back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluated_at(steps: int, times: int) -> set[int]:
    """The numbers of steps after which a run is evaluated, the last of them ``steps``."""
    return {round(steps * (i + 1) / times) for i in range(times)} - {0}


def rate_at(step: int, steps: int) -> float:
    """Linear over the first twentieth, then a cosine to a tenth."""
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Decay for matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def now(device: torch.device) -> float:
    """Seconds, when all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def optimize(
    run: Run,
    model: nn.Module,
    steps: int,
    batch: Callable[[], Iterable[Callable[[], torch.Tensor]]],
    *,
    rate: float,
    device: torch.device,
    after_step: Callable[[int], None],
    deadline: float = math.inf,
) -> None:
    """Train with AdamW for ``steps``, or up to the deadline; ``run`` gets times and memory.

    Parameters
    ----------
    batch: gives one step's losses as functions, one a piece that fits the memory, each already weighted by its share.
    after_step: called with the number of steps done, outside the measured time, while ``run.cut`` says whether it is the last.
    """
    optimizer = adamw(model, rate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        started = now(device)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps)
        for loss in batch():
            with autocast(device):
                value = loss()
            value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.milliseconds.append(round(1000 * (now(device) - started), 3))
        if device.type == "cuda" and step < 3:
            run.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        run.steps = step + 1
        run.cut = time.monotonic() > deadline and run.steps < steps
        after_step(run.steps)
        if run.cut:
            break
    kept = sorted(run.milliseconds[run.steps // 3 :])  # the first compile and warm up
    run.step_ms = kept[len(kept) // 2]


@dataclass
class Sequences:
    """Batches of ``sequences`` times ``context`` tokens from a stream, ``micro`` sequences at once."""

    stream: np.ndarray[Any, np.dtype[np.uint16]]
    context: int
    sequences: int
    micro: int
    device: torch.device

    @classmethod
    def of(cls, stream: Any, context: int, batch_tokens: int, micro_tokens: int, device: torch.device) -> Sequences:
        sequences = max(batch_tokens // context, 1)
        micro = min(max(micro_tokens // context, 1), sequences)
        return cls(stream, context, sequences - sequences % micro, micro, device)

    def draw(self, generator: np.random.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets of one step, from random places."""
        starts = generator.integers(0, len(self.stream) - self.context - 1, self.sequences)
        return [self._at(starts[i : i + self.micro]) for i in range(0, self.sequences, self.micro)]

    def front(self, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets of the first so many tokens, for evaluation."""
        count = max(min(tokens, len(self.stream) - 1) // self.context, 1)
        starts = np.arange(count) * self.context
        for i in range(0, count, self.micro):
            yield self._at(starts[i : i + self.micro])

    def _at(self, starts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.stack([self.stream[start : start + self.context + 1] for start in starts]).astype(np.int64)
        ids = torch.from_numpy(rows).to(self.device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:]
