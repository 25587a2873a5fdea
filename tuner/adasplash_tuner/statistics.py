"""What samples of running times say: medians, robust spreads, and whether one config is faster than another beyond doubt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_GAIN = 0.02
"""A config replaces the default only if it is faster by more than this share, and by more than the noise."""

MIN_ROUNDS = 3
"""No verdict from fewer."""

_MAD_TO_SIGMA = 1.4826
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, for normal samples


@dataclass
class Samples:
    """Running times in ms of one config: ``rounds[i][j]`` of round i on input j."""

    rounds: list[list[float]] = field(default_factory=list)

    def add(self, times: Sequence[float]) -> None:
        self.rounds.append(list(times))

    def __len__(self) -> int:
        return len(self.rounds)

    @property
    def median_ms(self) -> float:
        """Median over the rounds, averaged over the inputs."""
        return statistics.fmean(map(statistics.median, zip(*self.rounds, strict=True)))

    @property
    def spread_ms(self) -> float:
        """Robust standard deviation of one round."""
        return statistics.fmean(map(robust_sigma, zip(*self.rounds, strict=True)))


def robust_sigma(values: Sequence[float]) -> float:
    """1.4826 times the median absolute deviation: the standard deviation, unmoved by outliers."""
    middle = statistics.median(values)
    return _MAD_TO_SIGMA * statistics.median(abs(v - middle) for v in values)


def compare(candidate: Samples, default: Samples) -> tuple[float, float]:
    """How a candidate's time relates to the default's, measured in the same rounds.

    Returns (ratio, noise): the geometric mean over inputs of the median ratio in a round, and the standard error of its logarithm.
    Pairing by round cancels what slows the whole machine; the geometric mean weighs a short input as much as a long one.
    """
    assert len(candidate) == len(default)
    logs = [
        [math.log(c / d) for c, d in zip(c_round, d_round, strict=True)]
        for c_round, d_round in zip(candidate.rounds, default.rounds, strict=True)
    ]
    by_input = list(zip(*logs, strict=True))
    ratio = math.exp(statistics.fmean(map(statistics.median, by_input)))
    errors = [_MEDIAN_ERROR * robust_sigma(values) / math.sqrt(len(values)) for values in by_input]
    return ratio, math.hypot(*errors) / len(errors)


def is_faster(candidate: Samples, default: Samples) -> bool:
    """Faster by more than ``MIN_GAIN`` and by more than two standard errors; the default wins ties.

    With few rounds the standard error is itself uncertain, so more of it is asked for: six times it with three rounds.
    """
    if len(default) < MIN_ROUNDS:
        return False
    ratio, noise = compare(candidate, default)
    return ratio < 1 - MIN_GAIN and math.log(ratio) < -_doubt(len(default)) * noise


def is_no_faster(candidate: Samples, default: Samples) -> bool:
    """Certain not to be faster by more than ``MIN_GAIN``, as far as more rounds could show."""
    if len(default) < MIN_ROUNDS:
        return False
    ratio, noise = compare(candidate, default)
    return math.log(ratio) - math.log(1 - MIN_GAIN) > _doubt(len(default)) * noise


def _doubt(rounds: int) -> float:
    """How many standard errors are asked for."""
    return 2 * (1 + 2 / (rounds - 2))
