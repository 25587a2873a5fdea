"""The tolerant loader: finds plugins, and turns whatever is wrong with one into a reason that is shown, never into a crash.

pluggy's own entry-point loader stops at the first plugin that fails to import and skips a duplicate name silently, so each entry
point is loaded, registered and called by itself here. Imports no torch.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from adasplash_core import hookspecs
from adasplash_core.backend import BACKEND_API_VERSION, AttentionBackend
from adasplash_core.errors import UnknownBackendError

if TYPE_CHECKING:
    import click

    from adasplash_core.configs import ConfigProvider

ALLOW_LIST_VARIABLE = "ADASPLASH_PLUGINS"
"""Comma-separated names of the entry points to load; unset loads all, empty loads none."""


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from."""

    plugin: str  # entry point name
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class BackendRecord:
    """A backend that was offered: usable if ``problem`` is empty."""

    name: str
    origin: Origin
    backend: AttentionBackend | None
    problem: str = ""

    def unavailable_reasons(self) -> list[str]:
        if self.backend is None:
            return [self.problem]
        try:
            return self.backend.unavailable_reasons()
        except Exception as error:  # a stranger's code
            return [f"its availability check failed: {error!r}"]


@dataclass
class Registry:
    """What the plugins offered. ``problems`` maps a plugin's origin to why it, or a part of it, could not be used."""

    backends: dict[str, AttentionBackend] = field(default_factory=dict)
    records: list[BackendRecord] = field(default_factory=list)
    providers: list[ConfigProvider] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    plugins: list[tuple[Origin, object]] = field(default_factory=list)

    def backend(self, name: str) -> AttentionBackend:
        """The backend of this name.

        Raises
        ------
        UnknownBackendError: naming near matches, all registered names and the plugins that could not be used.
        """
        try:
            return self.backends[name]
        except KeyError:
            near = difflib.get_close_matches(name, self.backends, n=2)
            raise UnknownBackendError(name, near=near, known=sorted(self.backends), broken=self.problems) from None

    def note_problem(self, origin: Origin, why: str) -> None:
        earlier = self.problems.get(str(origin))
        self.problems[str(origin)] = f"{earlier}; {why}" if earlier else why

    def add_commands(self, cli: click.Group) -> None:
        """Let every plugin add its commands to the command line."""
        self._call_each("adasplash_register_commands", lambda _origin: {"cli": cli})

    def _call_each(self, hook: str, arguments: Callable[[Origin], dict[str, Any]]) -> None:
        """Call one hook of one plugin at a time: in a shared call an implementation that raises would stop all later ones."""
        for origin, plugin in self.plugins:
            manager = pluggy.PluginManager(hookspecs.GROUP)
            manager.add_hookspecs(hookspecs)
            try:
                manager.register(plugin)
                getattr(manager.hook, hook)(**arguments(origin))
            except (Exception, SystemExit) as error:  # whatever a plugin does wrong becomes a reason
                self.note_problem(origin, f"{hook} failed: {_describe(error)}")


def load() -> Registry:
    """Load every allowed plugin and collect what it registers."""
    registry = Registry()
    allowed = _allow_list()
    found = list(_entry_points())
    for name in sorted((allowed or set()) - {entry.name for entry, _ in found}):
        registry.problems[f"{name} (not installed)"] = f"{ALLOW_LIST_VARIABLE} names it, and no entry point has that name"
    names: set[str] = set()
    for entry, origin in found:
        if allowed is not None and entry.name not in allowed:
            continue
        if entry.name in names:
            registry.note_problem(origin, f"another plugin is already named {entry.name!r}")
            continue
        try:
            plugin = entry.load()
            misspelt = _misspelt_hook(plugin)
        except (Exception, SystemExit) as error:  # an import can fail in any way, also by exiting
            registry.note_problem(origin, f"its import failed: {_describe(error)}")
            continue
        if misspelt:
            registry.note_problem(origin, misspelt)
            continue
        names.add(entry.name)
        registry.plugins.append((origin, plugin))
    registry._call_each("adasplash_register_backends", lambda origin: {"register": lambda b: _add_backend(registry, origin, b)})
    registry._call_each("adasplash_register_config_providers", lambda _origin: {"register": registry.providers.append})
    return registry


def _add_backend(registry: Registry, origin: Origin, backend: object) -> None:
    problem = ""
    name = getattr(backend, "name", None)
    version = getattr(backend, "api_version", None)
    if not isinstance(backend, AttentionBackend):
        problem = f"register() wants an AttentionBackend instance, got {backend!r}"
    elif version != BACKEND_API_VERSION:
        problem = f"it was built for backend API version {version}, this is version {BACKEND_API_VERSION}"
    elif not isinstance(name, str) or not name or name == "auto":
        problem = f"{name!r} cannot be a backend's name"
    elif name in registry.backends:
        holder = next(r.origin for r in registry.records if r.name == name and r.backend is not None)
        problem = f"the backend name {name!r} is taken by {holder}"
    usable = backend if isinstance(backend, AttentionBackend) and not problem else None
    registry.records.append(BackendRecord(str(name), origin, usable, problem))
    if usable is not None:
        registry.backends[usable.name] = usable
    else:
        registry.note_problem(origin, problem)


def _entry_points() -> Iterator[tuple[EntryPoint, Origin]]:
    """Entry points of the group, the group's own distribution first, then by distribution and name: the order decides ties."""
    found = []
    for entry in set(entry_points(group=hookspecs.GROUP)):
        distribution = entry.dist.name if entry.dist else "unknown"
        found.append((entry, Origin(entry.name, distribution, entry.dist.version if entry.dist else "?")))
    return iter(
        sorted(found, key=lambda f: (f[1].distribution != "adasplash-core", f[1].distribution, f[1].plugin, f[0].value))
    )


def _allow_list() -> set[str] | None:
    value = os.environ.get(ALLOW_LIST_VARIABLE)
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def _misspelt_hook(plugin: object) -> str:
    """A reason against a plugin with a hook of unknown name, which would otherwise be ignored without a word; else empty."""
    known = [name for name in vars(hookspecs) if name.startswith("adasplash_")]
    for name in dir(plugin):
        if hasattr(getattr(plugin, name, None), f"{hookspecs.GROUP}_impl") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            return f"{name} is no hook" + (f", did you mean {near[0]}?" if near else f"; the hooks are {', '.join(known)}")
    return ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


_lock = threading.Lock()
_registry: Registry | None = None


def registry() -> Registry:
    """The process's registry, loaded on first use."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                _registry = load()
    return _registry


def reload() -> Registry:
    """Load all plugins anew, for instance after changing ``ADASPLASH_PLUGINS``."""
    global _registry
    with _lock:
        _registry = load()
    return _registry
