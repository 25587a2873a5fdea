"""``adasplash profile``: how sparse alpha-entmax would be on captured attention, by layer and head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adasplash_cli.options import find_device
from adasplash_cli.output import console, json_option, print_json, print_table

if TYPE_CHECKING:
    from adasplash_core.profiling import HeadProfile, Summary, WorkloadProfile

_COLUMNS = ["support/row", "support", "blocks", "columns", "above m-1", "m - tau"]


@click.command("profile")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--alpha",
    "alphas",
    multiple=True,
    type=float,
    default=(1.5, 2.0),
    show_default="1.5 and 2",
    help="Profile this alpha, above 1 and up to 2. Can be repeated.",
)
@click.option("--layers", help='Only these layers of the file, for instance "0,4".  [default: all]')
@click.option("--backend", default="auto", show_default=True, help="The backend that computes the thresholds.")
@click.option("--device", help="Where to compute, as torch names it.  [default: cuda if there is one, else cpu]")
@json_option
def profile(path: Path, alphas: tuple[float, ...], layers: str | None, backend: str, device: str | None, as_json: bool) -> None:
    """Show what alpha-entmax would do on the captured FILE: per layer and head, what is zero and how soon that is known.

    \b
    support/row  keys with weight, a row's mean
    support      the same, of the keys that the mask allows
    blocks       64 x 64 blocks of scores with any weight
    columns      (64-row block, key) columns with any weight
    above m-1    columns that the row maximum m alone cannot rule out: a key with z <= m - 1 never has weight
    m - tau      how far the threshold lies below the maximum: mean [10th, 90th percentile]; 1 is the bound m - 1

    Densities are of what the mask allows; rows of padding are left out. The captured model computed softmax: this says what
    swapping entmax in would do to its attention, not what a model trained with entmax does.
    """
    from rich.progress import Progress

    from adasplash_core.profiling import profile_layers
    from adasplash_core.workload import Workload

    workload = Workload.load(path)
    device_name, _ = find_device(device)
    indices = workload.indices if layers is None else _numbers(layers)
    for index in indices:
        workload.summary(index)
    with Progress(console=console(stderr=True), transient=True, disable=as_json) as progress:
        task = progress.add_task("Profiling", total=len(indices))
        profiled = profile_layers(
            (workload.layer(index).to(device_name) for index in indices),
            tuple(dict.fromkeys(alphas)),
            backend=backend,
            progress=lambda layer: progress.update(task, advance=1, description=f"Profiled layer {layer.index}"),
        )
    if as_json:
        print_json({"path": path, "workload": workload.as_dict(), **profiled.as_dict()})
    else:
        _print(profiled, workload.info.model, workload.info.text)


def _print(profiled: WorkloadProfile, model: str, text: str) -> None:
    for summary in profiled.summaries:
        rows = [[p.layer, p.head, *_cells(p)] for p in profiled.heads if p.alpha == summary.alpha]
        rows.append(["all", "all", *_cells(summary)])
        print_table(
            f"alpha = {summary.alpha:g}: {model} on {text}",
            ["layer", "head", *_COLUMNS],
            rows,
            right=["layer", "head", *_COLUMNS],
        )
    for summary in profiled.summaries:
        click.echo(summary.advice)


def _cells(p: HeadProfile | Summary) -> list[str]:
    quantiles = getattr(p, "gap_quantiles", None)
    spread = f" [{quantiles['0.1']:.2f}, {quantiles['0.9']:.2f}]" if quantiles else ""
    densities = (p.support_density, p.block_density, p.column_density, p.bound_density)
    return [f"{p.support_per_row:.1f}", *(f"{density:.2%}" for density in densities), f"{p.gap:.2f}{spread}"]


def _numbers(choice: str) -> list[int]:
    try:
        return sorted({int(number) for number in choice.split(",")})
    except ValueError as error:
        raise click.BadParameter(f"{choice!r} is not numbers with commas between them.", param_hint="--layers") from error


command = profile
