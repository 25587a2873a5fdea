"""``adasplash tune``: find the fastest configs for this machine and remember them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adasplash_cli.interrupts import interrupts
from adasplash_cli.output import json_option, milliseconds, note, print_json, print_table
from adasplash_cli.tuning_display import count, display, duration

if TYPE_CHECKING:
    from adasplash_core.spec import Pass
    from adasplash_tuner.search.events import Event, Finished, Report, Request
    from adasplash_tuner.search.targets import Target
    from adasplash_tuner.shapes.shape import Shape

PASS_NAMES = ("forward", "backward")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def _parse_duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Seconds from ``40s``, ``5m``, ``1h`` or a number of seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.strip())
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a duration like 40s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _parse_passes(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    names = [word.strip() for word in value.split(",")]
    if unknown := [n for n in names if n not in PASS_NAMES]:
        raise click.BadParameter(f"{unknown[0]!r} is no pass; the passes are {', '.join(PASS_NAMES)}")
    return tuple(n for n in PASS_NAMES if n in names)


@click.command("tune")
@click.option("--gpu-auto", is_flag=True, help="Tune every GPU, side by side; without one, the CPU.")
@click.option("--device", help="Tune this device only, as torch names it.  [cuda:0 if there is one, else cpu]")
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="Only this backend; repeat for more.  [every capable one]"
)
@click.option(
    "--profile", type=click.Choice(["quick", "full"]), default="quick", show_default=True, help="How much to tune for."
)
@click.option(
    "--shapes",
    multiple=True,
    metavar="SHAPE",
    help="Tune for B=1,H=32,Hkv=8,L=8192,D=128,bf16,causal; repeat for more.  [the profile's]",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="CONFIG.json|PATH",
    help="Tune for the shapes of a Hugging Face model's config.",
)
@click.option("--workload", type=click.Path(dir_okay=False), help="Tune on the layers of a file made by `adasplash capture`.")
@click.option(
    "--budget", metavar="TIME", callback=_parse_duration, help="Stop after about this long, as 40s or 5m.  [the profile's]"
)
@click.option("--passes", callback=_parse_passes, default="forward,backward", show_default=True, help="Which passes to tune.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--warm-l2", is_flag=True, help="Leave what the run before left in a GPU's L2 cache; else it is overwritten.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write what was found as one HTML page.")
@json_option
def command(
    gpu_auto: bool,
    device: str | None,
    backends: tuple[str, ...],
    profile: str,
    shapes: tuple[str, ...],
    model: Path | None,
    workload: str | None,
    budget: float | None,
    passes: tuple[Pass, ...],
    fresh: bool,
    warm_l2: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Find the fastest configs for this machine and remember them.

    Every measurement is stored as it is made: an interrupted run (Ctrl-C) keeps what it has and the next one goes on from there. The
    default config always competes and wins ties, so tuning never makes anything slower. Configs whose error against the float64
    oracle exceeds the dtype's bound are not admitted.
    """
    if gpu_auto and device is not None:
        raise click.UsageError("--gpu-auto and --device exclude each other.")
    if report is not None and not report.absolute().parent.is_dir():  # told before an hour of measuring
        raise click.BadParameter(f"there is no folder {report.absolute().parent}", param_hint="--report")
    started = time.monotonic()
    from adasplash_tuner.search.events import Request
    from adasplash_tuner.shapes.shape import Shape

    targets = _targets(gpu_auto, device, quiet=as_json)
    wanted = tuple(Shape.parse(text) for text in shapes)
    if model is not None:
        wanted += _model_shapes(model, profile, targets)
    request = Request(
        backends=backends,
        shapes=wanted,
        workload=workload,
        passes=passes,
        profile=profile,
        budget_s=budget,
        fresh=fresh,
        cold_l2=not warm_l2,
        started=started,
    )
    reports, problems, crashes = _run(request, targets, as_json)
    if report is not None:
        from adasplash_tuner.report.data import from_reports
        from adasplash_tuner.report.page import render

        report.write_text(render(from_reports(reports)), encoding="utf-8")
    if as_json:
        found = {"devices": [_report_json(done) for done in reports], "problems": problems, "crashes": crashes}
        print_json({**found, "report": report})
    else:
        for done in reports:
            _print_report(done)
        if report is not None:
            click.echo(f"report: {report}")
    for text in (*crashes, *problems):
        note(text)
    for done in reports:
        if done.store_problem:
            note(f"Nothing more was kept from the moment the database failed. {done.store_problem}")
    if problems or not all(done.ok for done in reports):
        raise click.exceptions.Exit(1)


