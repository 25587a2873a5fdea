"""The entmax transform over one dimension on a GPU, beside softmax, the entmax package and adasplash's kernel.

    python benchmarks/transforms.py [--json benchmarks/results/transforms_h200.json] [--only 1.5] [--limit SECONDS] [--dry-run]

Milliseconds are medians; "x floor" is the forward's time over that of reading the input once and writing the output once, as a copy of
the same size takes on the same card. Ours is the public ``entmax``, dispatch and autograd inside the timing; competitors as their users
call them. Each row of the table has about 2^25 entries.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from adasplash_core import entmax

ENTRIES = 1 << 25
LENGTHS = (64, 512, 1024, 4096, 8192, 16384, 32768, 131072, 1 << 20)
Call = Callable[[torch.Tensor], torch.Tensor]


def cases() -> Iterator[tuple[str, float, torch.dtype, int, float]]:
    """(name, alpha, dtype, row length, spread of the normal scores)."""
    for dtype, lengths in ((torch.bfloat16, LENGTHS), (torch.float32, LENGTHS[2::2])):
        for n in lengths:
            yield f"alpha 1.5, {dtype_name(dtype)}, {n}", 1.5, dtype, n, 1.0
    for n in (1024, 32768):
        yield f"alpha 2, float32, {n}", 2.0, torch.float32, n, 1.0
        yield f"alpha 1.3, float32, {n}", 1.3, torch.float32, n, 1.0
        yield f"alpha 1.5, float32, {n}, hardly sparse", 1.5, torch.float32, n, 0.05
    yield "alpha 1.5, bfloat16, 1 row of 1048576", 1.5, torch.bfloat16, 1 << 20, 1.0


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def competitors(alpha: float, backend: str) -> dict[str, Call]:
    calls: dict[str, Call] = {"ours": partial(entmax, alpha=alpha, backend=backend), "softmax": partial(torch.softmax, dim=-1)}
    try:
        import entmax as package

        sorting = {1.5: package.entmax15, 2.0: package.sparsemax}.get(alpha)
        calls["entmax package"] = partial(sorting, dim=-1) if sorting else partial(package.entmax_bisect, alpha=alpha, dim=-1)
    except ModuleNotFoundError:
        print("  the entmax package is not installed")
    try:
        import adasplash

        calls["adasplash"] = partial(adasplash.triton_entmax, alpha=alpha)
    except ModuleNotFoundError:
        print("  adasplash is not installed")
    return calls


def milliseconds(run: Callable[[], Any], on_gpu: bool) -> float:
    if not on_gpu:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median"))


def run_case(name: str, alpha: float, dtype: torch.dtype, n: int, spread: float, on_gpu: bool, backend: str) -> dict[str, Any]:
    rows = 1 if "1 row" in name else max(1, (ENTRIES if on_gpu else 1 << 12) // n)
    torch.manual_seed(0)
    device = "cuda" if on_gpu else "cpu"
    x = (spread * torch.randn(rows, n, device=device)).to(dtype).requires_grad_()
    grad = torch.randn(rows, n, device=device).to(dtype)
    out = torch.empty_like(x)
    row: dict[str, Any] = {"name": name, "rows": rows, "n": n, "alpha": alpha, "dtype": dtype_name(dtype), "spread": spread}
    row["copy_ms"] = milliseconds(lambda: out.detach().copy_(x.detach()), on_gpu)
    row["times"], row["problems"] = {}, {}
    for competitor, call in competitors(alpha, backend).items():
        try:
            p = call(x)
            torch.autograd.grad(p, x, grad, retain_graph=True)
            forward = milliseconds(partial(call, x), on_gpu)
            backward = milliseconds(partial(torch.autograd.grad, p, x, grad, retain_graph=True), on_gpu)
        except Exception as error:  # a peer may not take this row: that is a result
            row["problems"][competitor] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        row["times"][competitor] = {"forward": forward, "backward": backward}
        del p
        if on_gpu:
            torch.cuda.empty_cache()
    return row


def text_of(row: dict[str, Any]) -> str:
    ours = row["times"]["ours"]
    total = ours["forward"] + ours["backward"]
    cells = [f"{ours['forward']:.3f}+{ours['backward']:.3f} ({ours['forward'] / row['copy_ms']:.1f}x floor)"]
    for name, times in row["times"].items():
        if name != "ours":
            both = times["forward"] + times["backward"]
            cells.append(f"{name} {times['forward']:.3f}+{times['backward']:.3f} ({both / total:.1f}x ours)")
    cells += [f"{name}: {problem}" for name, problem in row["problems"].items()]
    return f"{row['name']:<44} {row['rows']:>7} rows | ours " + " | ".join(cells)


def machine(on_gpu: bool) -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version(), "date": datetime.now(UTC).date().isoformat()}
    for package in ("triton", "entmax", "adasplash"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if on_gpu:
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"command": " ".join(["python", *sys.argv])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--backend", default="auto", help="of ours (%(default)s)")
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    parser.add_argument(
        "--limit", type=float, default=400.0, help="seconds after which no further row is started (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny; the numbers mean nothing")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not arguments.dry_run
    if not on_gpu and not arguments.dry_run:
        raise SystemExit("This benchmark needs a GPU: torch sees none. --dry-run tries its logic on a CPU.")
    started = time.monotonic()
    rows = []
    for case in cases():
        if arguments.only and not any(word in case[0] for word in arguments.only):
            continue
        if time.monotonic() - started > arguments.limit:
            print(f"Stopped after {arguments.limit:.0f} s.")
            break
        rows.append(run_case(*case, on_gpu=on_gpu, backend=arguments.backend))
        print(text_of(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine(on_gpu), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
