"""How many evaluations of sum(p) the threshold's solvers need, against plain bisection: writes docs/_generated/solver_iterations.md.

Rows of 8192 scores drawn from N(0, 1), as in AdaSplash (arXiv 2502.12082), which reports 3 iterations of Halley-bisection and 23 of
bisection for alpha = 1.5. Converged means: tau of every row within 2^-23, float32's machine precision, of the threshold found in
float64 (tau lies in [max z - 1, max z], so this is the last bit of the gap). Arithmetic is float64, so that rounding plays no part.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from adasplash_torch.solver import Method, threshold

TARGET = Path(__file__).parents[1] / "docs" / "_generated" / "solver_iterations.md"
ALPHAS = (1.1, 1.25, 1.5, 1.75, 2.0)
PRECISION = 2.0**-23
LIMIT = 64
Solver = Callable[[torch.Tensor, float, int], torch.Tensor]


def bisection(scores: torch.Tensor, alpha: float, iterations: int) -> torch.Tensor:
    """tau after halving [max z - 1, max z - n^(1 - alpha)] ``iterations`` times."""
    z = (alpha - 1) * scores
    highest = z.amax(-1)
    low, high = highest - 1, highest - scores.shape[-1] ** (1 - alpha)
    for _ in range(iterations):
        middle = (low + high) / 2
        too_low = (z - middle[:, None]).clamp_(min=0).pow_(1 / (alpha - 1)).sum(-1) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2


def solver(method: Method | None) -> Solver:
    return lambda scores, alpha, iterations: threshold(scores, alpha, iterations, method).tau


def steps_to_converge(solve: Solver, scores: torch.Tensor, alpha: float, exact: torch.Tensor) -> torch.Tensor:
    """The fewest iterations after which each row has converged: int64 (rows,)."""
    steps = torch.full(exact.shape, LIMIT)
    for iterations in range(1, LIMIT):
        converged = (solve(scores, alpha, iterations) - exact).abs() <= PRECISION
        steps = torch.where(converged, steps.clamp(max=iterations), LIMIT)
        if bool(converged.all()):
            return steps
    raise RuntimeError(f"no convergence within {LIMIT} iterations at alpha = {alpha}")


def table(rows: int, length: int) -> str:
    scores = torch.randn(rows, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solvers: dict[str, Solver] = {
        "bisection": bisection,
        "Newton": solver("newton"),
        "Halley-bisection": solver("halley"),
        "hybrid": solver("hybrid"),
        "used here": solver(None),
    }
    lines = [f"| alpha | {' | '.join(solvers)} |", f"|---|{'---|' * len(solvers)}"]
    for alpha in ALPHAS:
        exact = threshold(scores, alpha, LIMIT).tau
        counts = [steps_to_converge(solve, scores, alpha, exact) for solve in solvers.values()]
        lines.append(f"| {alpha} | {' | '.join(f'{int(c.median())} ({int(c.max())})' for c in counts)} |")
    return f"""Iterations until a row of {length} scores from N(0, 1) has its threshold to 2^-23: median of {rows} rows (slowest).

{chr(10).join(lines)}

*Newton* and *Halley-bisection* start from tau = max z - 1. *Hybrid*: first a Newton step on ln(sum p), then Halley's up to
alpha = 1.5 and Newton's above. All three stay inside a bracket. *Used here*: the hybrid, except at alpha = 1.5 and 2, where the
closed form on the current support costs less an iteration. Attention starts nearer to the root than this table, from a bound that
the maxima of groups of keys give. Made by `python benchmarks/solver_iterations.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    text = table(options.rows, options.length)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