def _model_shapes(model: Path, profile: str, targets: list[Target]) -> tuple[Shape, ...]:
    from adasplash_tuner.shapes.models import model_shapes

    shapes = model_shapes(model, profile, targets[0].device.partition(":")[0])
    note(f"{model}: {'; '.join(map(str, shapes))}")
    return shapes


def _targets(gpu_auto: bool, name: str | None, quiet: bool) -> list[Target]:
    from adasplash_core.device import device_info
    from adasplash_core.errors import ArgumentError
    from adasplash_tuner.search.targets import Target, targets

    if name is not None:
        try:
            return [Target.of(device_info(name))]
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ArgumentError(
                "--device must be a device of this machine.", seen=f"{name!r} ({str(error).splitlines()[0]})"
            ) from error
    gpus = targets()
    if not gpus:
        if gpu_auto and not quiet:
            note("No GPU is visible to torch: tuning the CPU.")
        return [Target.of(device_info("cpu"))]
    return gpus if gpu_auto else gpus[:1]


def _run(request: Request, targets: list[Target], as_json: bool) -> tuple[list[Report], list[str], list[str]]:
    """Reports, why devices have none, and what else ended a process."""
    from dataclasses import replace

    from adasplash_tuner.search.session import tune
    from adasplash_tuner.search.workers import split, tune_side_by_side

    requests = split(request, targets)
    names = [_shown_name(target, requests) for target in targets]
    with display(names, quiet=as_json) as shown, interrupts() as interrupt:

        def observe(number: int, event: Event) -> None:
            interrupt.check()
            shown.show(number, event)

        try:
            if [target.device for target in targets] == ["cpu"]:  # nothing that runs on a CPU takes the process with it
                return [tune(replace(request, device="cpu"), lambda event: observe(0, event))], [], []
            results = tune_side_by_side(requests, observe)
        except KeyboardInterrupt:
            done = len(shown.finished)
            raise click.ClickException(
                f"Interrupted after {count(done, 'search')}. What was measured is kept; the same command goes on from there."
            ) from None
    reports = [result.report for result in results if result.report is not None]
    problems = [f"{result.request.device}: {result.problem}" for result in results if result.problem]
    return reports, problems, [f"{result.request.device}: {crash}" for result in results for crash in result.crashes]


def _shown_name(target: Target, requests: list[Request]) -> str:
    return f"{target.name} ({target.device})" if len(requests) > 1 and target.visible is None else target.name


def _print_report(report: Report) -> None:
    columns = ["shape", "pass", "default ms", "tuned ms", "gain", "error", "measured", "config"]
    rows = [_cells(finished) for finished in report.finished if finished.outcome is not None]
    print_table(report.device.name, columns, rows, right=columns[2:7])
    for finished in report.finished:
        if finished.problem:
            click.echo(f"not tuned: {finished.label}: {finished.problem}")
    for text in report.passed_over:
        click.echo(f"not tuned: {text}")
    if report.postponed:
        click.echo(f"No time was left for {count(len(report.postponed), 'search')}: the same command goes on from here.")
    click.echo(f"{duration(report.seconds)}; stored in {report.database}")


def _cells(finished: Finished) -> list[object]:
    outcome = finished.outcome
    assert outcome is not None
    best = outcome.best
    changed = {name: value for name, value in best.config.items() if outcome.default.get(name) != value}
    return [
        best.shape,
        f"{best.key.backend} {best.key.pass_}",
        milliseconds(best.default_ms),
        milliseconds(best.median_ms),
        f"{best.gain:.2f}x",
        f"{best.error:.0e} of {outcome.error_bound:.0e}",
        f"{outcome.candidates - outcome.left}/{outcome.candidates}",
        ", ".join(f"{name}={value}" for name, value in changed.items()) or "the default",
    ]


def _report_json(report: Report) -> dict[str, Any]:
    searches = []
    for finished in report.finished:
        entry: dict[str, Any] = {"label": finished.label, "problem": finished.problem or None, "postponed": finished.postponed}
        if finished.outcome is not None:
            outcome = finished.outcome
            entry |= {
                "verdict": outcome.verdict,
                "gain": outcome.best.gain,
                "gain_interval": outcome.gain_interval,
                "by_input": {t.label: {"default_ms": t.default_ms, "tuned_ms": t.best_ms} for t in outcome.by_input},
                "error_bound": outcome.error_bound,
                **outcome.best.as_dict(),
                "default_config": outcome.default,
                "candidates": outcome.candidates,
                "measured": outcome.measured,
                "left": outcome.left,
                "refused": dict(outcome.refused),
            }
        searches.append(entry)
    return {
        "device": report.device.as_dict(),
        "database": report.database,
        "seconds": report.seconds,
        "store_problem": report.store_problem or None,
        "passed_over": list(report.passed_over),
        "searches": searches,
    }
