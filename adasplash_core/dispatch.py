"""Choosing a backend and its configs for one call, and explaining the choice. Pure: no tensor, no launch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adasplash_core import plugins
from adasplash_core.backend import AttentionBackend
from adasplash_core.configs import ConfigLadder, FoundConfig, ladder, warn_once
from adasplash_core.device import DeviceInfo, device_info
from adasplash_core.errors import BackendUnsupportedError, NoCapableBackendError
from adasplash_core.plugins import Registry
from adasplash_core.spec import PASSES, AttentionSpec, Pass


@dataclass(frozen=True)
class Choice:
    """The backend that takes a call, why it, and why not each of the others."""

    backend: AttentionBackend
    why: str
    against: dict[str, tuple[str, ...]] = field(default_factory=dict)


def choose(
    spec: AttentionSpec, device: DeviceInfo, backend: str = "auto", *, registry: Registry, configs: ConfigLadder
) -> Choice:
    """The backend for this call.

    An explicit name is taken or refused, never replaced. ``auto`` takes, among the capable, the one measured fastest for this
    bucket or one nearby on this GPU, else the highest priority.

    Raises
    ------
    UnknownBackendError: no backend has that name.
    BackendUnsupportedError: the named backend cannot do this call.
    NoCapableBackendError: none can; lists every backend with its reasons, broken plugins included.
    """
    if backend != "auto":
        chosen = registry.backend(backend)
        if reasons := _reasons(chosen, spec, device):
            raise BackendUnsupportedError(backend, reasons)
        return Choice(chosen, "named explicitly")
    against = {name: tuple(_reasons(b, spec, device)) for name, b in registry.backends.items()}
    capable = [b for name, b in registry.backends.items() if not against[name]]
    against = {name: reasons for name, reasons in against.items() if reasons}
    if not capable:
        broken = {origin: (why,) for origin, why in registry.problems.items()}
        raise NoCapableBackendError({**against, **broken})
    if len(capable) > 1 and (fastest := configs.fastest(capable, spec, device)) is not None:
        chosen = next(b for b in capable if b.name == fastest.name)
        return Choice(chosen, fastest.why, against)
    chosen = max(capable, key=lambda b: (b.priority, b.name))
    why = (
        "the only capable backend"
        if len(capable) == 1
        else f"highest priority ({chosen.priority}) of {len(capable)} capable backends"
    )
    if chosen.priority <= 0 and spec.device_type == "cuda":
        reasons_text = "".join(f"\n  {name}: {'; '.join(why)}" for name, why in against.items())
        broken_text = "".join(f"\n  {origin}: {why}" for origin, why in registry.problems.items())
        warn_once(
            f"adasplash_core: this call on {device.name} runs on the slow reference backend {chosen.name!r}, because no accelerated "
            f"one can take it:{reasons_text or ' none is registered.'}{broken_text}"
        )
    return Choice(chosen, why, against)


def _reasons(backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo) -> list[str]:
    try:
        return backend.not_supported_reasons(spec, device)
    except Exception as error:  # a plugin's bug disables that plugin only
        return [f"its support check failed: {error!r}"]


@dataclass(frozen=True)
class Explanation:
    """What would happen to a call, and why: ``str()`` is for people, :meth:`as_dict` for programs."""

    spec: AttentionSpec
    device: DeviceInfo
    choice: Choice
    configs: dict[Pass, FoundConfig]

    def as_dict(self) -> dict[str, Any]:
        return {
            "backend": self.choice.backend.name,
            "why": self.choice.why,
            "against": {name: list(reasons) for name, reasons in self.choice.against.items()},
            "device": self.device.as_dict(),
            "spec": self.spec.as_dict(),
            "passes": {
                pass_: {
                    "config": found.config.to_dict(),
                    "source": found.rung.name.lower(),
                    "source_words": found.rung.words,
                    "detail": found.detail,
                    "median_ms": found.median_ms,
                }
                for pass_, found in self.configs.items()
            },
        }

    def __str__(self) -> str:
        lines = [f"backend: {self.choice.backend.name} ({self.choice.why}) on {self.device.name}"]
        if self.spec.tf32:
            lines.append("products: may be rounded to TF32, as PyTorch's setting allows")
        for pass_, found in self.configs.items():
            values = ", ".join(f"{name}={value}" for name, value in found.config.to_dict().items())
            speed = f", {found.median_ms:.3g} ms when measured" if found.median_ms is not None else ""
            lines.append(
                f"{pass_}: {values or 'nothing to tune'}\n  from {found.rung.words}{speed}{': ' + found.detail if found.detail else ''}"
            )
        for name, reasons in self.choice.against.items():
            lines.append(f"not {name}: {'; '.join(reasons)}")
        return "\n".join(lines)


def explain_spec(spec: AttentionSpec, device: DeviceInfo | str | None = None, backend: str = "auto") -> Explanation:
    """Which backend would take a call with this spec, and with which configs from where. Raises as :func:`choose`."""
    if not isinstance(device, DeviceInfo):
        device = device_info(device or spec.device_type)
    configs = ladder()
    choice = choose(spec, device, backend, registry=plugins.registry(), configs=configs)
    passes = PASSES if spec.needs_grad else PASSES[:1]
    return Explanation(spec, device, choice, {p: configs.find(choice.backend, spec, device, p) for p in passes})
