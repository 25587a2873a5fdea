"""``adasplash tune``: find the fastest configs for this machine and remember them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from adasplash_cli.output import console, json_option, milliseconds, note, print_json, print_table

if TYPE_CHECKING:
    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import Pass
    from adasplash_tuner.session import Event, Finished, Report, Request

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
@click.option("--workload", type=click.Path(dir_okay=False), help="Tune on the layers of a file made by `adasplash capture`.")
@click.option(
    "--budget", metavar="TIME", callback=_parse_duration, help="Stop after about this long, as 40s or 5m.  [the profile's]"
)
@click.option("--passes", callback=_parse_passes, default="forward,backward", show_default=True, help="Which passes to tune.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@json_option
def command(
    gpu_auto: bool,
    device: str | None,
    backends: tuple[str, ...],
    profile: str,
    shapes: tuple[str, ...],
    workload: str | None,
    budget: float | None,
    passes: tuple[Pass, ...],
    fresh: bool,
    as_json: bool,
) -> None:
    """Find the fastest configs for this machine and remember them.

    Every measurement is stored as it is made: an interrupted run (Ctrl-C) keeps what it has and the next one goes on from there. The
    default config always competes and wins ties, so tuning never makes anything slower. Configs whose error against the float64
    oracle exceeds the dtype's bound are not admitted.
    """
    if gpu_auto and device is not None:
        raise click.UsageError("--gpu-auto and --device exclude each other.")
    from adasplash_tuner.session import Request
    from adasplash_tuner.shapes import Shape

    request = Request(
        backends=backends,
        shapes=tuple(Shape.parse(text) for text in shapes),
        workload=workload,
        passes=passes,
        profile=profile,
        budget_s=budget,
        fresh=fresh,
    )
    devices = _devices(gpu_auto, device, quiet=as_json)
    reports, problems = _run(request, devices, as_json)
    if as_json:
        print_json({"devices": [_report_json(report) for report in reports], "problems": problems})
    else:
        for report in reports:
            _print_report(report)
    for problem in problems:
        note(problem)
    for report in reports:
        if report.store_problem:
            note(f"Nothing more was kept from the moment the database failed. {report.store_problem}")
    if problems or not all(report.ok for report in reports):
        raise click.exceptions.Exit(1)


def _devices(gpu_auto: bool, name: str | None, quiet: bool) -> list[DeviceInfo]:
    from adasplash_core.device import device_info, visible_devices
    from adasplash_core.errors import ArgumentError

    if name is not None:
        try:
            return [device_info(name)]
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ArgumentError(
                "--device must be a device of this machine.", seen=f"{name!r} ({str(error).splitlines()[0]})"
            ) from error
    gpus = visible_devices()
    if not gpus:
        if gpu_auto and not quiet:
            note("No GPU is visible to torch: tuning the CPU.")
        return [device_info("cpu")]
    return gpus if gpu_auto else gpus[:1]


def _run(request: Request, devices: list[DeviceInfo], as_json: bool) -> tuple[list[Report], list[str]]:
    """Reports, and what went wrong besides."""
    from dataclasses import replace

    from adasplash_tuner.session import tune
    from adasplash_tuner.workers import split, tune_side_by_side

    with _display([d.name for d in devices], quiet=as_json) as display:
        try:
            if len(devices) == 1:
                device = devices[0]
                name = device.type if device.type == "cpu" else f"{device.type}:{device.index}"
                return [tune(replace(request, device=name), lambda event: display.show(0, event))], []
            results = tune_side_by_side(split(request, devices), display.show)
        except KeyboardInterrupt:
            done = len(display.finished)
            raise click.ClickException(
                f"Interrupted after {_count(done, 'search')}. What was measured is kept; the same command goes on from there."
            ) from None
    reports = [result.report for result in results if result.report is not None]
    return reports, [f"{result.request.device}: {result.problem}" for result in results if result.problem]


class _Display:
    """Shows events: a live line per device on a terminal, a line per finished search elsewhere, nothing when quiet."""

    def __init__(self, names: list[str], quiet: bool) -> None:
        self.names, self.quiet = names, quiet
        self.finished: list[Finished] = []
        self.progress: Any = None
        self._tasks: dict[int, Any] = {}
        self._weights: dict[int, int] = {}

    def show(self, number: int, event: Event) -> None:
        from adasplash_tuner.session import Finished, Planned, Step

        if isinstance(event, Planned):
            self._planned(number, event)
        elif isinstance(event, Step) and self.progress is not None and number in self._tasks:
            p = event.progress
            part = {"preparing": 0.0, "screening": 0.6, "halving": 0.7, "final": 1.0}[p.stage] * p.done / max(p.total, 1)
            best = f", best {milliseconds(p.best_ms)} ms" if p.best_ms is not None else ""
            default = f", default {milliseconds(p.default_ms)} ms" if p.default_ms is not None else ""
            text = f"{event.label}: {p.stage} {p.done}/{p.total}{best}{default}"
            self.progress.update(self._tasks[number], completed=event.index + part, description=text)
        elif isinstance(event, Finished):
            self.finished.append(event)
            if self.progress is not None and number in self._tasks:
                self.progress.update(self._tasks[number], completed=event.index + 1, description=event.label)
            self._say(_finished_line(event))

    def _planned(self, number: int, event: Any) -> None:
        budget = f"within {_duration(event.budget_s)}"
        self._say(
            f"{event.device.name}: {_count(len(event.searches), 'search')}, about {_duration(event.estimate_s)} ({budget})"
        )
        for text in event.passed_over:
            self._say(f"  not tuned: {text}")
        if self.progress is not None:
            self._tasks[number] = self.progress.add_task(self.names[number], total=len(event.searches))

    def _say(self, text: str) -> None:
        if self.quiet:
            return
        if self.progress is not None:
            self.progress.console.print(text, markup=False)
        else:
            note(text)


@contextmanager
def _display(names: list[str], quiet: bool) -> Iterator[_Display]:
    display = _Display(names, quiet)
    screen = console(stderr=True)
    if quiet or not screen.is_terminal:
        yield display
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as display.progress:
        yield display


def _finished_line(event: Finished) -> str:
    if event.outcome is None:
        return f"{event.label}: not tuned, {event.problem}"
    best = event.outcome.best
    words = {"tuned": f"{best.gain:.2f}x the default's speed", "default": "the default is the best", "kept": "already tuned"}
    left = (
        f", {event.outcome.left} of {event.outcome.candidates} candidates left for the next run" if event.outcome.left else ""
    )
    return f"{event.label}: {milliseconds(best.median_ms)} ms, {words[event.outcome.verdict]}{left}"


def _print_report(report: Report) -> None:
    columns = ["shape", "backend", "pass", "default ms", "tuned ms", "gain", "error", "measured", "config"]
    rows = []
    for finished in report.finished:
        if finished.outcome is None:
            continue
        outcome, best = finished.outcome, finished.outcome.best
        changed = {name: value for name, value in best.config.items() if outcome.default.get(name) != value}
        config = ", ".join(f"{name}={value}" for name, value in changed.items()) or "the default"
        measured = f"{outcome.candidates - outcome.left}/{outcome.candidates}"
        rows.append(
            [
                best.shape,
                best.key.backend,
                best.key.pass_,
                milliseconds(best.default_ms),
                milliseconds(best.median_ms),
                f"{best.gain:.2f}x",
                f"{best.error:.0e}",
                measured,
                config,
            ]
        )
    print_table(report.device.name, columns, rows, right=columns[3:8])
    for finished in report.finished:
        if finished.outcome is None:
            click.echo(f"not tuned: {finished.label}: {finished.problem}")
    for text in report.passed_over:
        click.echo(f"not tuned: {text}")
    click.echo(f"{_duration(report.seconds)}; stored in {report.database}")


def _report_json(report: Report) -> dict[str, Any]:
    searches = []
    for finished in report.finished:
        entry: dict[str, Any] = {"label": finished.label, "problem": finished.problem or None}
        if finished.outcome is not None:
            outcome = finished.outcome
            entry |= {
                "verdict": outcome.verdict,
                "gain": outcome.best.gain,
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}es"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
