"""``adasplash bench``: time and peak memory of every capable backend beside softmax and the dense entmax."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adasplash_cli.options import DTYPES, find_device
from adasplash_cli.output import json_option, mebibytes, milliseconds, note, print_json, print_table

if TYPE_CHECKING:
    from adasplash_cli.contest import Measurement, Problem


DEFAULT_SHAPE = "B=1,H=9,Hkv=3,L=1024,D=64,causal"


@click.command("bench")
@click.option(
    "--shapes",
    multiple=True,
    metavar="SHAPE",
    help=f"Random inputs, as {DEFAULT_SHAPE}, which is the default; repeat for more.",
)
@click.option(
    "--workload", type=click.Path(dir_okay=False), help="Measure on the layers of a file made by `adasplash capture`."
)
@click.option("--layers", help="Only these layers of the workload, as 0,12.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Data type, where a shape names none.  [float32; a workload's own]")
@click.option(
    "--sharpness", type=float, default=4.0, show_default=True, help="Random queries are multiplied by this, for --shapes."
)
@click.option("--alpha", type=click.FloatRange(1.0, 2.0), default=1.5, show_default=True, help="Of the entmax contenders.")
@click.option("--device", help="As torch names it.  [cuda if there is one, else cpu]")
@click.option("--backend", "backends", multiple=True, help="Only this backend; repeat for more.  [every capable one]")
@click.option(
    "--with-defaults", is_flag=True, help="Also measure each backend with its default config, as if nothing were tuned."
)
@click.option("--forward-only", is_flag=True, help="Leave the backward out.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Measured runs of each contender.")
@click.option(
    "--patience",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="A contender whose runs took this many seconds sits out the rest.",
)
@click.option("--no-memory", is_flag=True, help="Leave peak memory out, which on a CPU takes a process for each contender.")
@click.option("--no-dense", is_flag=True, help="Leave the entmax package's dense bisection out.")
@json_option
def command(
    shapes: tuple[str, ...],
    workload: str | None,
    layers: str | None,
    dtype: str | None,
    sharpness: float,
    alpha: float,
    device: str | None,
    backends: tuple[str, ...],
    with_defaults: bool,
    forward_only: bool,
    rounds: int,
    patience: float,
    no_memory: bool,
    no_dense: bool,
    as_json: bool,
) -> None:
    """Time every capable backend, and its peak memory, beside softmax.

    Contenders take turns and the medians are printed. Softmax (scaled_dot_product_attention) computes something else: it is
    there to say what entmax costs. The dense contender is `entmax_bisect` over the whole score matrix, if the entmax package is
    installed. Peak memory is beyond the inputs.
    """
    from adasplash_cli.contest import DEFAULT_CONFIG, DENSE, SOFTMAX
    from adasplash_core.plugins import registry
    from adasplash_core.precision import tf32

    device, facts = find_device(device)
    if workload is not None:
        if shapes:
            raise click.UsageError("--shapes and --workload exclude each other.")
        problems = _captured(workload, layers, dtype, device)
    else:
        problems = [_random(text, dtype or "float32", device, sharpness) for text in shapes or (DEFAULT_SHAPE,)]
    names = [registry().backend(name).name for name in backends] or _backend_names()
    contenders = [c for name in names for c in ((name, name + DEFAULT_CONFIG) if with_defaults else (name,))]
    contenders += [SOFTMAX] if no_dense else [DENSE, SOFTMAX]

    reports = []
    for problem in problems:
        with tf32(True) if problem.tf32 else contextlib.nullcontext():
            results = _measure(problem, contenders, alpha, not forward_only, rounds, patience, memory=not no_memory)
            measured = [r.contender for r in results if not r.reason and r.contender in names]
            density = _density(problem, alpha, measured[0]) if measured else None
        reports.append({"problem": problem.label, "density": density, "results": [r.as_dict() for r in results]})
        if not as_json:
            _print(problem, density, results, alpha, backward=not forward_only, memory=not no_memory)
    if as_json:
        print_json(
            {"device": facts.as_dict(), "alpha": alpha, "rounds": rounds, "backward": not forward_only, "problems": reports}
        )
    else:
        click.echo(f"{facts.name}; alpha={alpha}; medians of {rounds} or fewer runs.")


def _backend_names() -> list[str]:
    """All registered backends, the preferred first; those that cannot do a problem give their reason in the table."""
    from adasplash_core.plugins import registry

    return [b.name for b in sorted(registry().backends.values(), key=lambda b: -b.priority)]


def _random(text: str, dtype: str, device: str, sharpness: float) -> Problem:
    import torch

    from adasplash_cli.contest import Problem
    from adasplash_core.precision import knows_tf32
    from adasplash_tuner.shapes.shape import Shape

    shape = Shape.parse(text, default_dtype=dtype)
    if shape.alpha_class != "1.5":
        raise click.BadParameter(f"{text!r}: alpha is given by --alpha", param_hint="--shapes")
    sizes = {name: getattr(shape, name) for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "head_dim_v")}
    if shape.tf32 and not knows_tf32(torch.device(device).type):
        raise click.BadParameter(f"{text!r}: TF32 is of NVIDIA's GPUs, not of {device}", param_hint="--shapes")
    flags = {name: getattr(shape, name) for name in ("dtype", "causal", "deterministic", "tf32")}
    return Problem(device=device, sharpness=sharpness, **flags, **sizes)


def _captured(path: str, layers: str | None, dtype: str | None, device: str) -> list[Problem]:
    from adasplash_cli.contest import Problem
    from adasplash_core.workload import Workload

    loaded = Workload.load(path)
    wanted = loaded.indices
    if layers is not None:
        try:
            wanted = tuple(int(part) for part in layers.split(","))
        except ValueError:
            raise click.BadParameter(f"{layers!r} is not a list of layer numbers like 0,12", param_hint="--layers") from None
        if missing := sorted(set(wanted) - set(loaded.indices)):
            raise click.BadParameter(
                f"{path} has no layer {missing[0]}; it has {', '.join(map(str, loaded.indices))}", param_hint="--layers"
            )
    dtypes = {summary.index: summary.dtype for summary in loaded.summaries}
    return [Problem(dtype=dtype or dtypes[layer], device=device, workload=path, layer=layer) for layer in wanted]


def _measure(
    problem: Problem, contenders: Sequence[str], alpha: float, backward: bool, rounds: int, patience: float, *, memory: bool
) -> list[Measurement]:
    from rich.progress import Progress

    from adasplash_cli.contest import peak_memory, time_contenders
    from adasplash_cli.output import console

    screen = console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(problem.label, total=len(contenders) * (rounds + 1 + memory))
        results = time_contenders(
            problem,
            contenders,
            alpha=alpha,
            backward=backward,
            rounds=rounds,
            patience_s=patience,
            on_round=lambda: progress.advance(task),
        )
        for result in results:
            if memory and not result.reason:
                try:
                    result.peak_bytes = peak_memory(problem, result.contender, alpha=alpha, backward=backward)
                except RuntimeError as error:
                    note(f"{problem.label}, {result.contender}: {error}")
            progress.advance(task)
    return results


def _density(problem: Problem, alpha: float, backend: str) -> float:
    """Share of the visible (query, key) pairs with a weight other than 0."""
    import torch

    from adasplash_core import attention

    with torch.no_grad():
        _, stats = attention(**problem.build(), alpha=alpha, return_stats=True, backend=backend)
    return float(stats.density.mean())


def _print(
    problem: Problem, density: float | None, results: Sequence[Measurement], alpha: float, *, backward: bool, memory: bool
) -> None:
    from adasplash_cli.contest import SOFTMAX

    softmax = next((r.total_ms for r in results if r.contender == SOFTMAX), None)
    columns = ["contender", "forward ms", "backward ms", "sum", "x softmax", "spread", "peak MiB", "differs by"]
    left_out = ({"backward ms", "sum"} if not backward else set()) | (set() if memory else {"peak MiB"})
    rows = []
    for result in results:
        if result.total_ms is None:
            continue
        cells = {
            "contender": result.contender,
            "forward ms": milliseconds(result.forward_ms),
            "backward ms": milliseconds(result.backward_ms),
            "sum": milliseconds(result.total_ms),
            "x softmax": f"{result.total_ms / softmax:.2f}" if softmax else None,
            "spread": None if result.spread is None else f"{result.spread:.0%}",
            "peak MiB": mebibytes(result.peak_bytes),
            "differs by": None if result.difference is None else f"{result.difference:.0e}",
        }
        rows.append([cells[c] for c in columns if c not in left_out])
    title = f"{problem.label}, alpha={alpha}"
    if density is not None:
        title += f": {density:.2%} of the visible weights are not 0"
    print_table(title, [c for c in columns if c not in left_out], rows, right=columns[1:])
    for result in results:
        if result.reason:
            click.echo(f"  {result.contender} not measured: {result.reason}")
