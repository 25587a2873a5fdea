"""The entry point named in pyproject.toml. Importing it must stay cheap: it happens in every process that uses AdaSplash Core."""

from __future__ import annotations

from collections.abc import Callable

from adasplash_core.backend import AttentionBackend
from adasplash_core.hookspecs import hookimpl
from adasplash_numpy.backend import NumpyBackend


@hookimpl
def adasplash_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    register(NumpyBackend())
