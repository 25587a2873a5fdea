"""The ladder by which a kernel config is found, and the protocol of those who find it.

explicit argument > process memory > user database > same GPU, older code or toolchain > shipped > another number of heads > same
compute capability, other model > the backend's heuristic. The first look-up for a key asks the providers; later ones are one
dictionary access.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from adasplash_core.backend import AttentionBackend, KernelConfig
from adasplash_core.device import DeviceInfo
from adasplash_core.errors import AdasplashWarning, ConfigError, FrozenConfigsError
from adasplash_core.spec import PASSES, AttentionSpec, Pass


class Rung(IntEnum):
    """Where a config came from; a lower rung number wins."""

    EXPLICIT = 0
    USER_DATABASE = 1
    STALE = 2  # this GPU and bucket, measured with older code or another toolchain
    SHIPPED = 3
    NEARBY = 4  # this GPU and these lengths, another batch size or number of heads
    SAME_CAPABILITY = 5  # another model of the same compute capability
    HEURISTIC = 6

    @property
    def words(self) -> str:
        return {
            Rung.EXPLICIT: "explicit argument",
            Rung.USER_DATABASE: "user database",
            Rung.STALE: "user database, stale",
            Rung.SHIPPED: "shipped with the package",
            Rung.NEARBY: "another batch size or number of heads, measured on this device",
            Rung.SAME_CAPABILITY: "a similar device (same compute capability)",
            Rung.HEURISTIC: "the backend's heuristic, not measured",
        }[self]


@dataclass(frozen=True)
class FoundConfig:
    """A config and why it is this one."""

    config: KernelConfig
    rung: Rung
    detail: str = ""  # for a person: which key, when measured, or on a miss which field differs
    median_ms: float | None = None


@dataclass(frozen=True)
class FoundBackend:
    """The backend measured fastest, and by what."""

    name: str
    why: str = "measured fastest for this bucket on this device"


class ConfigProvider(Protocol):
    """Who knows tuned configs: the tuner registers one through ``adasplash_register_config_providers``.

    Every method may be called from any thread and must not raise for a broken or missing store (warn once and return None). The
    core remembers answers by spec, lengths included; a provider that buckets lengths should remember by bucket.
    """

    name: str

    def find(self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> FoundConfig | None:
        """The best config this provider knows. ``None``, or a HEURISTIC answer whose detail explains the miss."""
        ...

    def fastest(self, backends: Iterable[AttentionBackend], spec: AttentionSpec, device: DeviceInfo) -> FoundBackend | None:
        """The backend measured fastest for this bucket or nearby, forward and (if needed) backward together; None if not measured."""
        ...

    def reject(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig, why: str
    ) -> None:
        """The config turned out not to run: never return it again."""
        ...


class ConfigLadder:
    """Finds configs through the providers and remembers every answer for the life of the process."""

    def __init__(self, providers: Iterable[ConfigProvider] = ()) -> None:
        self.providers = list(providers)
        self._memory: dict[tuple[str, Pass, AttentionSpec, DeviceInfo], FoundConfig] = {}
        self._lock = threading.Lock()
        self.generation = 0
        """Grows whenever answers may have changed; whoever keeps answers compares it."""

    def find(self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> FoundConfig:
        """The config for this call: one dictionary access after the first time."""
        key = (backend.name, pass_, spec, device)
        if (found := self._memory.get(key)) is not None:
            return found
        with self._lock:
            if len(self._memory) >= 8192:  # a decode loop sees a new length each step
                self._memory.clear()
            found = self._memory[key] = self._ask(backend, spec, device, pass_)
        return found

    def _ask(self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass) -> FoundConfig:
        answers = []
        for provider in self.providers:
            try:
                answers.append(provider.find(backend, spec, device, pass_))
            except FrozenConfigsError:
                raise
            except Exception as error:  # a provider is a plugin: its bug must not stop a call
                warn_once(f"Config provider {provider.name!r} failed and is passed over: {error!r}")
        tuned = [a for a in answers if a is not None and a.rung < Rung.HEURISTIC]
        if tuned:
            return min(tuned, key=lambda a: a.rung)
        detail = "; ".join(a.detail for a in answers if a is not None and a.detail)
        return FoundConfig(backend.default_config(spec, device, pass_), Rung.HEURISTIC, detail or "nothing tuned is known")

    def fastest(self, backends: list[AttentionBackend], spec: AttentionSpec, device: DeviceInfo) -> FoundBackend | None:
        for provider in self.providers:
            try:
                found = provider.fastest(backends, spec, device)
            except FrozenConfigsError:
                raise
            except Exception as error:  # as above
                warn_once(f"Config provider {provider.name!r} failed and is passed over: {error!r}")
                continue
            if found is not None:
                return found
        return None

    def reject(
        self, backend: AttentionBackend, spec: AttentionSpec, device: DeviceInfo, pass_: Pass, config: KernelConfig, why: str
    ) -> FoundConfig:
        """Forget a config that does not run, tell the providers, and go on with the heuristic's."""
        warn_once(
            f"Backend {backend.name!r} cannot run the tuned {pass_} config {config} on {device.name} ({why}); its default is used."
        )
        for provider in self.providers:
            provider.reject(backend, spec, device, pass_, config, why)
        found = FoundConfig(
            backend.default_config(spec, device, pass_), Rung.HEURISTIC, f"the tuned config was rejected: {why}"
        )
        with self._lock:
            self._memory[(backend.name, pass_, spec, device)] = found
            self.generation += 1
        return found

    def clear(self) -> None:
        """Forget all answers, so that new tuning results are seen."""
        with self._lock:
            self._memory.clear()
            self.generation += 1


def parse_explicit(backend: AttentionBackend, config: Mapping[str, Any], pass_: Pass) -> KernelConfig | None:
    """The config of one pass from the ``config`` argument, ``{"forward": ..., "backward": ...}``, each a KernelConfig or a mapping.

    Raises
    ------
    ConfigError: for keys that are no pass, unknown fields, or another backend's config class.
    """
    for key in config:
        if key not in PASSES:
            raise ConfigError("config", f"has the key {key!r}, which is no pass", fields=PASSES)
    given = config.get(pass_)
    if given is None:
        return None
    cls = backend.config_class(pass_)
    if isinstance(given, cls):
        return given
    if isinstance(given, KernelConfig):
        raise ConfigError(
            cls.__name__, f"is what {backend.name!r} takes for {pass_}, got {type(given).__name__}", fields=cls().to_dict()
        )
    return cls.from_mapping(given)


_ladder: ConfigLadder | None = None
_ladder_lock = threading.Lock()


def ladder() -> ConfigLadder:
    """The process's ladder over the providers that plugins registered."""
    global _ladder
    if _ladder is None:
        with _ladder_lock:
            if _ladder is None:
                from adasplash_core import plugins

                _ladder = ConfigLadder(plugins.registry().providers)
    return _ladder


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn with this text, once a process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, AdasplashWarning, stacklevel=3)
