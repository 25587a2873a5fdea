"""What is asked of a tuning run, what it tells while it goes, and what it leaves: plain values that cross processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adasplash_core.spec import PASSES, Pass

if TYPE_CHECKING:
    from adasplash_core.device import DeviceInfo
    from adasplash_tuner.key import TuningKey
    from adasplash_tuner.search.search import Outcome, Progress
    from adasplash_tuner.shapes.shape import Shape
    from adasplash_tuner.storage.records import ConfigValues


@dataclass(frozen=True)
class Request:
    """What to tune on one device. Empty ``shapes`` and no ``workload`` mean the profile's shapes."""

    device: str = "cpu"
    backends: tuple[str, ...] = ()  # empty: every capable one
    shapes: tuple[Shape, ...] = ()
    workload: str | None = None
    passes: tuple[Pass, ...] = PASSES
    profile: str = "quick"
    budget_s: float | None = None  # None: the profile's
    fresh: bool = False
    cold_l2: bool = True  # overwrite the GPU's L2 cache before each run
    database: str | None = None  # None: ADASPLASH_DB, or the default place
    part: tuple[int, int] = (0, 1)  # this device's share: which of how many
    visible: str | None = None  # what CUDA_VISIBLE_DEVICES becomes in the device's process: a MIG slice is seen alone
    started: float | None = None  # time.monotonic() from which the budget counts; None: when tuning begins
    given_up: tuple[str, ...] = ()  # labels of searches whose default config ended a process
    width: int = 1  # devices tuned side by side on this machine, which share its cores


@dataclass(frozen=True)
class Planned:
    """The first event: how many searches there will be, and about how long they take."""

    device: DeviceInfo
    searches: tuple[str, ...]
    estimate_s: float
    budget_s: float
    passed_over: tuple[str, ...] = ()  # problems that no backend can do, with the reasons


@dataclass(frozen=True)
class Step:
    """One search began, or went on. ``left_s``: about how long the whole run still takes."""

    index: int
    label: str
    progress: Progress
    left_s: float = 0.0


@dataclass(frozen=True)
class Trying:
    """A config is about to run for the first time. If the process ends before its next event, this config is why."""

    index: int
    label: str
    key: TuningKey
    shape: str
    inputs: str
    config: ConfigValues
    is_default: bool


@dataclass(frozen=True)
class Finished:
    """One search ended, could not be made (``problem``), or was left to the next run (``postponed``)."""

    index: int
    label: str
    outcome: Outcome | None
    problem: str = ""
    postponed: bool = False
    left_s: float = 0.0


Event = Planned | Step | Trying | Finished
Observer = Callable[[Event], None]


@dataclass
class Report:
    """What a run leaves."""

    device: DeviceInfo
    database: str
    finished: list[Finished] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()
    store_problem: str = ""  # why results could not be kept
    device_lost: bool = False  # a config took the device from this process: a new one can go on
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.store_problem and all(f.outcome is not None or f.postponed for f in self.finished)

    @property
    def postponed(self) -> list[str]:
        """Labels of searches for which there was no time."""
        return [f.label for f in self.finished if f.postponed]
