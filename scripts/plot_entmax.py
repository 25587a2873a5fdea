"""Draw docs/images/entmax.svg: what alpha does to two scores, and to many.

Usage: plot_entmax.py [OUTPUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

from adasplash_core import entmax

ALPHAS = (1.0, 1.25, 1.5, 2.0)
NAMES = {1.0: r"$\alpha$ = 1 (softmax)", 2.0: r"$\alpha$ = 2 (sparsemax)"}
COLOURS = ("#888888", "#7aa6c2", "#2c6e9b", "#c2571a")
OUTPUT = Path(__file__).parent.parent / "docs" / "images" / "entmax.svg"


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    matplotlib.rcParams.update(
        {"svg.hashsalt": "adasplash", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    draw_two_scores(left)
    draw_many_scores(right)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


def draw_two_scores(axes: plt.Axes) -> None:
    difference = torch.linspace(-4, 4, 401, dtype=torch.float64)
    scores = torch.stack([difference, torch.zeros_like(difference)], dim=-1)
    for alpha, colour in zip(ALPHAS, COLOURS, strict=True):
        axes.plot(difference, entmax(scores, alpha)[:, 0], color=colour, label=NAMES.get(alpha, rf"$\alpha$ = {alpha:g}"))
    axes.set(title="two keys: weight of the first", xlabel="how far its score lies above the other's", ylabel="weight")
    axes.legend(frameon=False, fontsize=9)


def draw_many_scores(axes: plt.Axes) -> None:
    scores = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(descending=True).values
    rank = torch.arange(1, 65)
    for alpha, colour in zip(ALPHAS, COLOURS, strict=True):
        weights = entmax(scores, alpha)
        support = int((weights > 0).sum())
        axes.plot(
            rank[:support], weights[:support], ".-", color=colour, markersize=5, label=rf"$\alpha$ = {alpha:g}: {support} keys"
        )
    axes.set_yscale("log")
    axes.set(title="64 N(0, 1) scores: the weights above 0", xlabel="key, by falling score", ylabel="weight")
    axes.set_ylim(1e-4, 1)
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
