"""Tuning devices side by side, one process each: the crash of one leaves the others' work alone, and its own goes on in a new process.

A config that ends a process (a segmentation fault in a driver, an illegal access after which the device is lost to the process) is
recorded as failed, so that it is not tried again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, cast

from adasplash_tuner.search.events import Event, Finished, Planned, Report, Request, Step, Trying
from adasplash_tuner.search.targets import Target, groups

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

MAX_RESTARTS = 3
"""Processes that one device may lose before it is given up."""

_GRACE_S = 5.0  # for a process that has sent its last word, or was interrupted


@dataclass
class WorkerResult:
    """What became of one device: a report, or why there is none. What it measured before it failed is in the database."""

    request: Request
    report: Report | None = None
    problem: str = ""
    crashes: list[str] = field(default_factory=list)  # what ended earlier processes of this device


def split(request: Request, found: Sequence[Target]) -> list[Request]:
    """One request a device. Devices of the same model share their problems: what one measured holds for all."""
    return [
        replace(request, device=target.device, visible=target.visible, part=(number, len(group)), width=len(found))
        for group in groups(found)
        for number, target in enumerate(group)
    ]


def tune_side_by_side(requests: Sequence[Request], observe: Callable[[int, Event], None]) -> list[WorkerResult]:
    """Run every request in a process of its own and wait for all. ``observe`` gets (number of the request, event).

    On KeyboardInterrupt all processes are ended; what they measured is kept.
    """
    started = time.monotonic()
    workers = [_Worker(number, replace(r, started=r.started or started), observe) for number, r in enumerate(requests)]
    try:
        for worker in workers:
            worker.start()
        while running := [worker for worker in workers if worker.receiver is not None]:
            by_pipe = {cast("Connection", worker.receiver): worker for worker in running}
            for ready in cast("list[Connection]", wait(list(by_pipe))):
                by_pipe[ready].receive()
    finally:
        _end([worker.process for worker in workers if worker.process is not None])
    return [worker.result for worker in workers]


class _Worker:
    """One device's process, and the one after it if it ends before its time."""

    def __init__(self, number: int, request: Request, observe: Callable[[int, Event], None]) -> None:
        self.number, self.request, self.observe = number, request, observe
        self.result = WorkerResult(request)
        self.process: BaseProcess | None = None
        # A pipe each: a process that dies while it writes to a shared queue would leave the queue's lock held for ever.
        self.receiver: Connection | None = None
        self._trying: Trying | None = None
        self._done: dict[str, Finished] = {}

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.receiver, sender = context.Pipe(duplex=False)
        # Not a daemon: those may not have children, and this one's compile.
        self.process = context.Process(target=_work, args=(self.request, sender))
        self.process.start()
        sender.close()  # so that the end of the process is the end of the pipe

    def receive(self) -> None:
        assert self.receiver is not None
        try:
            message = self.receiver.recv()
        except (EOFError, OSError):
            self._ended()
            return
        if isinstance(message, Report):
            self.result.report = message
        elif isinstance(message, str):
            self.result.problem = message
        else:
            if isinstance(message, Trying):
                self._trying = message
            elif _is_over(message):
                self._trying = None
            if isinstance(message, Finished):
                if message.outcome is None and not message.postponed and message.label in self.request.given_up:
                    message = replace(message, problem=self._done[message.label].problem)
                elif self._is_repeated(message):
                    return
                self._done[message.label] = message
            if not (isinstance(message, Planned) and self.result.crashes):
                self.observe(self.number, message)

    def _is_repeated(self, message: Finished) -> bool:
        """A new process finds made what its predecessor made."""
        before = self._done.get(message.label)
        kept = message.outcome is not None and message.outcome.verdict == "kept"
        return kept and before is not None and before.outcome is not None

    def _ended(self) -> None:
        """The process is gone: with a report, with a reason, or by a crash, after which a new one goes on."""
        assert self.receiver is not None
        assert self.process is not None
        self.receiver.close()
        self.receiver = None
        self.process.join(_GRACE_S)
        report = self.result.report
        if report is not None and report.device_lost:
            crash = "the device was lost to its process"
        elif report is None and not self.result.problem:
            crash = f"its process ended with exit code {self.process.exitcode}"
        else:
            if report is not None:
                report.finished = [self._first_told(f) for f in report.finished]
            return
        self.result.crashes.append(crash if self._trying is None else f"{crash} while it ran {self._trying.config}")
        if len(self.result.crashes) > MAX_RESTARTS or (self._trying is None and report is None):
            self.result.problem = crash
            return
        self.request = replace(self.request, fresh=False)  # what this run has measured is not measured again
        if self._trying is not None:
            self._blame(self._trying, crash)
        self._trying, self.result.report = None, None
        self.start()

    def _first_told(self, finished: Finished) -> Finished:
        """What was told of a search when it was made, rather than that it had been made before."""
        return self._done.get(finished.label, finished)

    def _blame(self, trying: Trying, crash: str) -> None:
        """Leave what ended a process out of the next one."""
        if trying.is_default:
            self._done[trying.label] = Finished(trying.index, trying.label, None, f"its default config: {crash}")
            self.request = replace(self.request, given_up=(*self.request.given_up, trying.label))
            return
        from adasplash_core.errors import StoreError
        from adasplash_tuner.storage.records import Measurement
        from adasplash_tuner.storage.store import TuningStore, now, package_version

        measured = Measurement(
            trying.config, trying.shape, trying.inputs, "screening", "failed", now(), package_version(), note=crash
        )
        try:
            TuningStore(self.request.database).add_measurement(trying.key, measured)
        except StoreError:  # it cannot be remembered, so the search is not made again
            self._done[trying.label] = Finished(trying.index, trying.label, None, f"{trying.config}: {crash}")
            self.request = replace(self.request, given_up=(*self.request.given_up, trying.label))


def _is_over(event: Event) -> bool:
    """Whether the config that was tried last is no longer what runs."""
    if isinstance(event, Finished):
        return event.outcome is not None
    return isinstance(event, Planned) or (isinstance(event, Step) and event.progress.stage == "preparing")


def _end(processes: Sequence[BaseProcess]) -> None:
    try:
        for process in processes:
            process.join(_GRACE_S)
            if process.is_alive():
                process.terminate()
                process.join(_GRACE_S)
    finally:  # an impatient second Ctrl-C leaves nothing behind either
        for process in processes:
            if process.is_alive():
                process.kill()


def _work(request: Request, sender: Connection) -> None:
    if request.visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = request.visible
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        try:
            from adasplash_tuner.search.session import tune

            sender.send(tune(request, sender.send))
        except KeyboardInterrupt:
            sender.send("interrupted")
        except BrokenPipeError:
            raise
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")
