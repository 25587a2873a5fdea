"""Draw docs/images/evidence_losses.svg and evidence_density.svg from the results of examples/evidence/: losses, and what is not zero.

Usage: plot_evidence.py [FOLDER OF RESULTS] [FOLDER OF IMAGES]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ROOT = Path(__file__).resolve().parent.parent
PANELS = {
    "language_modelling_124m_1024": "124M from scratch, 1024 tokens",
    "language_modelling_124m_4096": "124M from scratch, 4096 tokens",
    "language_modelling_longer_124m_4096": "124M from scratch, 4096 tokens, more steps",
    "continued_training_8192": "SmolLM2-135M, 8192 tokens",
}
COLOURS = {
    "softmax": "#2c6e9b",
    "entmax": "#c2571a",
    "annealed": "#7a3e9d",
    "learned": "#5b8c5a",
    "asentmax": "#b59a2e",
    "dense": "#888888",
}


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results"
    images = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "images"
    found = {
        title: json.loads(path.read_text(encoding="utf-8"))
        for name, title in PANELS.items()
        for path in results.glob(f"{name}_*.json")
    }
    if not found:
        raise SystemExit(f"{results} holds none of {', '.join(PANELS)}: run the scripts in examples/evidence/ first.")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "adasplash", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    for name, draw in (("evidence_losses", losses), ("evidence_density", densities)):
        figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4.0), layout="constrained", squeeze=False)
        for panel, (title, report) in zip(axes[0], found.items(), strict=True):
            draw(panel, report)
            panel.set_title(title, fontsize=10)
            panel.grid(True, linewidth=0.3)
            panel.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        figure.suptitle(next(iter(found.values()))["machine"]["device"], fontsize=9)
        figure.savefig(images / f"{name}.svg", metadata={"Date": None})
        print(f"{images / name}.svg was written")


def losses(axes: plt.Axes, report: dict[str, Any]) -> None:
    """Validation loss against tokens trained on; several seeds are lines of one colour, and one evaluation alone is none."""
    for run in report["runs"]:
        points = [(entry["tokens"] / 1e6, entry["validation_loss"]) for entry in run["curve"]]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), "o-", color=colour(run), label=run["variant"], markersize=3, linewidth=1)
    axes.set(xlabel="million tokens trained on", ylabel="validation loss, nats a token")
    once_each(axes)


def densities(axes: plt.Axes, report: dict[str, Any]) -> None:
    """Share of the allowed weights that are not zero, by layer: after the first evaluation (thin) and the last."""
    for run in report["runs"]:
        curve = [entry for entry in run["curve"] if entry["density_by_layer_and_head"]]
        for entry, width in ((curve[0], 0.6), (curve[-1], 1.6)) if curve else ():
            layers = [100 * fmean(layer) for layer in entry["density_by_layer_and_head"]]
            label = f"{run['variant']}, {entry['tokens'] / 1e6:.1f} M tokens"
            axes.plot(range(1, len(layers) + 1), layers, "o-", color=colour(run), label=label, markersize=3, linewidth=width)
    axes.set(yscale="log", xlabel="layer", ylabel="weights that are not zero, %")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def colour(run: dict[str, Any]) -> str:
    return COLOURS.get(run["variant"].split()[0], "#333333")


def once_each(axes: plt.Axes) -> None:
    """One entry in the legend for each label."""
    seen: set[str] = set()
    for line in axes.get_lines():
        if line.get_label() in seen:
            line.set_label("_")
        seen.add(str(line.get_label()))


if __name__ == "__main__":
    main()
