"""Every error and warning the library raises on purpose.

Each class carries its message template: the rule that was broken, the values seen, and a hint. Each is also the built-in
exception that Python users expect (``ValueError``, ``TypeError``, ``NotImplementedError``), so ``except ValueError`` works.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class AdasplashError(Exception):
    """Base of all errors of this library."""


class ArgumentError(AdasplashError, ValueError):
    """An argument's value or shape breaks a rule of :func:`adasplash_core.attention`.

    Parameters
    ----------
    rule: what must hold, as a sentence.
    seen: what was passed.
    hint: what to do about it.
    """

    template = "{rule} Got {seen}.{hint}"

    def __init__(self, rule: str, *, seen: str, hint: str = "") -> None:
        self.rule, self.seen, self.hint = rule, seen, hint
        super().__init__(self.template.format(rule=rule, seen=seen, hint=f" Hint: {hint}" if hint else ""))


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has the wrong type or dtype."""


class UnknownBackendError(AdasplashError, ValueError):
    """The named backend is not registered."""

    template = "No backend is named {name!r}.{near} Registered: {known}.{broken}"

    def __init__(self, name: str, *, near: Iterable[str], known: Iterable[str], broken: Mapping[str, str]) -> None:
        self.name = name
        matches = list(near)
        hint = f" Did you mean {' or '.join(repr(n) for n in matches)}?" if matches else ""
        failed = "".join(f"\n  {origin}: {why}" for origin, why in broken.items())
        super().__init__(
            self.template.format(
                name=name,
                near=hint,
                known=", ".join(known) or "none",
                broken=f"\nPlugins that could not be used:{failed}" if failed else "",
            )
        )


class BackendUnsupportedError(AdasplashError, NotImplementedError):
    """An explicitly named backend cannot do this call; an explicit choice never falls back."""

    template = 'Backend {name!r} cannot do this call:{reasons}\nPass backend="auto" to let another backend take it.'

    def __init__(self, name: str, reasons: Iterable[str]) -> None:
        self.name, self.reasons = name, tuple(reasons)
        super().__init__(self.template.format(name=name, reasons="".join(f"\n  - {r}" for r in self.reasons)))


class NoCapableBackendError(AdasplashError, NotImplementedError):
    """No registered backend can do this call."""

    template = "No backend can do this call.{reasons}"

    def __init__(self, reasons: Mapping[str, Iterable[str]]) -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = "".join(f"\n  {name}: {'; '.join(why)}" for name, why in self.reasons.items())
        super().__init__(self.template.format(reasons=lines or " None is registered: run `adasplash backends`."))


class ConfigError(AdasplashError, ValueError):
    """A kernel config has unknown fields, missing fields or values of the wrong type."""

    template = "{cls} {problem}. Its fields are {fields}."

    def __init__(self, cls: str, problem: str, *, fields: Iterable[str]) -> None:
        super().__init__(self.template.format(cls=cls, problem=problem, fields=", ".join(fields)))


class ConfigRejectedError(AdasplashError, RuntimeError):
    """Raised by a backend when a well-formed config cannot run here (does not compile, needs too much shared memory).

    The caller then goes on with the backend's default config, unless the config was passed explicitly.
    """

    template = "Backend {backend!r} cannot run config {config} here: {why}"

    def __init__(self, backend: str, config: object, why: str) -> None:
        self.backend, self.config, self.why = backend, config, why
        super().__init__(self.template.format(backend=backend, config=config, why=why))


class DoubleBackwardError(AdasplashError, NotImplementedError):
    """Gradients of gradients are not implemented."""

    template = "{op} has no second derivative: its backward is a fused kernel. Hint: call backward without create_graph=True."

    def __init__(self, op: str) -> None:
        super().__init__(self.template.format(op=op))


class MissingDependencyError(AdasplashError, ImportError):
    """An optional package that this function needs is missing or too old."""

    template = '{what} needs {package}: {why}. Hint: pip install "adasplash-core[{extra}]"'

    def __init__(self, what: str, package: str, why: str, *, extra: str) -> None:
        super().__init__(self.template.format(what=what, package=package, why=why, extra=extra))


class DebugCheckError(ArgumentError):
    """A value on the device is out of range; raised only with ``ADASPLASH_DEBUG=1`` (otherwise values are clamped)."""


class StoreError(AdasplashError, RuntimeError):
    """The database of tuned configs cannot be used; the message says how to mend it."""

    template = "The tuning database {url} {problem}. {mend}"

    def __init__(self, url: str, problem: str, mend: str) -> None:
        self.url, self.problem, self.mend = url, problem, mend
        super().__init__(self.template.format(url=url, problem=problem, mend=mend))


class FrozenConfigsError(StoreError):
    """``ADASPLASH_CACHE_MODE`` is ``frozen`` and what it freezes cannot be read: a call that went on with other configs would set its
    process apart from the others of the job. A :class:`~adasplash_core.configs.ConfigProvider` may raise it; the call ends with it."""


class AdasplashWarning(UserWarning):
    """Base of all warnings of this library; each distinct one is given once a process."""
