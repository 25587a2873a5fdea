"""Tuning several devices side by side: one process each, so that the crash of one leaves the others' work alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, cast

from adasplash_tuner.session import Event, Report, Request, tune

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from adasplash_core.device import DeviceInfo

_GRACE_S = 2.0  # for a process that has sent its last word, or was interrupted


@dataclass
class WorkerResult:
    """What became of one device: a report, or why there is none. What it measured before it failed is in the database."""

    request: Request
    report: Report | None = None
    problem: str = ""


def split(request: Request, devices: Sequence[DeviceInfo]) -> list[Request]:
    """One request a device. Devices of the same model share their problems: what one measured holds for all."""
    groups: dict[tuple[object, ...], list[DeviceInfo]] = {}
    for device in devices:
        groups.setdefault((device.type, device.name, device.capability, device.multiprocessors), []).append(device)
    return [
        replace(request, device=f"{device.type}:{device.index}", part=(number, len(group)))
        for group in groups.values()
        for number, device in enumerate(group)
    ]


def tune_side_by_side(requests: Sequence[Request], observe: Callable[[int, Event], None]) -> list[WorkerResult]:
    """Run every request in a process of its own and wait for all. ``observe`` gets (number of the request, event).

    On KeyboardInterrupt all processes are ended; what they measured is kept.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    results = [WorkerResult(request) for request in requests]
    workers: list[BaseProcess] = []
    # A pipe each: a process that dies while it writes to a shared queue would leave the queue's lock held for ever.
    numbers: dict[Connection, int] = {}
    try:
        for number, request in enumerate(requests):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(request, sender), daemon=True)
            worker.start()
            sender.close()  # so that the end of the process is the end of the pipe
            workers.append(worker)
            numbers[receiver] = number
        while numbers:
            for ready in cast("list[Connection]", wait(list(numbers))):
                _receive(ready, numbers, results, observe)
    finally:
        _end(workers)
    for result, ended in zip(results, workers, strict=True):
        if result.report is None and not result.problem:
            result.problem = f"its process ended with exit code {ended.exitcode}"
    return results


def _receive(
    receiver: Connection, numbers: dict[Connection, int], results: list[WorkerResult], observe: Callable[[int, Event], None]
) -> None:
    number = numbers[receiver]
    try:
        message = receiver.recv()
    except (EOFError, OSError):  # the process has ended
        receiver.close()
        del numbers[receiver]
        return
    if isinstance(message, Report):
        results[number].report = message
    elif isinstance(message, str):
        results[number].problem = message
    else:
        observe(number, message)


def _end(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.join(_GRACE_S)
        if worker.is_alive():
            worker.terminate()
            worker.join(_GRACE_S)


def _work(request: Request, sender: Connection) -> None:
    try:
        sender.send(tune(request, sender.send))
    except KeyboardInterrupt:
        sender.send("interrupted")
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
