"""Draw docs/images/attention_lengths.svg: time of attention against length, from a results file of benchmarks/attention.py --lengths.

Usage: plot_lengths.py [RESULTS.json] [OUTPUT.svg]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "attention_h200.json"
OUTPUT = ROOT / "docs" / "images" / "attention_lengths.svg"
STYLES = {
    "ours": ("adasplash-core, alpha 1.5", "#c2571a", "o-"),
    "adasplash": ("adasplash 0.2.2, alpha 1.5", "#7a3e9d", "s-"),
    "dense entmax15": ("entmax package, dense", "#5b8c5a", "^-"),
    "cudnn": ("softmax, cuDNN", "#2c6e9b", "D--"),
    "flash2": ("softmax, FlashAttention-2", "#888888", "v--"),
}


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else OUTPUT
    report: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    rows = [row | {"times": row["times"] | peer_times(report, row)} for row in report.get("lengths", [])]
    if not rows:
        raise SystemExit(
            f"{results} holds no lengths: run `python benchmarks/attention.py --lengths --json {results}` on a GPU."
        )
    matplotlib.rcParams.update(
        {"svg.hashsalt": "adasplash", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    spreads = sorted({row["spread"] for row in rows})
    figure, axes = plt.subplots(
        1, len(spreads), figsize=(4.8 * len(spreads), 4.0), layout="constrained", sharey=True, squeeze=False
    )
    for column, spread in zip(axes[0], spreads, strict=True):
        draw(column, [row for row in rows if row["spread"] == spread], f"queries N(0, 1) * {spread:g}")
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"16 heads of 64, causal, bfloat16; {report['machine'].get('gpu', 'no GPU')}", fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})
    print(f"{output} was written")


def peer_times(report: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The adasplash package's times, where the same input is a row of the main table: it autotunes for minutes at each length."""
    name = f"randn q*{row['spread']:g}, 16 x {row['length']} x 64"
    return next(
        ({"adasplash": x["peer"]["times"]["adasplash"]} for x in report.get("rows", []) if x["name"] == name and "peer" in x),
        {},
    )


def draw(axes: plt.Axes, rows: list[dict[str, Any]], title: str) -> None:
    """One line a competitor, log-log."""
    rows = sorted(rows, key=lambda row: row["length"])
    for name, (label, colour, style) in STYLES.items():
        points = [(row["length"], row["times"][name]) for row in rows if name in row["times"]]
        if points:
            times = [t["forward"] + t["backward"] for _, t in points]
            axes.plot([n for n, _ in points], times, style, color=colour, label=label, markersize=4)
    lengths = [row["length"] for row in rows]
    axes.set(xscale="log", yscale="log", title=title, xlabel="tokens")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(True, linewidth=0.3)


if __name__ == "__main__":
    main()
