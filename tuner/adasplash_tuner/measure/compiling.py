"""Compiling candidates ahead of their first run: in parallel processes on the CPU, while this process measures on the device.

A compiler may crash, hang or run out of memory; its process is then replaced, and the candidate it was at is refused.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from adasplash_core.backend import AttentionBackend, CompileReport

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from adasplash_core.backend import KernelConfig
    from adasplash_core.device import DeviceInfo
    from adasplash_core.spec import AttentionSpec, Pass

TIMEOUT_S = 120.0
"""A config that takes longer to compile is refused."""

SPILL_SLACK = 64
"""Bytes a thread that a candidate's kernel may spill beyond what the same kernel spills with the default config."""

MOST_PROCESSES = 16


class Preparation(Protocol):
    """What the search asks of whoever makes configs ready to run."""

    @property
    def width(self) -> int:
        """How many configs are worth handing over at a time."""
        ...

    def submit(self, config: KernelConfig) -> None: ...

    def next(self, timeout_s: float) -> tuple[KernelConfig, str] | None:
        """A submitted config that is ready, and why it must not be run ("" if it may); None if none is ready in time."""
        ...

    def close(self) -> None:
        """Nothing more of what was submitted is wanted."""
        ...


class Unprepared:
    """For backends that compile nothing ahead: every config is ready at once."""

    width = 1

    def __init__(self) -> None:
        self._waiting: list[KernelConfig] = []

    def submit(self, config: KernelConfig) -> None:
        self._waiting.append(config)

    def next(self, timeout_s: float) -> tuple[KernelConfig, str] | None:
        return (self._waiting.pop(0), "") if self._waiting else None

    def close(self) -> None:
        self._waiting.clear()


def compiles_ahead(backend: AttentionBackend) -> bool:
    return type(backend).precompile is not AttentionBackend.precompile


def processes_for(devices: int) -> int:
    """How many compiling processes each of several devices tuned side by side may have: one core is left to each device's process."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, min(MOST_PROCESSES, cores // max(devices, 1) - 1))


@dataclass(eq=False)
class Compiler:
    """Makes the candidates of one search ready. ``pool`` may serve many searches, one after the other.

    Candidates that spill registers are held back until it is known how much the default spills.
    """

    pool: CompilePool
    backend: AttentionBackend
    spec: AttentionSpec
    device: DeviceInfo
    pass_: Pass
    default: KernelConfig
    _done: queue.SimpleQueue[tuple[KernelConfig, CompileReport | None]] = field(default_factory=queue.SimpleQueue)
    _held: list[tuple[KernelConfig, CompileReport]] = field(default_factory=list)
    _default_report: CompileReport | None = None
    _default_known: bool = False

    def __post_init__(self) -> None:
        self.submit(self.default)

    @property
    def width(self) -> int:
        return 2 * self.pool.processes

    def submit(self, config: KernelConfig) -> None:
        job = (self.backend, self.spec, self.device, self.pass_, config)
        self.pool.submit(job, lambda report: self._done.put((config, report)))

    def next(self, timeout_s: float) -> tuple[KernelConfig, str] | None:
        while True:
            if self._held and self._default_known:
                config, report = self._held.pop(0)
                return config, refusal(report, self.device, self._default_report)
            try:
                config, found = self._done.get(timeout=max(timeout_s, 0.0))
            except queue.Empty:
                return None
            if config == self.default:
                self._default_report, self._default_known = found, True
                continue
            if found is None:
                return config, ""
            if not self._default_known and any(kernel.spilled > SPILL_SLACK for kernel in found.kernels):
                self._held.append((config, found))
                continue
            return config, refusal(found, self.device, self._default_report)

    def close(self) -> None:
        self.pool.forget_waiting()


def refusal(report: CompileReport, device: DeviceInfo, default: CompileReport | None) -> str:
    """Why a compiled config must not be run, or "". The default runs whatever it spills, so it sets how much others may."""
    if report.refusal:
        return report.refusal
    limits = {kernel.name: max(kernel.spilled, 0) for kernel in default.kernels} if default is not None else {}
    for kernel in report.kernels:
        if device.shared_memory and kernel.shared > device.shared_memory:
            return f"{kernel.name} needs {kernel.shared} bytes of shared memory, {device.name} has {device.shared_memory}"
        limit = limits.get(kernel.name, max(limits.values(), default=math.inf)) + SPILL_SLACK
        if kernel.spilled > limit:
            return f"{kernel.name} spills {kernel.spilled} bytes a thread (limit {limit})"
    return ""


Job = tuple[AttentionBackend, Any, Any, Any, Any]  # arguments of precompile, the backend first


class CompilePool:
    """Processes that compile, started when there is work. Use it as a context manager: leaving ends them."""

    def __init__(self, processes: int, timeout_s: float = TIMEOUT_S) -> None:
        self.processes, self.timeout_s = processes, timeout_s
        self._jobs: queue.SimpleQueue[tuple[Job, Callable[[CompileReport | None], None]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job, done: Callable[[CompileReport | None], None]) -> None:
        """Compile; ``done`` gets the report in another thread."""
        self._jobs.put((job, done))
        if len(self._threads) < self.processes:
            thread = threading.Thread(target=self._serve, daemon=True)
            self._threads.append(thread)
            thread.start()

    def forget_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()

    def close(self) -> None:
        self._closed = True
        self.forget_waiting()
        for _ in self._threads:
            self._jobs.put(None)
        with self._lock:
            for process in self._running:
                process.kill()

    def _serve(self) -> None:
        """One thread for each process: whatever happens to the process is this job's result."""
        worker: _Worker | None = None
        while (item := self._jobs.get()) is not None and not self._closed:
            job, done = item
            if worker is None:
                with self._lock:
                    if self._closed:
                        return
                    worker = _Worker()
                    self._running.add(worker.process)
            report, alive = worker.compile(job, self.timeout_s)
            if not alive:
                with self._lock:
                    self._running.discard(worker.process)
                worker = None
            done(report)
        if worker is not None:
            worker.connection.close()  # the process ends when nobody can ask it any more


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_compile_loop, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def compile(self, job: Job, timeout_s: float) -> tuple[CompileReport | None, bool]:
        """The report, and whether the process can be asked again."""
        try:
            self.connection.send_bytes(pickle.dumps(job))
        except (
            pickle.PicklingError,
            AttributeError,
            TypeError,
        ):  # a backend that cannot cross processes is compiled where it runs
            return None, True
        except OSError:
            return CompileReport(refusal=self._end()), False
        try:
            if not self.connection.poll(timeout_s):
                self.process.kill()
                self._end()
                return CompileReport(refusal=f"compiling took longer than {timeout_s:.0f} s"), False
            return self.connection.recv(), True
        except (EOFError, OSError):
            return CompileReport(refusal=self._end()), False

    def _end(self) -> str:
        self.process.join(5.0)
        self.connection.close()
        return f"the compiler's process ended with exit code {self.process.exitcode}"


def _compile_loop(connection: Connection) -> None:
    """A compiling process: sees no GPU, leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        os.environ[variable] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (
        0,
        1,
        2,
    ):  # what compilers print of a config that fails would tear the progress display; the reason is reported
        os.dup2(nowhere, stream)
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, OSError):
            return
        connection.send(_compile(job))


def _compile(job: bytes) -> CompileReport | None:
    try:
        backend, *arguments = pickle.loads(job)
        report: CompileReport | None = backend.precompile(*arguments)
    except Exception as error:  # what a config raises is what is known of it
        return CompileReport(refusal=f"does not compile: {type(error).__name__}: {error}"[:500])
    return report
