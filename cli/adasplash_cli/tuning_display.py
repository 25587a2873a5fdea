"""What ``adasplash tune`` shows while it works: a line for each finished search, and on a terminal, below them, what is going on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adasplash_cli.output import console, milliseconds, note

if TYPE_CHECKING:
    from rich.console import RenderableType

    from adasplash_tuner.search.events import Event, Finished, Planned, Step

_STAGES = {"preparing": "preparing", "screening": "screening", "halving": "narrowing", "final": "final"}


@dataclass
class _Device:
    """Where one device stands."""

    name: str
    planned: Planned | None = None
    step: Step | None = None
    finished: int = 0
    left_s: float = 0.0
    said_at: float = 0.0  # when left_s was said
    gains: list[float] = field(default_factory=list)


class Display:
    """Takes events of several devices. ``live`` is set while a terminal shows them."""

    def __init__(self, names: list[str], quiet: bool) -> None:
        self.devices = [_Device(name) for name in names]
        self.quiet = quiet
        self.finished: list[Finished] = []
        self.live: Any = None
        self._begun = time.monotonic()

    def show(self, number: int, event: Event) -> None:
        from adasplash_tuner.search.events import Finished, Planned, Step

        device = self.devices[number]
        if isinstance(event, Planned):
            device.planned = event
            self._said(device, event.estimate_s)
            self._say(self._plan_line(device, event))
            for text in event.passed_over:
                self._say(f"  not tuned: {text}")
        elif isinstance(event, Step):
            device.step = event
            self._said(device, event.left_s)
        elif isinstance(event, Finished):
            device.finished = max(device.finished, event.index + 1)
            device.step = None
            self._said(device, event.left_s)
            if event.outcome is not None:
                device.gains.append(event.outcome.best.gain)
            self.finished.append(event)
            self._say(self._finished_line(device, event))

    def _plan_line(self, device: _Device, event: Planned) -> str:
        budget = f"within {duration(event.budget_s)}"
        return f"{event.device.name}: {count(len(event.searches), 'search')}, about {duration(event.estimate_s)} ({budget})"

    def _finished_line(self, device: _Device, event: Finished) -> str:
        where = f"[{event.index + 1}/{len(device.planned.searches)}] " if device.planned is not None else ""
        whose = f"{device.name}: " if len(self.devices) > 1 else ""
        return f"{whose}{where}{finished_words(event)}"

    @staticmethod
    def _said(device: _Device, left_s: float) -> None:
        device.left_s, device.said_at = left_s, time.monotonic()

    def _say(self, text: str) -> None:
        if self.quiet:
            return
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            note(text)

    # -- the live part ------------------------------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*(part for device in self.devices for part in self._lines(device)))

    def _lines(self, device: _Device) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        elapsed = now - self._begun
        if device.planned is None:
            yield Text(f"{device.name}: starting, {duration(elapsed)}", style="dim")
            return
        total = len(device.planned.searches)
        left = max(device.left_s - (now - device.said_at), 0.0)
        whole = Table.grid(padding=(0, 1))
        within = self._share(device.step)
        whole.add_row(
            Text(device.name, style="bold"),
            ProgressBar(total=max(total, 1), completed=device.finished + within, width=24),
            Text(f"{device.finished}/{total}"),
            Text(f"{duration(elapsed)}, about {duration(left)} left" if device.finished < total else duration(elapsed)),
        )
        yield whole
        if device.step is not None:
            yield Text("  ") + self._step_text(device.step)

    @staticmethod
    def _share(step: Step | None) -> float:
        """How much of the current search is done."""
        if step is None:
            return 0.0
        begin, end = {"preparing": (0.0, 0.0), "screening": (0.0, 0.6), "halving": (0.6, 0.75), "final": (0.75, 1.0)}[
            step.progress.stage
        ]
        return begin + (end - begin) * step.progress.done / max(step.progress.total, 1)

    @staticmethod
    def _step_text(step: Step) -> Any:
        from rich.text import Text

        p = step.progress
        text = Text(f"{step.label}: {_STAGES[p.stage]}")
        if p.stage != "preparing":
            text.append(f" {p.done}/{p.total}", style="dim")
        if p.best_ms is not None and p.default_ms is not None:
            gain = p.default_ms / p.best_ms
            style = "green" if gain > 1.02 else ""
            text.append(f", best so far {milliseconds(p.best_ms)} ms ({gain:.2f}x the default)", style=style)
        return text


@contextmanager
def display(names: list[str], quiet: bool) -> Iterator[Display]:
    """A display that is live where standard error is a terminal."""
    shown = Display(names, quiet)
    screen = console(stderr=True)
    if quiet or not screen.is_terminal:
        yield shown
        return
    from rich.live import Live

    with Live(shown, console=screen, refresh_per_second=4, transient=True) as shown.live:
        yield shown
    shown.live = None


def finished_words(event: Finished) -> str:
    """One line about a search that is over."""
    if event.postponed:
        return f"{event.label}: no time left, the next run makes it"
    if event.outcome is None:
        return f"{event.label}: not tuned, {event.problem}"
    outcome = event.outcome
    gain = f"{outcome.best.gain:.2f}x the default's speed{interval_words(outcome.gain_interval)}"
    words = {"tuned": gain, "default": "the default is the best", "kept": "already tuned"}[outcome.verdict]
    left = f", {outcome.left} of {outcome.candidates} candidates left for the next run" if outcome.left else ""
    return f"{event.label}: {milliseconds(outcome.best.median_ms)} ms, {words}{left}"


def interval_words(interval: tuple[float, float] | None) -> str:
    """`` (1.29 to 1.33)``; nothing where rounding hides the difference or nothing is known."""
    if interval is None:
        return ""
    low, high = (f"{value:.2f}" for value in interval)
    return f" ({low} to {high})" if low != high else ""


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}es"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
