"""Alpha: where a module keeps its alpha. A number, a value that a schedule moves, or one parameter a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from adasplash_core.errors import ArgumentError, ArgumentTypeError


class Alpha(nn.Module):
    """One module's alpha, in the form that costs least for what is asked of it. Calling it gives what ``attention(alpha=...)`` takes.

    - A fixed number stays a Python number: kernels for 1, 1.5 and 2 are chosen on the host.
    - After :meth:`follow_schedule`, or with one value a head, it is a float32 tensor on the device: new values compile nothing. Where
      the schedule has come to its end, eager calls get a number again, whose kernels are faster; compiled code keeps the tensor.
    - With ``learnable``, alpha = 1 + sigmoid(theta), one parameter a head (Correia et al. 2019, arXiv 1909.00015).

    Parameters
    ----------
    value: number in [1, 2], or one a head; for a learnable alpha where it starts, inside (1, 2).
    heads: how many heads share it; needed if ``learnable``.
    learnable: make it a parameter ``theta`` (heads,).
    persistent: keep a fixed value in the state dict, as ``value``. A learnable alpha always is there, as ``theta``.
    device: where the tensor lives. It is float32 and stays so when a model is cast.

    Raises
    ------
    ArgumentError, ArgumentTypeError: values that are no alpha, or not one a head.
    """

    value: torch.Tensor
    theta: nn.Parameter

    def __init__(
        self,
        value: float | Sequence[float] = 1.5,
        *,
        heads: int | None = None,
        learnable: bool = False,
        persistent: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        numbers = _checked(value, heads, inside=learnable)
        self.learnable = learnable
        self.follows_schedule = self._at_rest = False
        if learnable:
            if heads is None:
                raise ArgumentError("A learnable alpha must know how many heads it has.", seen="heads=None")
            numbers = numbers * heads if len(numbers) == 1 else numbers
            self._numbers = numbers
            self.theta = nn.Parameter(torch.empty(heads, dtype=torch.float32, device=device))
            self.reset_parameters()
        else:
            self._numbers = numbers
            self._per_head = not isinstance(value, (int, float))
            self.register_buffer("value", self._tensor(device), persistent=persistent)

    def reset_parameters(self) -> None:
        """Put a learnable alpha back to where it started."""
        if self.learnable:
            with torch.no_grad():
                self.theta.copy_(torch.tensor([math.log((a - 1) / (2 - a)) for a in self._numbers]))

    def forward(self) -> float | torch.Tensor:
        """A number, or float32 () or (heads,)."""
        if self.learnable:
            return 1 + torch.sigmoid(self.theta.float())
        if self._per_head:
            return self.value
        # Compiled code must not look whether the value rests, or it would be compiled again when it does.
        if self.follows_schedule and (torch.compiler.is_compiling() or not self._at_rest):
            return self.value
        return self._numbers[0]

    def follow_schedule(self) -> None:
        """From now on the value is read on the device, so that :meth:`set_` reaches compiled code.

        Raises
        ------
        ArgumentError: if it is learnable: the optimizer moves it already.
        """
        if self.learnable:
            raise ArgumentError("A schedule can only move an alpha that is not learnable.", seen="a learnable one")
        self.follows_schedule = True

    def leave_schedule(self) -> None:
        """The value is a number again, where it is one for all heads. Compiled code is compiled once more."""
        self.follows_schedule = False

    @torch.no_grad()
    def set_(self, value: float, *, at_rest: bool = False) -> None:
        """Replace the value, of all heads, in place. ``at_rest``: no further one is expected soon."""
        if self.learnable:
            raise ArgumentError("A learnable alpha is set by its optimizer.", seen=f"set_({value})", hint="load a state dict")
        self._at_rest = at_rest
        (number,) = _checked(value, None, inside=False)
        if self._numbers != (numbers := [number] * len(self._numbers)):
            self._numbers = numbers
            self.value.fill_(number)

    def current(self) -> torch.Tensor:
        """The values now, float32 () or (heads,), detached. Where it is sharded (FSDP2), gathered: all ranks must call it."""
        if not self.learnable:
            return self.value.detach()
        theta = self.theta.detach()
        whole = theta.full_tensor() if hasattr(theta, "full_tensor") else theta
        return 1 + torch.sigmoid(whole.float())

    def extra_repr(self) -> str:
        if self.learnable:
            return f"learnable, heads={len(self._numbers)}"
        number = ", ".join(f"{a:g}" for a in self._numbers)
        return f"{number}, by schedule" if self.follows_schedule else number

    def _tensor(self, device: torch.device | str | None) -> torch.Tensor:
        numbers = self._numbers if self._per_head else self._numbers[0]
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Alpha:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.learnable and self.value.device.type != "meta":
            self.value = self._tensor(self.value.device)  # neither a cast to bfloat16 nor to_empty() may change it
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.learnable and self.value.device.type != "meta":
            loaded = self.value.double().reshape(-1).tolist()
            # A number that float32 cannot hold, like 1.3, must not come back as 1.2999999523.
            if any(abs(a - b) > 1e-6 for a, b in zip(loaded, self._numbers, strict=True)):
                self._numbers = loaded


def _checked(value: object, heads: int | None, *, inside: bool) -> list[float]:
    """The numbers of ``value``, one or one a head."""
    several = not isinstance(value, (int, float)) or isinstance(value, bool)
    if several and (isinstance(value, (str, bytes, bool, torch.Tensor)) or not isinstance(value, Sequence)):
        raise ArgumentTypeError("alpha must be a number, or a sequence of one number a head.", seen=repr(value))
    numbers = [float(a) for a in value] if several else [float(value)]  # type: ignore[arg-type,attr-defined]
    if several and (not numbers or (heads is not None and len(numbers) != heads)):
        raise ArgumentError(f"A sequence of alphas must have one a head, {heads}.", seen=f"{len(numbers)}")
    for a in numbers:
        if inside and not 1 < a < 2:
            raise ArgumentError(
                "A learnable alpha must start between 1 and 2: 1 + sigmoid never reaches either.",
                seen=f"alpha={a}",
                hint="1.5 is the middle of its range",
            )
        if not 1 <= a <= 2:
            raise ArgumentError("alpha must be at least 1 (softmax) and at most 2 (sparsemax).", seen=f"alpha={a}")
    return numbers
