"""What samples of running times say: medians, robust spreads, and whether one config is faster than another beyond doubt.

Inputs count alike whatever their length: averages over inputs are geometric, so that a gain is the geometric mean of the gains.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_GAIN = 0.02
"""A config replaces the default only if it is faster by more than this share, and by more than the noise."""

MOST_LOSS = 0.01
"""On no input may it be slower by more than this share, or by more than the noise where that is larger."""

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
    def medians_ms(self) -> list[float]:
        """Median over the rounds, of each input."""
        return list(map(statistics.median, zip(*self.rounds, strict=True)))

    @property
    def median_ms(self) -> float:
        """Geometric mean over the inputs of the medians."""
        return statistics.geometric_mean(self.medians_ms)

    @property
    def spread_ms(self) -> float:
        """Robust standard deviation of one round: the mean over the inputs of the relative one, at the median."""
        relative = [robust_sigma(times) / statistics.median(times) for times in zip(*self.rounds, strict=True)]
        return self.median_ms * statistics.fmean(relative)


class Comparison(NamedTuple):
    """A config's time against the default's, measured in the same rounds. ``noise``: standard error of the ratio's logarithm."""

    ratio: float
    noise: float
    by_input: tuple[tuple[float, float], ...]  # (ratio, noise) of each input
    rounds: int

    @property
    def doubt(self) -> float:
        """Standard errors that a verdict asks for. With few rounds the error itself is uncertain: six with three rounds, then fewer."""
        return 2 * (1 + 2 / (self.rounds - 2)) if self.rounds > 2 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """Between which ratios the true one lies as far as is known: ``doubt`` standard errors to both sides."""
        margin = self.doubt * self.noise if self.noise else 0.0
        return self.ratio * math.exp(-margin), self.ratio * math.exp(margin)


def robust_sigma(values: Sequence[float]) -> float:
    """1.4826 times the median absolute deviation: the standard deviation, unmoved by outliers."""
    middle = statistics.median(values)
    return _MAD_TO_SIGMA * statistics.median(abs(v - middle) for v in values)


def compare(candidate: Samples, default: Samples) -> Comparison:
    """How a candidate's time relates to the default's: the geometric mean over inputs of the median ratio in a round.

    Pairing by round cancels what slows the whole machine; the geometric mean weighs a short input as much as a long one.
    """
    assert len(candidate) == len(default)
    logs = [
        [math.log(c / d) for c, d in zip(c_round, d_round, strict=True)]
        for c_round, d_round in zip(candidate.rounds, default.rounds, strict=True)
    ]
    by_input = []
    for values in zip(*logs, strict=True):
        error = _MEDIAN_ERROR * robust_sigma(values) / math.sqrt(len(values))
        by_input.append((math.exp(statistics.median(values)), error))
    ratio = statistics.geometric_mean(ratio for ratio, _ in by_input)
    noise = math.hypot(*(error for _, error in by_input)) / len(by_input)
    return Comparison(ratio, noise, tuple(by_input), len(default))


def is_faster(candidate: Samples, default: Samples) -> bool:
    """Faster over all inputs by more than ``MIN_GAIN`` and by more than the noise, and slower on none; the default wins ties."""
    if len(default) < MIN_ROUNDS:
        return False
    found = compare(candidate, default)
    if any(ratio > 1 + max(MOST_LOSS, noise) for ratio, noise in found.by_input):
        return False
    return found.ratio < 1 - MIN_GAIN and math.log(found.ratio) < -found.doubt * found.noise


def is_no_faster(candidate: Samples, default: Samples) -> bool:
    """Certain not to be faster by more than ``MIN_GAIN``, or to be slower on some input, as far as more rounds could show."""
    if len(default) < MIN_ROUNDS:
        return False
    found = compare(candidate, default)
    if any(
        math.log(ratio / (1 + MOST_LOSS)) > found.doubt * noise and ratio > 1 + MOST_LOSS for ratio, noise in found.by_input
    ):
        return True
    return math.log(found.ratio / (1 - MIN_GAIN)) > found.doubt * found.noise
