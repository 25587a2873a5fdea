"""``adasplash cache report``: everything in the database of tuned configs as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from adasplash_cli.output import json_option, print_json


@click.command("report")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="tuned.html")
@click.option("--backend", help="Only this backend's.")
@click.option("--device", help="Only devices whose name contains this text.")
@json_option
def report_command(file: Path, backend: str | None, device: str | None, as_json: bool) -> None:
    """Write what was tuned, and every config that was measured for it, as one HTML page to FILE, or to standard output."""
    if str(file) == "-" and as_json:
        raise click.UsageError("--json and writing the page to standard output exclude each other.")
    if not file.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {file.absolute().parent}", param_hint="FILE")
    from adasplash_tuner.report.data import from_store
    from adasplash_tuner.report.page import render
    from adasplash_tuner.storage.snapshot import open_source

    store = open_source()
    data = from_store(store, backend, device)
    page = render(data)
    if str(file) == "-":
        click.echo(page)
        return
    file.write_text(page, encoding="utf-8")
    if as_json:
        print_json({"location": str(store.location), "file": file, "searches": len(data.searches), "gain": data.gain})
    else:
        click.echo(f"{file}: {len(data.searches)} tuned configs of {store.location}")
