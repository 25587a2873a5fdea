"""Plan: everything static about a call, as one string that crosses the torch.library boundary.

An op's schema has no place for a spec, and twenty more arguments would cost more than the rest of the dispatch. So the backend's
name, the spec without sizes and an explicit config travel as canonical JSON: readable in an exported graph, decoded once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from adasplash_core import plugins
from adasplash_core.backend import AttentionBackend, KernelConfig
from adasplash_core.call import spec_from_fields
from adasplash_core.configs import ladder, parse_explicit
from adasplash_core.device import device_info
from adasplash_core.dispatch import choose
from adasplash_core.spec import PASSES, AttentionSpec


@dataclass(frozen=True)
class Plan:
    """A decoded plan. ``spec`` has no sizes; ``config`` maps passes to explicit configs."""

    backend: str
    spec: AttentionSpec
    config: dict[str, dict[str, Any]]

    def encode(self) -> str:
        defaults = {f.name: f.default for f in fields(AttentionSpec)}
        spec = {name: value for name, value in self.spec.as_dict().items() if value != defaults[name]}
        return json.dumps({"backend": self.backend, "spec": spec, "config": self.config}, sort_keys=True)

    def explicit(self, backend: AttentionBackend, pass_: str) -> KernelConfig | None:
        values = self.config.get(pass_)
        return None if values is None else backend.config_class(pass_).from_mapping(values)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def decode(text: str) -> Plan:
    """The plan of :meth:`Plan.encode`."""
    content = json.loads(text)
    return Plan(content["backend"], AttentionSpec(**content["spec"]), content["config"])


_plans: dict[tuple[Any, ...], str] = {}


def plan_for(
    static_fields: tuple[Any, ...], sizes: tuple[int | None, int | None, int | None], device: torch.device, backend: str
) -> str:
    """The plan of a call without an explicit config. After the first time one dictionary access."""
    configs = ladder()
    key = (static_fields, sizes, device, backend, configs.generation)
    if (text := _plans.get(key)) is None:
        if len(_plans) >= 8192:  # a decode loop sees a new length each step
            _plans.clear()
        text = _plans[key] = _make(static_fields, sizes, device, backend, {})
    return text


def plan_with_config(
    static_fields: tuple[Any, ...],
    sizes: tuple[int | None, int | None, int | None],
    device: torch.device,
    backend: str,
    config: Mapping[str, Any],
) -> str:
    """The plan of a call with an explicit config, ``{"forward": ..., "backward": ...}``.

    Raises
    ------
    ConfigError: for keys that are no pass, or configs that the chosen backend does not take.
    """
    return _make(static_fields, sizes, device, backend, config)


def _make(
    static_fields: tuple[Any, ...],
    sizes: tuple[int | None, int | None, int | None],
    device: torch.device,
    backend: str,
    config: Mapping[str, Any],
) -> str:
    spec = spec_from_fields(static_fields, sizes)
    chosen = choose(spec, device_info(device), backend, registry=plugins.registry(), configs=ladder()).backend
    parsed = {pass_: parse_explicit(chosen, config, pass_) for pass_ in PASSES}
    explicit: dict[str, dict[str, Any]] = {pass_: value.to_dict() for pass_, value in parsed.items() if value is not None}
    return Plan(chosen.name, spec.without_lengths(), explicit).encode()
