"""AlphaSchedule: from softmax to entmax over the first part of training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from adasplash_core.errors import ArgumentError
from adasplash_core.nn.alpha import Alpha

SHAPES = ("linear", "cosine")


class AlphaSchedule:
    """Moves every alpha of a model from ``start`` to ``end`` over ``steps`` optimizer steps, and leaves it there.

    With t = min(step / steps, 1), alpha = start + (end - start) * f(t), where f(t) = t ("linear") or (1 - cos(pi t)) / 2
    ("cosine"). The values live on the device: no step compiles anything, and none waits for the device. Build it before the model
    is compiled. Learnable alphas are left alone.

    Kernels for an alpha on the device serve any value and take longer than those for 1.5 or 2. Once the way is over, eager calls take
    the latter; code that torch.compile made keeps the former until :meth:`finish`.

    Parameters
    ----------
    model: a module with :class:`Alpha` modules in it (all modules of ``adasplash_core.nn`` have one), or these themselves.
    steps: how many optimizer steps the way takes; 0 means ``end`` at once.
    start, end: numbers in [1, 2].
    shape: "linear" or "cosine".

    Raises
    ------
    ArgumentError: for numbers out of range, an unknown shape, or a model without an alpha that can be moved.
    """

    def __init__(
        self, model: nn.Module | Iterable[Alpha], steps: int, *, start: float = 1.0, end: float = 1.5, shape: str = "linear"
    ) -> None:
        modules: Iterable[Any] = model.modules() if isinstance(model, nn.Module) else list(model)
        self.alphas = [m for m in modules if isinstance(m, Alpha) and not m.learnable]
        if not self.alphas:
            seen = type(model).__name__ if isinstance(model, nn.Module) else "no such modules"
            raise ArgumentError("A schedule needs a model with an alpha that is not learnable.", seen=seen)
        if steps < 0:
            raise ArgumentError("steps must not be negative.", seen=f"steps={steps}")
        if shape not in SHAPES:
            raise ArgumentError(f"shape must be one of {', '.join(map(repr, SHAPES))}.", seen=repr(shape))
        for name, a in (("start", start), ("end", end)):
            if not 1 <= a <= 2:
                raise ArgumentError(f"{name} must be at least 1 and at most 2.", seen=f"{name}={a}")
        self.steps, self.start, self.end, self.shape = steps, start, end, shape
        for alpha in self.alphas:
            alpha.follow_schedule()
        self.set_step(0)

    def alpha_at(self, step: int) -> float:
        """The value after ``step`` optimizer steps."""
        if step >= self.steps:
            return self.end
        t = max(step, 0) / self.steps
        return self.start + (self.end - self.start) * (t if self.shape == "linear" else (1 - math.cos(math.pi * t)) / 2)

    @property
    def alpha(self) -> float:
        """The value now."""
        return self.alpha_at(self.step_count)

    def step(self) -> float:
        """Call it after ``optimizer.step()``. Returns the new value."""
        return self.set_step(self.step_count + 1)

    def set_step(self, step: int) -> float:
        """Go to where ``step`` optimizer steps lead. Returns the value there."""
        self.step_count = step
        value = self.alpha
        for alpha in self.alphas:
            alpha.set_(value, at_rest=step >= self.steps)
        return value

    def finish(self) -> float:
        """Go to the end, where each alpha is a number from now on: compiled code is compiled once more, with the kernels made for that
        number. Returns it."""
        value = self.set_step(max(self.steps, self.step_count))
        for alpha in self.alphas:
            alpha.leave_schedule()
        return value

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and which way it goes."""
        return {"step": self.step_count, "steps": self.steps, "start": self.start, "end": self.end, "shape": self.shape}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule stood; its way is taken over, too."""
        self.steps, self.start, self.end, self.shape = state["steps"], state["start"], state["end"], state["shape"]
        self.set_step(state["step"])
