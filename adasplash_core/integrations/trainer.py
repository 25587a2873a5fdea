"""Alpha in a transformers ``Trainer``: a callback that anneals it, and tells how learnable ones stand."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from adasplash_core.configs import warn_once
from adasplash_core.errors import ArgumentError, MissingDependencyError
from adasplash_core.integrations.hf_alpha import NAME, note_alpha, set_alpha
from adasplash_core.nn.alpha import Alpha
from adasplash_core.nn.schedule import AlphaSchedule

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError("AlphaCallback", "transformers", str(error), extra="hf") from error

_NEAR_BOUND = 0.01


class AlphaCallback(TrainerCallback):  # type: ignore[misc]
    """Anneals every alpha of the trained model from ``start`` to ``end`` over the first part of training.

    For transformers models with ``attn_implementation="entmax"`` and for models with modules of ``adasplash_core.nn``.
    The value follows the Trainer's global step, so that a resumed run goes on where it stood. Logs ``entmax_alpha``, and for
    learnable alphas, which are left alone, ``entmax_alpha_min`` and ``entmax_alpha_max``, with one warning where one comes
    within 0.01 of 1 or 2: its gradient vanishes there.

    Parameters
    ----------
    fraction: which part of the training steps the way takes, in [0, 1].
    steps: the same as a number of steps, instead.
    start, end, shape: as in :class:`adasplash_core.nn.AlphaSchedule`.

    Raises
    ------
    ArgumentError: when training begins, if the model has no alpha at all.
    """

    def __init__(
        self,
        fraction: float = 0.25,
        *,
        steps: int | None = None,
        start: float = 1.0,
        end: float = 1.5,
        shape: str = "linear",
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ArgumentError("fraction must be at least 0 and at most 1.", seen=f"fraction={fraction}")
        self.fraction, self.steps, self.start, self.end, self.shape = fraction, steps, start, end, shape
        self.schedule: AlphaSchedule | None = None
        self.learnable: list[Alpha] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        alphas = [m for m in (model.modules() if model is not None else ()) if isinstance(m, Alpha)]
        if model is not None and not alphas and getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME:
            alphas = set_alpha(model, self.end)  # until now a number in the config, which compiled code would not see change
        if not alphas:
            raise ArgumentError(
                "The trained model must compute attention with an alpha.",
                seen=type(model).__name__,
                hint='choose attn_implementation="entmax" or modules of adasplash_core.nn before the Trainer is built',
            )
        self.learnable = [a for a in alphas if a.learnable]
        if len(self.learnable) < len(alphas):
            steps = math.ceil(self.fraction * state.max_steps) if self.steps is None else self.steps
            self.schedule = AlphaSchedule(alphas, steps, start=self.start, end=self.end, shape=self.shape)
            self.schedule.set_step(state.global_step)
            if model is not None:
                note_alpha(model, self.end)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is not None:
            self.schedule.set_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        seen: dict[str, float] = {}
        if self.schedule is not None:
            seen["entmax_alpha"] = self.schedule.alpha
        if self.learnable:
            values = [a for alpha in self.learnable for a in alpha.current().tolist()]
            seen |= {"entmax_alpha_min": min(values), "entmax_alpha_max": max(values)}
            if min(values) < 1 + _NEAR_BOUND or max(values) > 2 - _NEAR_BOUND:
                warn_once(
                    f"A learnable alpha has come within {_NEAR_BOUND} of its bounds 1 and 2, where its gradient vanishes: they lie "
                    f"between {min(values):.3f} and {max(values):.3f}. A smaller learning rate for `theta` keeps them inside."
                )
        if logs is not None:
            logs.update(seen)
        if state.log_history:  # the Trainer has copied the logs there already
            state.log_history[-1].update(seen)
