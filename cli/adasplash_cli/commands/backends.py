"""``adasplash backends``: what is registered, and why some of it cannot run here; ``check``: the conformance suite."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from adasplash_cli.options import find_device
from adasplash_cli.output import console, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from adasplash_core.plugins import BackendRecord
    from adasplash_core.testing import CheckResult


@click.group("backends", invoke_without_command=True)
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the backends: where they come from, and whether they can run here or why not.

    Below them, what is wrong with plugins that could not be used.
    """
    if context.invoked_subcommand is not None:
        return
    from adasplash_core.plugins import registry

    root = context.find_root().command
    if isinstance(root, click.Group):
        root.list_commands(context)  # loads plugins' commands: their problems belong in this report
    found = registry()
    if as_json:
        print_json({"backends": [_as_dict(record) for record in found.records], "problems": dict(found.problems)})
        return
    print_table("", ("name", "version", "origin", "available", "summary"), [_row(record) for record in found.records])
    if found.problems:
        click.echo("Plugins with problems:")
        for origin, why in found.problems.items():
            click.echo(f"  {origin}: {why}")


def _row(record: BackendRecord) -> Sequence[object]:
    reasons = record.unavailable_reasons()
    origin = f"{record.origin.distribution}, plugin {record.origin.plugin}"
    summary = record.backend.summary if record.backend else None
    return record.name, record.origin.version, origin, f"no: {'; '.join(reasons)}" if reasons else "yes", summary


def _as_dict(record: BackendRecord) -> dict[str, Any]:
    """A record, and what its backend declares."""
    reasons = record.unavailable_reasons()
    described: dict[str, Any] = {
        "name": record.name,
        "plugin": record.origin.plugin,
        "distribution": record.origin.distribution,
        "version": record.origin.version,
        "available": not reasons,
        "reasons": reasons,
    }
    backend = record.backend
    if backend is not None:
        described |= {
            "summary": backend.summary,
            "priority": backend.priority,
            "device_types": backend.device_types,
            "dtypes": backend.dtypes,
            "head_dims": str(backend.head_dims),
            "min_capability": backend.min_capability,
            "features": backend.features,
        }
    return described


@command.command("check")
@click.argument("name")
@click.option("--device", help="As torch names it.  [every device here that the backend declares]")
@click.option("--quick", is_flag=True, help="About a third of the checks: one of each kind.")
@json_option
@click.pass_context
def check(context: click.Context, name: str, device: str | None, quick: bool, as_json: bool) -> None:
    """Hold one backend against the contract.

    Runs the conformance suite of adasplash_core.testing: compares the backend NAME with a float64 oracle in everything it declares,
    and prints each check that fails. What it does not declare is skipped. The exit code is 1 if a check failed.
    """
    from adasplash_core.plugins import registry

    backend = registry().backend(name)
    devices = None if device is None else [find_device(device)[0]]

    from adasplash_core.testing.conformance import checks, devices_of, run_conformance

    total = sum(1 for _ in checks(backend, devices_of(backend) if devices is None else devices, quick))
    with _progress(name, total) as advance:
        results = run_conformance(backend, devices, quick, on_result=advance)
    if as_json:
        print_json({"backend": name, "quick": quick, "results": [result.as_dict() for result in results]})
    else:
        _print_results(name, results)
    if any(result.status == "failed" for result in results):
        context.exit(1)


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[CheckResult], None]]:
    """A bar on standard error, which only a terminal shows."""
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"checking {name}", total=total)
        yield lambda _result: bar.advance(task)


def _print_results(name: str, results: Sequence[CheckResult]) -> None:
    failed = [result for result in results if result.status == "failed"]
    if failed:
        print_table("Failed", ("check", "dtype", "device", "why"), [(r.check, r.dtype, r.device, r.message) for r in failed])
    closest = sorted((r for r in results if r.status == "passed" and r.bound > 0), key=lambda r: -r.error / r.bound)[:3]
    if closest:
        rows = [(r.check, r.dtype, r.device, r.message, f"{r.error:.1e}", f"{r.bound:.1e}") for r in closest]
        print_table(
            "Closest to their bounds", ("check", "dtype", "device", "worst", "error", "bound"), rows, right=("error", "bound")
        )
    undeclared = sorted({reason for r in results if r.status == "skipped" for reason in r.message.split("; ")})
    for reason in undeclared:
        click.echo(f"skipped: {reason}")
    counts = Counter(result.status for result in results)
    click.echo(f"{name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped (not declared).")
    if not failed and not counts["passed"]:
        note("Nothing was checked.")
